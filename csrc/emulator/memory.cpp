// The emulator's memory rules. state.h has the shared state, runtime.h lists what is checked and counted.

#include "state.h"

#include <algorithm>
#include <cstring>
#include <sstream>

namespace emulator {

// Returns whether an access of `thread` at `time` happened before what this thread does now.
bool ordered(int thread, uint32_t time) {
  return thread == self().index || ordered_for(self_warp(), thread, time);
}

bool ordered_for(int warp, int thread, uint32_t time) {
  const uint32_t known = now->warps[warp].clock[thread / kWarp];
  return thread / kWarp == warp ? known > time : known >= time;
}

std::string site_text(int id) {
  return id < 0 ? "?" : text_of({now->sites[id].file, now->sites[id].line});
}

void race(Where where, uint32_t at, const char* mine, const char* theirs, int thread, int site) {
  fail(where, std::string(mine) + " shared memory byte " + std::to_string(at) + " that " + thread_text(thread) + " " +
                  theirs + (site < 0 ? "" : " at " + site_text(site)) + ", and no barrier orders the two");
}

namespace {

void refuse_in_flight(const History& h, uint32_t at, Where where, const char* doing) {
  if (h.state != kInFlight) return;
  if (h.writer >= kMaxWarps * kWarp)
    fail(where, std::string(doing) + " shared memory byte " + std::to_string(at) + " while " + thread_text(h.writer) +
                    ", issued at " + site_text(h.write_site) + ", are in flight: wait for it first");
  else
    fail(where, std::string(doing) + " shared memory byte " + std::to_string(at) + " while a cp_async of " +
                    thread_text(h.writer) + " issued at " + site_text(h.write_site) +
                    " is in flight: wait for it first");
}

// Gives the notes of a granule's reads back.
void drop_reads(History& h) {
  while (h.reads >= 0) {
    const int32_t i = h.reads;
    h.reads = now->reads[i].next;
    now->reads[i].next = now->free_read;
    now->free_read = i;
  }
}

}  // namespace

void check_write(uint32_t at, int bytes, Where where, State state, Kind kind) {
  const int me = self().index;
  const uint32_t time = time_of(self_warp());
  const int site = now->sites.id(where, kind);
  for (uint32_t g = at / kGranule; g < (at + bytes) / kGranule; ++g) {
    History& h = now->history[g];
    refuse_in_flight(h, g * kGranule, where, "writes");
    if (h.operand_of > 0)
      fail(where, "writes shared memory byte " + std::to_string(g * kGranule) +
                      ", an operand of a wgmma that is in flight: wait for it first");
    if (h.writer >= 0 && !ordered(h.writer, h.write_time))
      race(where, g * kGranule, "writes", "wrote", h.writer, h.write_site);
    for (int32_t i = h.reads; i >= 0; i = now->reads[i].next) {
      const Read& read = now->reads[i];
      const bool other_lane = read.several_lanes && read.thread / kWarp == me / kWarp && read.time >= time;
      if (other_lane || !ordered(read.thread, read.time)) race(where, g * kGranule, "writes", "read", read.thread, -1);
    }
    drop_reads(h);
    h.writer = static_cast<int16_t>(me);
    h.write_time = time;
    h.write_site = static_cast<int16_t>(site);
    h.state = state;
    h.fences = self().async.fences;
  }
}

uint32_t time_of(int warp) {
  return now->warps[warp].clock[warp];
}

void check_bounds(uint32_t at, int bytes, Where where) {
  if (static_cast<uint64_t>(at) + bytes > static_cast<uint64_t>(now->grid.shared))
    fail(where, "shared memory bytes " + std::to_string(at) + " to " + std::to_string(uint64_t{at} + bytes) +
                    " of a block that has " + std::to_string(now->grid.shared));
  if (at % bytes != 0)
    fail(where, "shared memory byte " + std::to_string(at) + " is not aligned to an access of " +
                    std::to_string(bytes) + " bytes");
}

void check_read(uint32_t at, int bytes, Where where) {
  const int me = self().index;
  const uint32_t time = time_of(self_warp());
  for (uint32_t g = at / kGranule; g < (at + bytes) / kGranule; ++g) {
    History& h = now->history[g];
    if (h.state != kWritten) {
      refuse_in_flight(h, g * kGranule, where, "reads");
      fail(where, "reads shared memory byte " + std::to_string(g * kGranule) + ", which nobody has written");
    }
    if (!ordered(h.writer, h.write_time)) race(where, g * kGranule, "reads", "wrote", h.writer, h.write_site);
    Read& read = note_read(h, me, time);
    read.plain_thread = static_cast<int16_t>(me);
    read.fences = self().async.fences;
  }
}

// Notes a read at `time` as the last one of the thread's warp, and returns the note.
Read& note_read(History& h, int me, uint32_t time) {
  int32_t i = h.reads;
  while (i >= 0 && now->reads[i].thread / kWarp != me / kWarp) i = now->reads[i].next;
  if (i < 0) {
    i = now->free_read;
    if (i < 0) {
      i = static_cast<int32_t>(now->reads.size());
      now->reads.emplace_back();
    } else {
      now->free_read = now->reads[i].next;
      now->reads[i] = {};
    }
    now->reads[i].next = h.reads;
    h.reads = i;
  }
  Read& read = now->reads[i];
  read.several_lanes = read.time == time && (read.several_lanes || (read.thread >= 0 && read.thread != me));
  read.thread = static_cast<int16_t>(me);
  read.time = time;
  return read;
}

void join_clocks() {
  Clock joined{};
  for (const Warp& w : now->warps)
    for (int i = 0; i < kClocks; ++i) joined[i] = std::max(joined[i], w.clock[i]);
  for (size_t i = 0; i < now->warps.size(); ++i) {
    now->warps[i].clock = joined;
    now->warps[i].clock[i] += 1;
  }
}

std::string unwritten(const Buffer& b) {
  if (b.tensor.access != Access::kWrite) return "";
  const auto hole = std::find(b.writers.begin(), b.writers.end(), 0u);
  if (hole == b.writers.end()) return "";
  const auto missing = std::count(b.writers.begin(), b.writers.end(), 0u);
  std::ostringstream out;
  out << "kernel " << now->kernel << " ended, and of output " << b.tensor.name << " " << 2 * missing << " of "
      << b.tensor.bytes << " bytes were never written, the first at byte " << 2 * (hole - b.writers.begin());
  return out.str();
}

void global_access(const void* p, int bytes, Kind kind, bool inside, Where where) {
  const auto address = reinterpret_cast<uintptr_t>(p);
  const bool write = kind == Kind::kGlobalWrite;
  if (inside) {
    Buffer* b = buffer_of(p);
    const auto* byte = static_cast<const unsigned char*>(p);
    if (b == nullptr || byte + bytes > b->tensor.start + b->tensor.bytes) {
      std::ostringstream out;
      out << (write ? "writes " : "reads ") << bytes
          << " bytes of global memory outside of every tensor of this launch";
      for (const Buffer& near : now->buffers) {
        const ptrdiff_t offset = byte - near.tensor.start;
        if (offset > -4096 && offset < static_cast<ptrdiff_t>(near.tensor.bytes) + 4096)
          out << "; at byte " << offset << " of " << near.tensor.name << ", which has " << near.tensor.bytes;
      }
      fail(where, out.str());
    }
    if (address % bytes != 0)
      fail(where, std::to_string(bytes) + " bytes at byte " + std::to_string(byte - b->tensor.start) + " of " +
                      b->tensor.name + " are not aligned");
    if (write && b->tensor.access != Access::kWrite) fail(where, "writes to the input " + b->tensor.name);
    if (b->tensor.access == Access::kWrite) {
      const auto me = static_cast<uint32_t>(now->block) * 1024u + static_cast<uint32_t>(self().index) + 1u;
      const size_t first = (byte - b->tensor.start) / 2;
      for (size_t i = first; i < first + std::max(bytes / 2, 1); ++i) {
        uint32_t& writer = b->writers[i];
        if (writer != 0 && writer != me)
          fail(where, (write ? "writes byte " : "reads byte ") + std::to_string(2 * i) + " of output " +
                          b->tensor.name + ", which block " + std::to_string((writer - 1) / 1024) + " thread " +
                          std::to_string((writer - 1) % 1024) + " wrote in the same launch");
        if (!write && writer == 0)
          fail(where,
               "reads byte " + std::to_string(2 * i) + " of output " + b->tensor.name + " before it was written");
        if (write) writer = me;
      }
    }
  }
  gather(address, bytes, kind, inside, where);
}

unsigned char* shared_access(uint32_t at, int bytes, Kind kind, bool inside, Where where) {
  if (inside) {
    check_bounds(at, bytes, where);
    if (kind == Kind::kSharedRead) {
      check_read(at, bytes, where);
    } else {
      check_write(at, bytes, where, kWritten, kind);
    }
  }
  gather(at, bytes, kind, inside, where);
  return now->shared + at;
}

void cp_async16(uint32_t at, const void* p, bool inside, Where where) {
  constexpr int kBytes = 16;
  global_access(p, kBytes, Kind::kGlobalCopy, inside, where);
  check_bounds(at, kBytes, where);
  check_write(at, kBytes, where, kInFlight, Kind::kSharedWrite);
  gather(at, kBytes, Kind::kSharedWrite, true, where);
  Copy copy{at, {}};
  if (inside) std::memcpy(&copy.data, p, kBytes);
  std::memset(now->shared + at, 0xff, kBytes);
  self().issued.push_back(copy);
  self().where = where;
}

void cp_async_commit() {
  self().groups.push_back(std::move(self().issued));
  self().issued.clear();
}

void cp_async_wait(int pending, Where where) {
  (void)where;
  Thread& me = self();
  const size_t landed = me.groups.size() > static_cast<size_t>(pending) ? me.groups.size() - pending : 0;
  const uint32_t time = time_of(self_warp());
  for (size_t i = 0; i < landed; ++i) {
    for (const Copy& copy : me.groups[i]) {
      std::memcpy(now->shared + copy.at, &copy.data, sizeof(copy.data));
      for (uint32_t g = copy.at / kGranule; g < (copy.at + sizeof(copy.data)) / kGranule; ++g) {
        now->history[g].state = kWritten;
        now->history[g].write_time = time;
        now->history[g].fences = me.async.fences;  // an earlier fence_async has not seen these bytes
      }
    }
  }
  me.groups.erase(me.groups.begin(), me.groups.begin() + static_cast<ptrdiff_t>(landed));
}

}  // namespace emulator
