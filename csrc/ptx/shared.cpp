// The rules of shared memory: bounds, written bytes, accesses that no barrier orders, and proxies that no fence orders.

#include "shared.h"

#include <algorithm>
#include <cstring>

#include "machine.h"

namespace ptx {
namespace {

constexpr size_t kStorageAlign = 1024;
constexpr int kGranules = kUnit / kGranule;

std::string component_text(int component) {
  return component < kMaxWarps ? "warp " + std::to_string(component)
                               : "a copy that mbarrier " + std::to_string(component - kMaxWarps) + " counts";
}

std::string byte_text(int64_t byte) {
  return " shared memory byte " + std::to_string(byte);
}

std::string line_text(int line) {
  return line > 0 ? " at line " + std::to_string(line) : "";
}

}  // namespace

void SharedMemory::start(int64_t bytes, int warps) {
  bytes_ = bytes;
  storage_.resize(static_cast<size_t>(bytes) + kStorageAlign);
  const auto at = reinterpret_cast<uintptr_t>(storage_.data());
  data_ = storage_.data() + (kStorageAlign - at % kStorageAlign) % kStorageAlign;
  std::memset(data_, 0xff, static_cast<size_t>(bytes));  // NaN in every format
  const size_t units = static_cast<size_t>(bytes / kUnit) + 1;
  history_.resize(units * kGranules);
  for (size_t unit = 0; unit < units; ++unit) history_[unit * kGranules] = History{};
  alike_.assign(units, 1);
  reads_.clear();
  free_read_ = -1;
  asynchronous_.clear();
  units_.assign(static_cast<size_t>(bytes / kUnit) + 1, -1);
  links_.clear();
  free_link_ = -1;
  clock.assign(warps, Clock{});
  for (int w = 0; w < warps; ++w) clock[w][w] = clock[w][kGlobal + w] = 1;
  fences_.assign(static_cast<size_t>(warps) * kWarp, 0);
}

namespace {

// The clocks' components come in rows of kMaxWarps, of which a block uses as many as it has warps. f(component).
template <class F>
void for_components(size_t warps, F f) {
  for (int row = 0; row < kClocks; row += kMaxWarps) {
    const bool of_warps = row < kMaxWarps || row >= kFenced;
    const int end = row + (of_warps ? static_cast<int>(warps) : kMaxWarps);
    for (int i = row; i < end; ++i) f(i);
  }
}
static_assert(kFenced % kMaxWarps == 0 && kClocks % kMaxWarps == 0);

}  // namespace

void SharedMemory::join_into(Clock& past, int warp) const {
  const Clock& mine = clock[warp];
  for_components(clock.size(), [&](int i) { past[i] = std::max(past[i], mine[i]); });
}

void SharedMemory::learn(int warp, const Clock& past) {
  Clock& mine = clock[warp];
  for_components(clock.size(), [&](int i) { mine[i] = std::max(mine[i], past[i]); });
}

// What the warp knows of other warps is fenced from now on. Of its own accesses only those before its last barrier are:
// other lanes may not have come to the fence. Each lane's count says the rest.
void SharedMemory::fence(int warp, uint32_t lanes) {
  Clock& mine = clock[warp];
  for (int other = 0; other < kMaxWarps; ++other)
    mine[kFenced + other] = std::max(mine[kFenced + other], mine[other] - (other == warp ? 1 : 0));
  for (int lane = 0; lane < kWarp; ++lane) fences_[warp * kWarp + lane] += lanes >> lane & 1;
}

bool SharedMemory::is_fenced(const Warp& w, int warp, int lane, uint32_t time, uint32_t fences) const {
  return clock[w.index][kFenced + warp] >= time || (lane >= 0 && fences_[warp * kWarp + lane] != fences);
}

void SharedMemory::refuse(Warp& w, const Instruction& i, int lane, int64_t at, int bytes, int align) {
  if (at < 0 || at + bytes > bytes_)
    w.fail(i, lane,
           "accesses shared memory bytes " + std::to_string(at) + " to " + std::to_string(at + bytes) +
               " of a block that has " + std::to_string(bytes_));
  w.fail(i, lane, "accesses" + byte_text(at) + ", which is not aligned to " + std::to_string(align) + " bytes");
}

void SharedMemory::unwritten(Warp& w, const Instruction& i, int lane, int64_t byte, const char* does) {
  w.finding(i, lane, does + byte_text(byte) + ", which nobody has written");
}

void SharedMemory::in_flight(Warp& w, const Instruction& i, int lane, int64_t byte, const char* does,
                             const History& h) {
  w.finding(i, lane,
            does + byte_text(byte) + ", which a copy in flight will write, issued" + line_text(h.write_line) +
                ": wait for it first");
}

void SharedMemory::race(Warp& w, const Instruction& i, int lane, int64_t byte, const char* does, const char* did,
                        int other, int line) {
  const bool same = other == w.index;
  w.finding(i, lane,
            does + byte_text(byte) + ", which " + (same ? "another lane of this warp" : component_text(other)) + " " +
                did + line_text(line) + ", and no " + (same ? "bar.warp.sync" : "barrier") + " orders the two");
}

// ---- histories ----

void SharedMemory::part(int64_t unit) {
  alike_[unit] = 0;
  History* first = &history_[unit * kGranules];
  for (int n = 1; n < kGranules; ++n) {
    History& h = first[n];
    h = *first;
    h.reads = -1;
    int32_t last = -1;  // the reads are copied too, in their order
    for (int32_t from = first->reads; from >= 0; from = reads_[from].next) {
      const int32_t to = new_read();
      reads_[to] = reads_[from];
      reads_[to].next = -1;
      (last < 0 ? h.reads : reads_[last].next) = to;
      last = to;
    }
  }
}

void SharedMemory::unite(int64_t at, int bytes) {
  for (int64_t unit = (at + kUnit - 1) / kUnit; (unit + 1) * kUnit <= at + bytes; ++unit) alike_[unit] = 1;
}

int32_t SharedMemory::new_read() {
  if (free_read_ < 0) {
    reads_.emplace_back();
    return static_cast<int32_t>(reads_.size()) - 1;
  }
  const int32_t n = free_read_;
  free_read_ = reads_[n].next;
  reads_[n] = Read{};
  return n;
}

// ---- reads ----

inline bool SharedMemory::write_ordered(const Warp& w, const History& h, int lane, uint32_t now) const {
  if (h.writer == w.index) return h.write_lane == lane || h.write_time < now;
  return h.writer < 0 || clock[w.index][h.writer] >= h.write_time;
}

inline bool SharedMemory::read_ordered(const Warp& w, const Read& read, int lane, uint32_t now) const {
  if (read.warp == w.index) return (!read.several && read.lane == lane) || read.time < now;
  return clock[w.index][read.warp] >= read.time;
}

inline void SharedMemory::note_read(History& h, const Warp& w, const Instruction& i, int lane, uint32_t now) {
  int32_t n = h.reads;
  while (n >= 0 && reads_[n].warp != w.index) n = reads_[n].next;
  if (n < 0) {
    n = new_read();
    reads_[n].next = h.reads;
    reads_[n].warp = static_cast<int16_t>(w.index);
    h.reads = n;
  }
  Read& read = reads_[n];
  read.several = read.time == now && (read.several || read.lane != lane);
  read.time = now;
  read.line = i.line;
  read.lane = static_cast<int8_t>(lane);
  read.fences = fences_[w.index * kWarp + lane];
}

inline void SharedMemory::drop_reads(History& h) {
  if (h.reads < 0) return;
  int32_t last = h.reads;
  while (reads_[last].next >= 0) last = reads_[last].next;
  reads_[last].next = free_read_;
  free_read_ = h.reads;
  h.reads = -1;
}

bool SharedMemory::check_read(Warp& w, const Instruction& i, int lane, int64_t at, int bytes) {
  const uint32_t now = clock[w.index][w.index];
  bool defined = true;
  for_histories(at, bytes, [&](History& h, int64_t first, int64_t end) {
    for (int64_t byte = first; byte < std::min(end, first + kGranule) && !h.all(kWritten); ++byte) {
      const State state = h.state[byte % kGranule];
      defined &= state == kWritten;
      if (state == kUnwritten) unwritten(w, i, lane, byte, "reads");
      if (state == kInFlight) in_flight(w, i, lane, byte, "reads", h);
    }
    if (bytes == 1) return;
    if (!write_ordered(w, h, lane, now)) race(w, i, lane, first, "reads", "wrote", h.writer, h.write_line);
    note_read(h, w, i, lane, now);
  });
  return defined;
}

// ---- writes ----

inline void SharedMemory::check_reads(Warp& w, const Instruction& i, int lane, int64_t byte, const char* does,
                                      const History& h) {
  const uint32_t now = clock[w.index][w.index];
  for (int32_t n = h.reads; n >= 0; n = reads_[n].next) {
    const Read& read = reads_[n];
    if (!read_ordered(w, read, lane, now)) race(w, i, lane, byte, does, "read", read.warp, read.line);
  }
}

inline void SharedMemory::check_asynchronous_reads(Warp& w, const Instruction& i, int lane, int64_t at, int bytes) {
  if (!asynchronous_.empty()) check_noted_reads(w, i, lane, at, bytes);
}

void SharedMemory::check_noted_reads(Warp& w, const Instruction& i, int lane, int64_t at, int bytes) {
  const auto last = static_cast<uint32_t>(at + bytes - 1) / kUnit;
  for (int64_t unit = static_cast<uint32_t>(at) / kUnit; unit <= last; ++unit) {
    if (units_[unit] < 0) continue;
    for (int32_t link = units_[unit]; link >= 0; link = links_[link].next) {
      const AsyncRead& read = asynchronous_[links_[link].number];
      for (int n = 0; n < read.warps; ++n) {
        const int warp = read.first_warp + n;
        const auto who = [&] { return read.what + line_text(read.line); };
        if (!(read.done >> n & 1)) {
          w.finding(i, lane, "writes" + byte_text(at) + ", which " + who() + " still reads: wait for it first");
          break;
        }
        if (!ordered(w.index, warp, read.time[n]))
          w.finding(i, lane,
                    "writes" + byte_text(at) + ", which " + who() + " of warp " + std::to_string(warp) +
                        " read, and no barrier orders the two");
      }
    }
    if (at > unit * kUnit || at + bytes < (unit + 1) * kUnit) continue;  // the other bytes are still read
    while (units_[unit] >= 0) {
      const int32_t link = units_[unit];
      units_[unit] = links_[link].next;
      links_[link].next = free_link_;
      free_link_ = link;
    }
  }
}

void SharedMemory::check_write(Warp& w, const Instruction& i, int lane, int64_t at, int bytes, State state,
                               const void* data) {
  const uint32_t now = clock[w.index][w.index];
  check_asynchronous_reads(w, i, lane, at, bytes);
  for_histories(at, bytes, [&](History& h, int64_t first, int64_t end) {
    if (bytes > 1) {
      if (!write_ordered(w, h, lane, now)) {
        // Compilers let all threads that hold the same value store it: whichever comes last changes nothing. One that
        // is undefined in all of them stays so.
        const bool equal = data != nullptr && (state == kUndefined ||
                                               std::memcmp(data_ + first, static_cast<const char*>(data) + (first - at),
                                                           static_cast<size_t>(end - first)) == 0);
        const bool same_state = end - first == 1 ? h.state[first % kGranule] == state : h.all(state);
        if (!equal || !same_state) race(w, i, lane, first, "writes", "wrote", h.writer, h.write_line);
      }
      check_reads(w, i, lane, first, "writes", h);
      drop_reads(h);
    }
    for (int64_t byte = first; byte < std::min(end, first + kGranule); ++byte) {
      if (h.state[byte % kGranule] == kInFlight) in_flight(w, i, lane, byte, "writes", h);
      h.state[byte % kGranule] = state;
    }
    note_write(w, i, lane, h, false);
  });
  unite(at, bytes);
}

void SharedMemory::note_write(const Warp& w, const Instruction& i, int lane, History& h, bool atomic) const {
  h.writer = static_cast<int16_t>(w.index);
  h.write_time = clock[w.index][w.index];
  h.write_lane = static_cast<int8_t>(lane);
  h.write_line = i.line;
  h.write_fences = fences_[w.index * kWarp + lane];
  h.atomic = atomic;
}

void SharedMemory::check_update(Warp& w, const Instruction& i, int lane, int64_t at, int bytes) {
  const uint32_t now = clock[w.index][w.index];
  check_asynchronous_reads(w, i, lane, at, bytes);
  for_histories(at, bytes, [&](History& h, int64_t byte, int64_t) {
    if (h.state[0] == kUnwritten) w.finding(i, lane, "updates" + byte_text(byte) + ", which nobody has written");
    if (h.state[0] == kInFlight)
      w.finding(i, lane, "updates" + byte_text(byte) + ", which a copy in flight will write: wait for it first");
    if (!h.atomic && h.writer >= 0) {
      const bool other_lane = h.writer == w.index && h.write_lane != lane && h.write_time >= now;
      if (other_lane || !ordered(w.index, h.writer, h.write_time))
        race(w, i, lane, byte, "updates", "wrote", h.writer, h.write_line);
    }
    check_reads(w, i, lane, byte, "updates", h);
    note_write(w, i, lane, h, true);
    drop_reads(h);
  });
}

// ---- asynchronous accesses ----

void SharedMemory::begin_copy(Warp& w, const Instruction& i, int lane, int64_t at, int bytes, int component,
                              uint32_t time) {
  const auto unfenced = [&](int64_t byte, int warp, int other, const char* did, int line) {
    w.finding(i, lane,
              "copies to" + byte_text(byte) + ", which warp " + std::to_string(warp) + " lane " +
                  std::to_string(other) + " " + did + line_text(line) + ", and no fence.proxy.async follows that");
  };
  for_histories(at, bytes, [&](const History& h, int64_t byte, int64_t) {
    if (h.writer >= 0 && h.writer < kMaxWarps && !is_fenced(w, h.writer, h.write_lane, h.write_time, h.write_fences))
      unfenced(byte, h.writer, h.write_lane, "wrote", h.write_line);
    for (int32_t n = h.reads; n >= 0; n = reads_[n].next) {
      const Read& read = reads_[n];
      if (!is_fenced(w, read.warp, read.lane, read.time, read.fences))
        unfenced(byte, read.warp, read.lane, "read", read.line);
    }
  });
  check_write(w, i, lane, at, bytes, kInFlight, nullptr);
  for_histories(at, bytes, [&](History& h, int64_t, int64_t) {
    h.writer = static_cast<int16_t>(component);
    h.write_time = time;
  });
}

void SharedMemory::set_state(int64_t at, int bytes, State state) {
  for_histories(at, bytes, [&](History& h, int64_t first, int64_t end) {
    for (int64_t byte = first; byte < std::min(end, first + kGranule); ++byte) h.state[byte % kGranule] = state;
  });
}

void SharedMemory::finish_write(const Warp& w, int lane, int64_t at, int bytes) {
  const uint32_t now = clock[w.index][w.index], fences = fences_[w.index * kWarp + lane];
  for_histories(at, bytes, [&](History& h, int64_t first, int64_t end) {
    for (int64_t byte = first; byte < std::min(end, first + kGranule); ++byte) h.state[byte % kGranule] = kWritten;
    h.write_time = now;
    h.write_fences = fences;
  });
}

int32_t SharedMemory::begin_reads(int first_warp, int warps, int32_t line, const char* what) {
  AsyncRead read{};
  read.first_warp = static_cast<int16_t>(first_warp);
  read.warps = static_cast<int16_t>(warps);
  read.line = line;
  read.what = what;
  asynchronous_.push_back(read);
  return static_cast<int32_t>(asynchronous_.size()) - 1;
}

// Later reads of the same warps end later, so that the last one stands for all.
void SharedMemory::add_read(int32_t number, int64_t at) {
  const AsyncRead& read = asynchronous_[number];
  int32_t& first = units_[at / kUnit];
  for (int32_t link = first; link >= 0; link = links_[link].next) {
    const AsyncRead& other = asynchronous_[links_[link].number];
    if (other.first_warp != read.first_warp || other.warps != read.warps) continue;
    links_[link].number = number;
    return;
  }
  int32_t link = free_link_;
  if (link < 0) {
    link = static_cast<int32_t>(links_.size());
    links_.emplace_back();
  } else {
    free_link_ = links_[link].next;
  }
  links_[link] = {number, first};
  first = link;
}

void SharedMemory::end_reads(int32_t number, int warp) {
  AsyncRead& read = asynchronous_[number];
  const int n = warp - read.first_warp;
  read.done |= 1u << n;
  read.time[n] = clock[warp][warp];
}

bool SharedMemory::holds(State state, int64_t at, int bytes) const {
  for (int64_t byte = at; byte < at + bytes; ++byte)
    if (history(byte).state[byte % kGranule] != state) return false;
  return true;
}

bool SharedMemory::collect(Warp& w, const Instruction& i, int64_t at, int bytes, const char* does,
                           std::vector<Needed>& needed) {
  bool defined = true;
  for_histories(at, bytes, [&](const History& h, int64_t byte, int64_t) {
    for (int n = 0; n < kGranule && !h.all(kWritten); ++n) {
      defined &= h.state[n] == kWritten;
      if (h.state[n] == kUnwritten) unwritten(w, i, -1, byte + n, does);
      if (h.state[n] == kInFlight) in_flight(w, i, -1, byte + n, does, h);
    }
    if (h.writer < 0) return;
    if (!needed.empty() && needed.back().writer == h.writer && needed.back().lane == h.write_lane &&
        needed.back().time == h.write_time && needed.back().fences == h.write_fences)
      return;
    needed.push_back({h.write_time, h.write_fences, static_cast<uint32_t>(byte), h.write_line, h.writer, h.write_lane});
  });
  return defined;
}

void SharedMemory::check_needed(Warp& w, const Instruction& i, const char* does, const std::vector<Needed>& needed) {
  for (const Needed& n : needed) {
    if (!ordered(w.index, n.writer, n.time)) race(w, i, -1, n.byte, does, "wrote", n.writer, n.line);
    if (n.writer < kMaxWarps && !is_fenced(w, n.writer, n.lane, n.time, n.fences))
      w.finding(i, -1,
                does + byte_text(n.byte) + ", which warp " + std::to_string(n.writer) + " lane " +
                    std::to_string(n.lane) + " wrote" + line_text(n.line) + ", and no fence.proxy.async follows that");
  }
}

}  // namespace ptx
