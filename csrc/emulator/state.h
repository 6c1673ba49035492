// State that the parts of the emulator's runtime share: the running launch, its threads, and the history of their
// memory.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include <emulator/banks.h>
#include <emulator/runtime.h>
#include <resnet_fast/device.h>

#include "fiber.h"
#include "hopper_state.h"

namespace emulator {

using resnet_fast::Access;
using resnet_fast::kWarp;

constexpr uint32_t kAllLanes = 0xffffffffu;
constexpr int kGranule = 2;  // bytes of shared memory per history

struct Site {
  const char* file;
  int line;
  Kind kind;
};

// Numbers the sites, and finds them by the address of the file's name, which is unique per translation unit.
class Sites {
 public:
  int id(Where where, Kind kind) {
    const uint64_t key = reinterpret_cast<uintptr_t>(where.file) * 31 + static_cast<uint64_t>(where.line) * 8 +
                         static_cast<uint64_t>(kind);
    size_t slot = key * 0x9e3779b97f4a7c15ull >> 52;
    for (;; slot = (slot + 1) % kSlots) {
      Slot& s = slots_[slot];
      if (s.id < 0) {
        s = {static_cast<int>(sites_.size()), where.file, where.line, kind};
        sites_.push_back({where.file, where.line, kind});
        return s.id;
      }
      if (s.file == where.file && s.line == where.line && s.kind == kind) return s.id;
    }
  }
  const Site& operator[](int id) const {
    return sites_[id];
  }
  int size() const {
    return static_cast<int>(sites_.size());
  }

 private:
  static constexpr size_t kSlots = 4096;
  struct Slot {
    int id = -1;
    const char* file = nullptr;
    int line = 0;
    Kind kind = Kind::kGlobalRead;
  };
  std::array<Slot, kSlots> slots_{};
  std::vector<Site> sites_;
};

// One instruction of a warp, gathered lane by lane. A lane whose flag is off takes part without an address.
struct Gathered {
  uint32_t lanes = 0, active = 0;
  int bytes = 0;
  std::array<uint64_t, kWarp> address;
};

struct SiteLog {
  std::array<uint32_t, kWarp> next{};  // per lane: the entry of `open` that it joins next
  std::vector<Gathered> open;
};

struct Copy {
  uint32_t at;
  resnet_fast::Vec16 data;
};

struct Thread {
  int index = 0;
  bool done = false;
  bool waiting = false;
  const char* waits_for = "";
  Where where{};
  std::vector<std::vector<Copy>> groups;  // committed, not yet waited for
  std::vector<Copy> issued;               // not yet committed
  Asynchronous async;
};

struct Warp {
  uint32_t arrived = 0, left = 0;
  const char* what = "";
  Where where{};
  std::array<void*, kWarp> arguments{};
  Clock clock{};
  std::vector<SiteLog> logs;
  std::vector<int> touched;
};

enum State : uint8_t { kUnwritten, kWritten, kInFlight };

// The last read of a granule by one warp since the last write.
struct Read {
  uint32_t time = 0;
  int32_t next = -1;  // index of another warp's in Launch::reads
  int16_t thread = -1;
  bool several_lanes = false;  // more than one lane read it at this time
  int16_t plain_thread = -1;   // the last thread that read these bytes itself; wgmma does not count
  uint32_t fences = 0;         // fence_async calls of that thread before the read
};

// The history of two bytes of shared memory: the last write, and each warp's last read since.
struct History {
  uint32_t write_time = 0;
  int16_t writer = -1;
  int16_t write_site = -1;
  State state = kUnwritten;
  uint16_t operand_of = 0;  // warps with a product in flight that reads it
  uint32_t fences = 0;      // fence_async calls of the writer before the write
  int32_t reads = -1;       // the first of a list in Launch::reads
};

struct Buffer {
  Tensor tensor;
  uint64_t first_sector = 0;
  std::vector<uint8_t> touched;   // per sector: bit 0 read, bit 1 written
  std::vector<uint32_t> in_l1;    // per sector: 1 + the last block that read it through L1
  std::vector<uint32_t> writers;  // per two bytes of an output: block * 1024 + thread + 1
  BufferCount count;
};

struct Launch {
  const char* kernel = "";
  resnet_fast::Grid grid;
  const std::function<void()>* body = nullptr;
  std::vector<Buffer> buffers;
  Sites sites;
  std::vector<SiteCount> site_counts;
  Counters counters;
  uint64_t random = 0;

  int block = 0;
  Thread* current = nullptr;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<Fiber> fibers;
  std::vector<int> runnable;
  int at_barrier = 0;
  Where barrier{};
  int barrier_first = 0;
  std::vector<unsigned char> shared_storage;
  unsigned char* shared = nullptr;
  std::vector<History> history;
  std::vector<Read> reads;
  int32_t free_read = -1;  // the first of a list in `reads`
  Fiber scheduler;
  std::string fault;
  Hopper hopper;
};

// The running launch. There is one at a time.
extern Launch* now;

Thread& self();
int self_warp();
int self_lane();

// runtime.cpp: draws a number below `below` from the launch's seed; ends the launch with a report; texts for reports.
uint64_t draw(uint64_t below);
[[noreturn]] void fail(Where where, const std::string& what);
std::string text_of(Where where);
std::string thread_text(int index);

// runtime.cpp: makes this thread wait; makes another one runnable again; lets other threads run.
void wait_at(const char* what, Where where);
void release(int thread);
void yield_from(int me);

// counting.cpp: notes an access of one lane; closes all open instructions at a barrier; counts the access of a warp.
void gather(uint64_t address, int bytes, Kind kind, bool active, Where where);
void flush_logs();
void count_shared(SiteCount& site, const uint64_t* address, uint32_t active, int bytes);
SiteCount& count_of(int site);
void keep_counters();
Buffer* buffer_of(const void* p);

// hopper.cpp: fails where an asynchronous access meets a write without a fence_async, or a copy meets such a read.
void expect_fenced(const History& h, uint32_t at, const char* doing, Where where);
void expect_reads_fenced(const History& h, uint32_t at, Where where);

// wgmma.cpp: fails if one of these registers of this thread is operand a of a product in flight.
void expect_free(const void* registers, int words, const char* doing, Where where);

// memory.cpp: the rules of shared memory.
uint32_t time_of(int warp);
void check_bounds(uint32_t at, int bytes, Where where);
void check_read(uint32_t at, int bytes, Where where);
void check_write(uint32_t at, int bytes, Where where, State state, Kind kind);
Read& note_read(History& h, int me, uint32_t time);
bool ordered(int thread, uint32_t time);
bool ordered_for(int warp, int thread, uint32_t time);
void race(Where where, uint32_t at, const char* mine, const char* theirs, int thread, int site);
std::string site_text(int site);
void join_clocks();
std::string unwritten(const Buffer& buffer);

}  // namespace emulator
