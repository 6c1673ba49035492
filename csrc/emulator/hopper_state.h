// State of mbarriers, bulk copies and wgmma within a launch.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include <emulator/phases.h>
#include <emulator/runtime.h>
#include <resnet_fast/device.h>

namespace emulator {

constexpr int kMaxWarps = 32;
// Each mbarrier has a component of the vector clocks, after those of the warps: the number of its finished phases.
// Copies that land on it count as writes of an extra thread with this clock, so that the rules for threads apply to
// them.
constexpr int kMaxBarriers = 24;
constexpr int kClocks = kMaxWarps + kMaxBarriers;
using Clock = std::array<uint32_t, kClocks>;

struct Barrier : Phases {
  int slot = 0;
  int initialised_by = 0, site = 0;
  bool fenced = false;
  Clock arrived{}, over{};  // the joined clocks of threads that arrived in this phase, and in finished phases
  std::vector<int> waiters;
};

struct BulkCopy {
  uint32_t barrier = 0, phase = 0;
  Where where{};
  struct Piece {
    uint32_t at;
    resnet_fast::Vec16 data;
  };
  std::vector<Piece> pieces;
};

// Products that add to the same accumulators, one after another.
struct Chain {
  std::array<float*, resnet_fast::kWarp * 4> d{};
  int each = 0;              // values of a thread
  std::vector<float> value;  // (64, columns)
};

struct Product {
  std::shared_ptr<Chain> chain;
  std::vector<uint32_t> a, b;  // addresses of 16-byte chunks, two per row; a is empty if it comes from registers
  std::array<uint32_t*, resnet_fast::kWarp * 4> registers{};  // of a, by thread
};

// A register of operand a of products in flight. Until the last of them is waited for it is poison.
struct Held {
  uint32_t* word;
  uint32_t value;
  int products;
};
using Products = std::vector<std::shared_ptr<Product>>;

struct Warpgroup {
  int arrived = 0;
  Where where{};
  std::array<void*, resnet_fast::kWarp * 4> arguments{};
  std::vector<std::shared_ptr<Chain>> chains;
};

// The asynchronous operations of a thread.
struct Asynchronous {
  uint32_t fences = 0;  // fence_async calls so far
  bool registers_fenced = false;
  Products issued;
  std::vector<Products> groups;
  std::vector<Held> held;
  bool waits = false;
  uint32_t barrier = 0;
};

struct Hopper {
  std::map<uint32_t, Barrier> barriers;
  std::vector<BulkCopy> copies;
  std::vector<Warpgroup> warpgroups;
};

// hopper.cpp: a fresh block; why the block may not end here, or ""; what a waiting thread waits for.
void start_block_of_hopper();
std::string left_in_flight();
std::string awaited(const Asynchronous& thread, const char* otherwise);
std::string barrier_text(int slot);

}  // namespace emulator
