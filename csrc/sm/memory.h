// What lies between an SM's warps and DRAM: its L1 and shared memory, its part of L2's and of DRAM's bandwidth.
//
// Each level is a latency and a Calendar. A kernel reaches a level's bandwidth only with as many bytes on their way as
// latency times bandwidth: that follows from the two, and is stated nowhere.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <unordered_map>
#include <vector>

#include "calendar.h"
#include "code.h"
#include "footprint.h"

namespace sm {

struct MemoryConstants {
  double queue_interval, queue_interval_sm, queue_depth;
  double shared_bytes, sector_bytes, port_bytes, l2_bytes_per_cycle, l2_bytes;
  double l1_latency, l2_latency, l2_far_extra,
      dram_extra;                // from the issue to the result, of the level; dram_extra on top
  double dram_read, dram_write;  // bytes per cycle of the whole GPU
  double l1_bytes;
  double bulk_interval, bulk_extra, bulk_lines;
  double launch_bytes;  // that the whole launch touches
};

// When something will have happened, and what it was that took so long.
struct Arrival {
  double time = 0;
  Reason reason = Reason::kL1;
};

class Memory {
 public:
  Memory(const MemoryConstants& constants, const Footprint* footprint) : c(constants), footprint_(footprint) {
  }

  // How many SMs share L2 and DRAM now.
  void share(double active) {
    active_ = active;
  }

  // The time from which a scheduler's queue takes another instruction.
  double queue_free(int scheduler) const {
    const auto& q = queue_[scheduler];
    size_t depth = static_cast<size_t>(c.queue_depth);
    return q.size() < depth ? 0 : q[q.size() - depth];
  }
  // Puts an instruction with so many wavefronts into the queue at `now`. Returns when the last of them is served.
  double enter(int scheduler, double now, double wavefronts);

  Arrival load(double now, const uint64_t* sectors, size_t count, int round, bool keep);
  double store(double now, const uint64_t* sectors, size_t count, int round);
  Arrival bulk_load(double now, const uint64_t* sectors, size_t count, int round, double wavefronts);
  double bulk_store(double now, const uint64_t* sectors, size_t count, int round, double wavefronts, double* read);

  Calendar shared;   // wavefronts of 128 bytes: shared memory and L1's data
  Calendar port;     // what comes from L2
  Calendar outward;  // what goes to L2
  Calendar dram;     // this SM's part
  double dram_read_bytes = 0, dram_write_bytes = 0, l2_read_bytes = 0, l2_write_bytes = 0, l1_hit_bytes = 0;
  double last_store = 0;

 private:
  Arrival fetch(double at_l2, uint64_t sector, int round);

  struct Line {
    double time = 0;
    Reason reason = Reason::kL1;
  };
  const MemoryConstants c;
  const Footprint* footprint_;
  double active_ = 1;
  std::array<std::deque<double>, 4> queue_;  // when each entry leaves
  std::array<double, 4> scheduler_free_{};
  double sm_free_ = 0;
  std::unordered_map<uint64_t, Line> l1_;
  std::deque<uint64_t> l1_order_;
  double bulk_free_ = 0;
  std::deque<double> bulk_flying_;  // when each line of 128 bytes arrives
};

}  // namespace sm
