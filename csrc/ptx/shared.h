// Shared memory of a block, and the history of its bytes: who wrote and read them, and which of that is ordered.
//
// Order. Each warp has a vector clock, with a component for each warp, one for each mbarrier, which counts the phases
// that it has finished and so what its copies wrote, and one for each warp's accesses that a fence.proxy.async has
// followed. A barrier joins the clocks of those who pass it. Further components order accesses to global memory
// (order.h): one for each warp's, and one for those of them that a fence of the GPU's scope has followed.
//
// Proxies. Threads reach shared memory through the generic proxy, wgmma and bulk copies through the asynchronous one.
// What a thread wrote or read is seen in order by the other proxy only if a fence.proxy.async lies between: by the
// thread itself, or by one that a barrier orders after it (PTX ISA, "Causality order").
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include <emulator/banks.h>

namespace ptx {

struct Warp;
struct Instruction;

constexpr int kMaxWarps = 32, kMaxMbarriers = 64;
constexpr int kFenced = kMaxWarps + kMaxMbarriers;  // the first component of what was fenced
constexpr int kGlobal = kFenced + kMaxWarps;        // likewise, of accesses to global memory
constexpr int kReleased = kGlobal + kMaxWarps;      // likewise, of those before a fence
constexpr int kClocks = kReleased + kMaxWarps;
using Clock = std::array<uint32_t, kClocks>;

constexpr int kGranule = 2;  // bytes of shared memory per history
constexpr int kUnit = 16;    // bytes that an asynchronous read takes at a time

enum State : uint8_t {
  kUnwritten,
  kWritten,
  kUndefined,  // a register without a defined value was stored
  kInFlight,   // an asynchronous copy will write it
};

// The last read of a granule by the threads of one warp since the last write.
struct Read {
  uint32_t time = 0, fences = 0;  // fences: of the lane, before the read
  int32_t next = -1;              // the read of another warp
  int32_t line = 0;
  int16_t warp = -1;
  int8_t lane = -1;
  bool several = false;  // lanes read it at this time
};

// The last write of a granule, and the reads since.
struct History {
  uint32_t write_time = 0, write_fences = 0;  // fences: of the lane, before the write
  int32_t write_line = 0, reads = -1;
  int16_t writer = -1;  // a warp, or kMaxWarps + the mbarrier that counts the copy
  int8_t write_lane = -1;
  bool atomic = false;  // the write was an update
  State state[kGranule] = {kUnwritten, kUnwritten};
  // Whether all bytes of the granule are in this state.
  bool all(State one) const {
    return state[0] == one && state[1] == one;
  }
};

// A write that must be ordered before an asynchronous read.
struct Needed {
  uint32_t time, fences, byte;
  int32_t line;
  int16_t writer;
  int8_t lane;
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
  const History& history(int64_t byte) const {
    return history_[(alike_[byte / kUnit] ? byte / kUnit * kUnit : byte) / kGranule];
  }

  // Checks of one lane's access; they report through the warp.
  void check_bounds(Warp& w, const Instruction& i, int lane, int64_t at, int bytes, int align) {
    const auto first = static_cast<uint64_t>(at);
    const bool inside =
        first <= static_cast<uint64_t>(bytes_) && static_cast<uint64_t>(bytes_) - first >= uint64_t(bytes);
    if (!inside || (first & static_cast<uint64_t>(align - 1)) != 0) refuse(w, i, lane, at, bytes, align);
  }
  // Returns whether all bytes are defined. Bytes that nobody wrote, or that are in flight, are a finding.
  bool check_read(Warp& w, const Instruction& i, int lane, int64_t at, int bytes);
  // `data`, if the bytes are written at once: nothing needs to order writes of the same values to the same bytes.
  void check_write(Warp& w, const Instruction& i, int lane, int64_t at, int bytes, State state, const void* data);
  // An atomic update. Updates need no order among each other.
  void check_update(Warp& w, const Instruction& i, int lane, int64_t at, int bytes);

  // An asynchronous copy begins: a write by `component`, at `time` of its clock.
  void begin_copy(Warp& w, const Instruction& i, int lane, int64_t at, int bytes, int component, uint32_t time);
  void set_state(int64_t at, int bytes, State state);
  // Whether all of these bytes are in this state.
  bool holds(State state, int64_t at, int bytes) const;
  bool is_defined(int64_t at, int bytes) const {
    return holds(kWritten, at, bytes);
  }
  // A cp.async is there: from now on it is a write by its lane.
  void finish_write(const Warp& w, int lane, int64_t at, int bytes);

  // An asynchronous read by `warps` warps (at most four) from `first_warp` on, until each has waited. Returns its
  // number.
  int32_t begin_reads(int first_warp, int warps, int32_t line, const char* what);
  void add_read(int32_t number, int64_t at);  // kUnit bytes
  void end_reads(int32_t number, int warp);
  // Checks that bytes can be read by it, and adds the writes that must be ordered before. Returns whether all are
  // defined.
  bool collect(Warp& w, const Instruction& i, int64_t at, int bytes, const char* does, std::vector<Needed>& needed);
  void check_needed(Warp& w, const Instruction& i, const char* does, const std::vector<Needed>& needed);

  // A fence.proxy.async by these lanes. Whether one has followed what a thread did, in the thread or before the warp.
  void fence(int warp, uint32_t lanes);
  bool is_fenced(const Warp& w, int warp, int lane, uint32_t time, uint32_t fences) const;

  // Adds a warp's past to a barrier's, and a barrier's past to that of a warp that waited for it.
  void join_into(Clock& past, int warp) const;
  void learn(int warp, const Clock& past);
  // A new component of the warp's own clock: what its lanes did before is ordered before what they do next.
  void advance(int warp) {
    clock[warp][warp] += 1;
    clock[warp][kGlobal + warp] += 1;
  }
  bool ordered(int warp, int component, uint32_t time) const {
    return component == warp || clock[warp][component] >= time;
  }
  std::vector<Clock> clock;  // by warp

 private:
  struct AsyncRead {
    int16_t first_warp, warps;
    uint32_t done = 0;  // a bit for each
    std::array<uint32_t, 4> time{};
    int32_t line;
    const char* what;
  };
  struct Link {
    int32_t number, next;
  };

  // Calls f(history, first byte, end) for the histories of these bytes: a whole unit at a time where all of them are
  // alike, else by granule.
  template <class F>
  [[gnu::always_inline]] inline void for_histories(int64_t at, int bytes, F f) {
    const auto end = static_cast<uint32_t>(at) + static_cast<uint32_t>(bytes);
    for (auto byte = static_cast<uint32_t>(at); byte < end;) {
      const uint32_t unit = byte / kUnit;
      uint32_t next = (byte / kGranule + 1) * kGranule;
      if (alike_[unit]) {
        if (byte % kUnit == 0 && end - byte >= kUnit) {
          next = byte + kUnit;
        } else {
          part(unit);
        }
      }
      if (next > end) next = end;
      f(history_[byte / kGranule], int64_t{byte}, int64_t{next});
      byte = next;
    }
  }
  // Gives each granule of a unit a history of its own; and one to all of them, which a write has just made alike.
  [[gnu::noinline]] void part(int64_t unit);
  void unite(int64_t at, int bytes);
  int32_t new_read();
  void note_read(History& h, const Warp& w, const Instruction& i, int lane, uint32_t now);
  void drop_reads(History& h);
  // Makes this the last write of the bytes.
  void note_write(const Warp& w, const Instruction& i, int lane, History& h, bool atomic) const;
  void check_reads(Warp& w, const Instruction& i, int lane, int64_t byte, const char* does, const History& h);
  void check_asynchronous_reads(Warp& w, const Instruction& i, int lane, int64_t at, int bytes);
  void check_noted_reads(Warp& w, const Instruction& i, int lane, int64_t at, int bytes);
  // Whether the last write of this history is ordered before what the warp's lane does at `now`.
  bool write_ordered(const Warp& w, const History& h, int lane, uint32_t now) const;
  bool read_ordered(const Warp& w, const Read& read, int lane, uint32_t now) const;

  // Reports, each out of the way of the code that finds nothing.
  [[gnu::cold, gnu::noinline]] void refuse(Warp& w, const Instruction& i, int lane, int64_t at, int bytes, int align);
  [[gnu::cold, gnu::noinline]] void race(Warp& w, const Instruction& i, int lane, int64_t byte, const char* does,
                                         const char* did, int other, int line);
  [[gnu::cold, gnu::noinline]] void unwritten(Warp& w, const Instruction& i, int lane, int64_t byte, const char* does);
  [[gnu::cold, gnu::noinline]] void in_flight(Warp& w, const Instruction& i, int lane, int64_t byte, const char* does,
                                              const History& h);

  std::vector<unsigned char> storage_;
  unsigned char* data_ = nullptr;
  int64_t bytes_ = 0;
  std::vector<History> history_;  // by granule; of a unit that is alike, only the first one counts
  std::vector<uint8_t> alike_;    // by unit
  std::vector<Read> reads_;
  int32_t free_read_ = -1;
  std::vector<AsyncRead> asynchronous_;
  std::vector<int32_t> units_;  // by unit: the first of its links
  std::vector<Link> links_;
  int32_t free_link_ = -1;
  std::vector<uint32_t> fences_;  // by thread: proxy fences so far
};

// Rounds through the banks that an instruction takes: the lanes' addresses, bytes each. `ideal`: without conflicts.
struct Rounds {
  int wavefronts = 0, ideal = 0;
};
inline Rounds bank_rounds(const uint64_t* address, uint32_t lanes, int bytes) {
  const emulator::Wavefronts all = emulator::wavefronts(address, lanes, bytes);
  return {all.units, all.least};
}

}  // namespace ptx
