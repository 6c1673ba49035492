// Shared memory of a block, and the history of its bytes: who wrote and read them, and which of that is ordered.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

namespace ptx {

struct Warp;
struct Instruction;

constexpr int kMaxWarps = 32;
// Each mbarrier has a component of the vector clocks after those of the warps.
constexpr int kMaxMbarriers = 64;
constexpr int kClocks = kMaxWarps + kMaxMbarriers;
using Clock = std::array<uint32_t, kClocks>;

constexpr int kGranule = 2;  // bytes of shared memory per history
constexpr int kBanks = 32, kWord = 4;

constexpr int8_t kSeveralLanes = -2, kAtomic = -3;

enum State : uint8_t {
  kUnwritten,
  kWritten,
  kUndefined,  // a register without a defined value was stored
  kInFlight,   // an asynchronous copy will write it
};

// The last write, and the last reads by two different warps. A clock's component is a warp, or kMaxWarps + an mbarrier
// for what asynchronous copies write.
struct History {
  uint32_t write_time = 0, read_time = 0, other_read_time = 0;
  int16_t writer = -1, reader = -1, other_reader = -1;
  int8_t write_lane = -1, read_lane = -1;  // kSeveralLanes: of the last reader; kAtomic: the last write was an update
  State state[kGranule] = {kUnwritten, kUnwritten};
  int32_t write_line = 0, read_line = 0;
  uint16_t operand_of = 0;     // products in flight that read it
  uint32_t write_fences = 0;   // fences of the writer before the write, generic to asynchronous
  int16_t plain_reader = -1;   // the last thread that read it itself since the write
  uint32_t reader_fences = 0;  // fences of that thread before the read
};

class SharedMemory {
 public:
  // A fresh block: all bytes unwritten and NaN.
  void start(int64_t bytes, int warps);
  unsigned char* data() {
    return data_;
  }
  int64_t bytes() const {
    return bytes_;
  }
  History& history(int64_t byte) {
    return history_[byte / kGranule];
  }

  // Checks of one lane's access; they report through the warp.
  void check_bounds(Warp& w, const Instruction& i, int lane, int64_t at, int bytes, int align);
  // Returns whether all bytes are defined. Bytes that nobody wrote, or that are in flight, are a finding.
  bool check_read(Warp& w, const Instruction& i, int lane, int64_t at, int bytes);
  // `data`, if the bytes are written at once: nothing needs to order writes of the same values to the same bytes.
  void check_write(Warp& w, const Instruction& i, int lane, int64_t at, int bytes, State state, const void* data);

  // An atomic update: ordered by nothing against others of its kind, but against plain accesses.
  void check_update(Warp& w, const Instruction& i, int lane, int64_t at, int bytes);

  // Adds a warp's past to a barrier's, and a barrier's past to that of a warp that waited for it.
  void join_into(Clock& past, int warp) const;
  void learn(int warp, const Clock& past);
  // A new component of the warp's own clock: what its lanes did before is ordered before what they do next.
  void advance(int warp) {
    clock[warp][warp] += 1;
  }
  bool ordered(int warp, int component, uint32_t time) const {
    return component == warp || clock[warp][component] >= time;
  }
  std::vector<Clock> clock;      // by warp
  std::vector<uint32_t> fences;  // by thread: proxy fences so far

 private:
  void note_read(History& h, const Warp& w, const Instruction& i, int lane, uint32_t now);
  void race(Warp& w, const Instruction& i, int lane, int64_t byte, const char* does, const char* did, int other,
            int line);
  std::vector<unsigned char> storage_;
  unsigned char* data_ = nullptr;
  int64_t bytes_ = 0;
  std::vector<History> history_;
};

// Rounds through the banks that an instruction takes: the lanes' addresses, bytes each. `ideal`: without conflicts.
struct Rounds {
  int wavefronts = 0, ideal = 0;
};
Rounds bank_rounds(const uint64_t* address, uint32_t lanes, int bytes);

}  // namespace ptx
