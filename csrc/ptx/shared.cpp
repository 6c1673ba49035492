// The rules of shared memory: bounds, written bytes, and accesses that no barrier orders.

#include "shared.h"

#include <algorithm>
#include <cstring>

#include "machine.h"

namespace ptx {
namespace {

constexpr size_t kStorageAlign = 1024;

std::string component_text(int component) {
  return component < kMaxWarps ? "warp " + std::to_string(component)
                               : "a copy that mbarrier " + std::to_string(component - kMaxWarps) + " counts";
}

bool all_written(const History& h, int64_t first, int64_t end) {
  for (int64_t byte = first; byte < end; ++byte)
    if (h.state[byte % kGranule] != kWritten) return false;
  return true;
}

}  // namespace

void SharedMemory::start(int64_t bytes, int warps) {
  bytes_ = bytes;
  storage_.resize(static_cast<size_t>(bytes) + kStorageAlign);
  const auto at = reinterpret_cast<uintptr_t>(storage_.data());
  data_ = storage_.data() + (kStorageAlign - at % kStorageAlign) % kStorageAlign;
  std::memset(data_, 0xff, static_cast<size_t>(bytes));  // NaN in every format
  history_.assign(static_cast<size_t>(bytes / kGranule) + 1, History{});
  clock.assign(warps, Clock{});
  for (int w = 0; w < warps; ++w) clock[w][w] = 1;
  fences.assign(static_cast<size_t>(warps) * kWarp, 0);
}

void SharedMemory::join_into(Clock& past, int warp) const {
  for (int i = 0; i < kClocks; ++i) past[i] = std::max(past[i], clock[warp][i]);
}

void SharedMemory::learn(int warp, const Clock& past) {
  for (int i = 0; i < kClocks; ++i) clock[warp][i] = std::max(clock[warp][i], past[i]);
}

void SharedMemory::check_bounds(Warp& w, const Instruction& i, int lane, int64_t at, int bytes, int align) {
  if (at < 0 || at + bytes > bytes_)
    w.fail(i, lane,
           "accesses shared memory bytes " + std::to_string(at) + " to " + std::to_string(at + bytes) +
               " of a block that has " + std::to_string(bytes_));
  if (at % align != 0)
    w.fail(i, lane,
           "accesses shared memory byte " + std::to_string(at) + ", which is not aligned to " + std::to_string(align) +
               " bytes");
}

void SharedMemory::race(Warp& w, const Instruction& i, int lane, int64_t byte, const char* does, const char* did,
                        int other, int line) {
  const bool same = other == w.index;
  w.finding(i, lane,
            std::string(does) + " shared memory byte " + std::to_string(byte) + ", which " +
                (same ? "another lane of this warp" : component_text(other)) + " " + did +
                (line > 0 ? " at line " + std::to_string(line) : "") + ", and no " +
                (same ? "bar.warp.sync" : "barrier") + " orders the two");
}

void SharedMemory::note_read(History& h, const Warp& w, const Instruction& i, int lane, uint32_t now) {
  if (h.reader == w.index || h.reader < 0) {
    h.read_lane =
        h.reader >= 0 && h.read_time == now && h.read_lane != lane ? kSeveralLanes : static_cast<int8_t>(lane);
  } else {
    h.other_reader = h.reader;
    h.other_read_time = h.read_time;
    h.read_lane = static_cast<int8_t>(lane);
  }
  h.reader = static_cast<int16_t>(w.index);
  h.read_time = now;
  h.read_line = i.line;
  h.plain_reader = static_cast<int16_t>(w.index * kWarp + lane);
  h.reader_fences = fences[w.index * kWarp + lane];
}

bool SharedMemory::check_read(Warp& w, const Instruction& i, int lane, int64_t at, int bytes) {
  const uint32_t now = clock[w.index][w.index];
  bool defined = true;
  for (int64_t granule = at / kGranule; granule <= (at + bytes - 1) / kGranule; ++granule) {
    History& h = history_[granule];
    for (int64_t byte = std::max(at, granule * kGranule); byte < std::min(at + bytes, (granule + 1) * kGranule);
         ++byte) {
      const State state = h.state[byte % kGranule];
      defined &= state == kWritten;
      if (state == kUnwritten)
        w.finding(i, lane, "reads shared memory byte " + std::to_string(byte) + ", which nobody has written");
      if (state == kInFlight)
        w.finding(i, lane,
                  "reads shared memory byte " + std::to_string(byte) +
                      ", which a copy in flight will write: wait for it first");
    }
    if (bytes == 1) continue;
    if (h.writer >= 0) {
      const bool other_lane = h.writer == w.index && h.write_lane != lane && h.write_time >= now;
      if (other_lane || !ordered(w.index, h.writer, h.write_time))
        race(w, i, lane, granule * kGranule, "reads", "wrote", h.writer, h.write_line);
    }
    note_read(h, w, i, lane, now);
  }
  return defined;
}

void SharedMemory::check_write(Warp& w, const Instruction& i, int lane, int64_t at, int bytes, State state,
                               const void* data) {
  const uint32_t now = clock[w.index][w.index];
  for (int64_t granule = at / kGranule; granule <= (at + bytes - 1) / kGranule; ++granule) {
    History& h = history_[granule];
    const int64_t first = std::max(at, granule * kGranule), end = std::min(at + bytes, (granule + 1) * kGranule);
    if (h.operand_of > 0)
      w.finding(i, lane,
                "writes shared memory byte " + std::to_string(first) +
                    ", an operand of a product in flight: wait for it first");
    if (bytes > 1) {
      if (h.writer >= 0) {
        const bool other_lane = h.writer == w.index && h.write_lane != lane && h.write_time >= now;
        if (other_lane || !ordered(w.index, h.writer, h.write_time)) {
          // Compilers let all threads that hold the same value store it: whichever comes last changes nothing.
          const bool same_bytes = data != nullptr && state == kWritten && all_written(h, first, end) &&
                                  std::memcmp(data_ + first, static_cast<const char*>(data) + (first - at),
                                              static_cast<size_t>(end - first)) == 0;
          if (!same_bytes) race(w, i, lane, first, "writes", "wrote", h.writer, h.write_line);
        }
      }
      if (h.reader >= 0) {
        const bool other_lane = h.reader == w.index && h.read_lane != lane && h.read_time >= now;
        if (other_lane || !ordered(w.index, h.reader, h.read_time))
          race(w, i, lane, first, "writes", "read", h.reader, h.read_line);
      }
      if (h.other_reader >= 0 && !ordered(w.index, h.other_reader, h.other_read_time))
        race(w, i, lane, first, "writes", "read", h.other_reader, 0);
    }
    for (int64_t byte = first; byte < end; ++byte) {
      if (h.state[byte % kGranule] == kInFlight)
        w.finding(i, lane,
                  "writes shared memory byte " + std::to_string(byte) +
                      ", which a copy in flight will write: wait for it first");
      h.state[byte % kGranule] = state;
    }
    h.writer = static_cast<int16_t>(w.index);
    h.write_time = now;
    h.write_lane = static_cast<int8_t>(lane);
    h.write_line = i.line;
    h.write_fences = fences[w.index * kWarp + lane];
    h.plain_reader = -1;
  }
}

void SharedMemory::check_update(Warp& w, const Instruction& i, int lane, int64_t at, int bytes) {
  const uint32_t now = clock[w.index][w.index];
  for (int64_t granule = at / kGranule; granule < (at + bytes) / kGranule; ++granule) {
    History& h = history_[granule];
    if (h.state[0] == kUnwritten)
      w.finding(i, lane,
                "updates shared memory byte " + std::to_string(granule * kGranule) + ", which nobody has written");
    if (h.state[0] == kInFlight)
      w.finding(i, lane,
                "updates shared memory byte " + std::to_string(granule * kGranule) +
                    ", which a copy in flight will write: wait for it first");
    if (h.write_lane != kAtomic && h.writer >= 0) {
      const bool other_lane = h.writer == w.index && h.write_lane != lane && h.write_time >= now;
      if (other_lane || !ordered(w.index, h.writer, h.write_time))
        race(w, i, lane, granule * kGranule, "updates", "wrote", h.writer, h.write_line);
    }
    if (h.reader >= 0 && !ordered(w.index, h.reader, h.read_time))
      race(w, i, lane, granule * kGranule, "updates", "read", h.reader, h.read_line);
    h.writer = static_cast<int16_t>(w.index);
    h.write_time = now;
    h.write_lane = kAtomic;
    h.write_line = i.line;
    h.plain_reader = -1;
  }
}

Rounds bank_rounds(const uint64_t* address, uint32_t lanes, int bytes) {
  // The banks serve 128 bytes at a time: quarters of a warp for 16 bytes each, halves for 8.
  const int together = bytes == 16 ? 8 : bytes == 8 ? 16 : 32;
  Rounds rounds;
  for (int first = 0; first < kWarp; first += together) {
    std::array<std::array<uint64_t, kWarp>, kBanks> words;
    std::array<int, kBanks> filled{};
    int most = 0;
    for (int lane = first; lane < first + together; ++lane) {
      if (!(lanes >> lane & 1)) continue;
      for (uint64_t word = address[lane] / kWord; word * kWord < address[lane] + bytes; ++word) {
        auto& bank = words[word % kBanks];
        int& n = filled[word % kBanks];
        if (std::find(bank.begin(), bank.begin() + n, word) == bank.begin() + n) bank[n++] = word;
        most = std::max(most, n);
      }
    }
    rounds.wavefronts += most;
    rounds.ideal += most > 0;
  }
  return rounds;
}

}  // namespace ptx
