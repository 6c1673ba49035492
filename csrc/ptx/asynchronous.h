// Operations that go on while their warp does: cp.async, bulk copies, wgmma. And the mbarriers that count copies.
//
// Each has a beginning, when it is checked, and an end, when its warp waits for it. In between, bytes that it will
// write are in flight (State::kInFlight, and NaN), bytes that it reads are noted by SharedMemory::add_read, and
// registers that it reads or writes are pending (Warp::pending). Results are computed at the beginning, for nobody may
// look before the end.
//
//   cp.async        ends at cp.async.wait_group of its thread. It belongs to the generic proxy: a later wgmma or bulk
//   copy
//                   of the same bytes needs a fence.proxy.async after the wait
//   bulk copy       to shared memory: ends with the phase of its mbarrier, and counts as written by it. To global
//   memory:
//                   its read of shared memory ends at cp.async.bulk.wait_group of its thread
//   wgmma           ends at wgmma.wait_group of each of the four warps. A warp computes its own 16 rows when it comes
//   to
//                   the instruction; what all four must agree on is kept with the first that came (Product)
//
// That an mbarrier's initialisation was fenced before a copy completes there is checked only if the launch is pedantic:
// within a block compilers rely on the barrier after it.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include <emulator/phases.h>

#include "machine.h"

namespace ptx {

constexpr int kWarpsOfGroup = 4;

// Bytes of shared memory that a copy writes.
struct Piece {
  static constexpr int kMostBytes = 16;
  uint32_t at = 0;
  uint8_t bytes = 0, lane = 0;
  std::array<uint8_t, kMostBytes> data{};
};

struct Mbarrier : emulator::Phases {
  int slot = 0;             // of the clocks, after the warps
  uint32_t before = 0;      // phases of earlier mbarriers in this slot
  int32_t line = 0;         // of its initialisation
  bool fenced = false;      // a fence.mbarrier_init of its thread has followed that
  Clock arrived{}, over{};  // joined clocks of those who arrived in this phase, and in finished phases
  uint32_t time() const {   // of what this phase's copies write
    return before + phase + 1;
  }
};

// What lanes have committed together; a lane leaves when it has waited.
struct CopyGroup {
  std::vector<Piece> pieces;
  uint32_t lanes = 0;
};

// A copy to shared memory that an mbarrier counts.
struct BulkCopy {
  uint32_t mbarrier = 0, phase = 0;
  const Instruction* at = nullptr;
  Warp* warp = nullptr;
  std::vector<Piece> pieces;
};

// What the four warps of a warpgroup must agree on in their n-th wgmma, and what the first of them has read for all.
struct Product {
  const Instruction* at = nullptr;
  int first_warp = 0, warps = 0;  // warps: that have come
  uint64_t a_descriptor = 0, b_descriptor = 0;
  bool accumulates = false;
  std::vector<float> a, b;  // (64, depth), if it is in shared memory; (depth, columns), in the order of fragments.h
  std::vector<bool> undefined_rows,
      undefined_columns;                          // of a in shared memory, and of b: those with an undefined value
  std::vector<Needed> needed[kWarpsOfGroup + 1];  // of each warp's rows of a, and of b
  int32_t reads = -1;                             // SharedMemory::begin_reads
  bool has_undefined_columns() const {
    return std::find(undefined_columns.begin(), undefined_columns.end(), true) != undefined_columns.end();
  }
};

// The uses of a register by products in flight.
struct RegisterUse {
  int accumulates = 0, reads = 0;
  int32_t shape = 0;    // Instruction::number of the products that accumulate
  uint64_t last = 0;    // number of the last of them among the warp's
  bool copied = false;  // holds a copy of such an accumulator, see move_accumulator()
};

struct OfWarp {
  std::vector<Piece> copies;  // of cp.async, not committed
  std::deque<CopyGroup> copy_groups;
  std::vector<int32_t> stores;  // reads of bulk copies to global memory, not committed
  std::deque<std::vector<int32_t>> store_groups;
  std::vector<std::shared_ptr<Product>> products;  // in flight, not committed; their registers are the instruction's
  std::deque<std::vector<std::shared_ptr<Product>>> product_groups;
  std::vector<RegisterUse> uses;   // by register
  std::vector<int32_t> copied;     // registers with RegisterUse::copied
  uint64_t wgmmas = 0, ended = 0;  // so far; of these, no longer in flight
  bool fenced = false;             // a wgmma.fence was executed
  // The values of registers of products at the last wgmma.fence, or after the product that wrote them since: those that
  // differ were written by other instructions. By register: its place in `snapshot`, or -1.
  std::vector<int32_t> kept_at;
  std::vector<uint32_t> snapshot;
};

struct OfGroup {
  std::deque<std::shared_ptr<Product>> products;
  uint64_t finished = 0;  // products that all four warps have come to, and that left `products`
};

struct Asynchronous {
  std::vector<OfWarp> warps;
  std::vector<OfGroup> groups;
  std::vector<Slot> product_registers;     // all that a wgmma of this kernel names
  std::map<uint32_t, Mbarrier> mbarriers;  // by address
  std::array<uint32_t, kMaxMbarriers> phases{};
  std::array<bool, kMaxMbarriers> taken{};
  std::vector<BulkCopy> copies;
  // Events, kept here while the block runs.
  int64_t mma = 0, mma_multiply_adds = 0, cp_async = 0;
};

// A fresh block; and what of it is still in flight when all warps have left, or "".
void start_asynchronous(Block& b);
std::string left_in_flight(Block& b);
// Adds the block's events to those of the launch.
void count_events(Block& b);

// wgmma.cpp: gives the registers of products a place for the values that they have at a wgmma.fence.
void start_products(Block& b);

// A `mov` of a register that a product in flight accumulates in. Compilers leave such copies between a product and its
// wait, where a register changes its name; ptxas keeps the register, or waits. The copy is in flight as well, so that
// any other use of it is still a finding. Returns false, and does nothing, if the register is no accumulator.
bool move_accumulator(Warp& w, const Instruction& i);

inline OfWarp& of(Warp& w) {
  return w.block->asynchronous->warps[w.index];
}

// mbarrier.cpp: the mbarrier at an address of a lane, or a failure.
Mbarrier& mbarrier_at(Warp& w, const Instruction& i, int lane, uint64_t at);
// Issues a copy whose pieces are checked and in flight.
void issue(Warp& w, const Instruction& i, int lane, uint64_t mbarrier, std::vector<Piece> pieces);

// An address operand's value in a lane.
inline uint64_t address_of(const Warp& w, const Slot& s, int lane) {
  const uint64_t base = lane_bytes(s.type) == 8 ? w.in<uint64_t>(s)[lane] : w.in<uint32_t>(s)[lane];
  return base + static_cast<uint64_t>(s.plus);
}
// An address in shared memory: of 32 bits, or a generic one.
inline uint32_t shared_address_of(const Warp& w, const Slot& s, int lane) {
  return static_cast<uint32_t>(address_of(w, s, lane));
}

}  // namespace ptx
