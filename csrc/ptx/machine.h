// A launch: its blocks, one after another, with their warps, memory and findings.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "global.h"
#include "instruction.h"
#include "shared.h"
#include "warp.h"

namespace ptx {

struct Finding {
  std::string kernel, what, source, opcode;
  int line = 0;
  std::array<int, 3> block{};
  int warp = 0, lane = -1;
  std::string text() const;
};

struct Fault : std::runtime_error {
  explicit Fault(Finding f) : std::runtime_error(f.text()), finding(std::move(f)) {
  }
  Finding finding;
};

// Accesses of one instruction.
struct LineCount {
  int64_t instructions = 0;   // of a warp
  int64_t wavefronts = 0;     // of shared memory: rounds through its banks
  int64_t ideal = 0;          // rounds that the same bytes take without a conflict
  int64_t sectors = 0;        // of global memory, of 32 bytes, by instruction
  int64_t ideal_sectors = 0;  // the bytes asked for, in sectors
};

// How often something happened, by name. There are a dozen names, each written in one place.
class Events {
 public:
  int64_t& operator[](const char* name) {
    for (auto& [known, count] : all_)
      if (known == name || std::strcmp(known, name) == 0) return count;
    all_.emplace_back(name, 0);
    return all_.back().second;
  }
  const std::vector<std::pair<const char*, int64_t>>& all() const {
    return all_;
  }

 private:
  std::vector<std::pair<const char*, int64_t>> all_;
};

struct Counters {
  int64_t instructions = 0;         // of a warp
  std::vector<int64_t> executed;    // by Instruction, how often
  std::vector<LineCount> accesses;  // by Instruction
  Events events;                    // "barriers", "mma", "wgmma", ...
};

// One of the sixteen barriers of a block.
struct NamedBarrier {
  int expected = 0;         // threads; 0: all that are alive
  int arrived = 0;          // threads, in whole warps
  uint32_t warps = 0;       // that arrived
  uint32_t generation = 0;  // how often it was completed
  Clock past{};             // of the warps that arrived
  const Instruction* first = nullptr;
  int first_warp = 0;
  int count = 0;  // barrier.red: lanes whose predicate holds, and lanes in all
  int lanes = 0;
  int last_count = 0, last_lanes = 0;  // of the completed generation
};

// Asynchronous operations of a block: asynchronous.h.
struct Asynchronous;

struct Block {
  Launch* launch = nullptr;
  std::array<int, 3> index{};
  std::vector<Warp> warps;
  SharedMemory shared;
  std::array<NamedBarrier, 16> barriers;
  std::shared_ptr<Asynchronous> asynchronous;
};

struct Launch {
  const Program* program = nullptr;
  std::array<int, 3> grid{1, 1, 1}, threads{1, 1, 1};
  int64_t dynamic_shared = 0;
  std::vector<uint8_t> parameters;  // the kernel's parameters, laid out as Parameter::offset says
  GlobalMemory* memory = nullptr;
  uint64_t random = 1;
  int64_t limit = 0;  // of a warp's instructions, all together
  bool strict = true;
  bool pedantic = false;       // also reports what compilers rely on against the letter of PTX
  std::function<void()> tick;  // called now and then; may throw to stop the launch

  Block block;
  Counters counters;
  GlobalOrder order;
  std::vector<Finding> findings;
  bool stopped = false;  // by a finding that cannot be continued after

  uint64_t draw(uint64_t below);
  LineCount& line(const Instruction& i) {
    return counters.accesses[&i - program->instructions.data()];
  }
};

// Runs all blocks. Throws Fault if it is strict, and Error if the launch is not one of this kernel.
void run(Launch& launch);

// The places of generic addresses other than global ones; those are the host's.
constexpr uint64_t kWindow = uint64_t{1} << 56;
constexpr uint64_t kSharedWindow = kWindow, kLocalWindow = 2 * kWindow, kParameterWindow = 3 * kWindow;

}  // namespace ptx
