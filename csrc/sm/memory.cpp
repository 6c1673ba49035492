#include "memory.h"

#include <stdexcept>
#include <string>

namespace sm {

// From this sector on lies local memory, which is taken to stay in L1.
constexpr uint64_t kLocal = uint64_t{1} << 52;

double Memory::enter(int scheduler, double now, double wavefronts) {
  auto& q = queue_[scheduler];
  while (!q.empty() && q.front() <= now) q.pop_front();
  double begin = std::max({now, scheduler_free_[scheduler], sm_free_});
  double end = shared.take(begin, wavefronts);
  // The entry leaves when its first wavefront is served: so a shared memory that is behind fills the queues.
  double leaves = std::max(begin, end - wavefronts);
  scheduler_free_[scheduler] = leaves + c.queue_interval;
  sm_free_ = std::max(sm_free_, begin + c.queue_interval_sm);
  q.push_back(leaves);
  return end;
}

Arrival Memory::fetch(double at_l2, uint64_t sector, int round) {
  Footprint::Served served = footprint_->find(sector, round, c.l2_bytes);
  if (!served.known) {
    throw std::invalid_argument("expected every sector that a block touches in the launch's footprint, sector " +
                                std::to_string(sector) + " is not; add the blocks of round " + std::to_string(round));
  }
  Arrival out{at_l2, Reason::kL2};
  bool odd = (sector >> 7) * 0x9E3779B97F4A7C15ull >> 63;  // its home is the other half of L2
  bool spread = c.launch_bytes > c.l2_bytes / 2;
  if (served.dram) {
    double bytes = c.sector_bytes / served.share;
    double ready = dram.take(at_l2, bytes * active_ / c.dram_read);
    dram_read_bytes += bytes;
    out = {ready + c.dram_extra, Reason::kDram};
  }
  if (odd && (served.dram || spread)) out.time += c.l2_far_extra;
  out.time = port.take(out.time, c.sector_bytes / std::min(c.port_bytes, c.l2_bytes_per_cycle / active_));
  l2_read_bytes += c.sector_bytes;
  return out;
}

Arrival Memory::load(double now, const uint64_t* sectors, size_t count, int round, bool keep) {
  Arrival out{now + c.l1_latency, Reason::kL1};
  double half = c.l2_latency / 2;
  for (size_t i = 0; i < count; ++i) {
    if (sectors[i] >= kLocal) continue;
    auto found = l1_.find(sectors[i]);
    if (keep && found != l1_.end()) {
      l1_hit_bytes += c.sector_bytes;
      if (found->second.time > out.time) out = {found->second.time, found->second.reason};
      continue;
    }
    Arrival a = fetch(now + half, sectors[i], round);
    a.time += half;
    if (a.time > out.time) out = a;
    if (keep) {
      l1_[sectors[i]] = {a.time, a.reason};
      l1_order_.push_back(sectors[i]);
      while (l1_order_.size() * c.sector_bytes > c.l1_bytes) {
        l1_.erase(l1_order_.front());
        l1_order_.pop_front();
      }
    }
  }
  return out;
}

double Memory::store(double now, const uint64_t* sectors, size_t count, int round) {
  double end = now;
  for (size_t i = 0; i < count; ++i) {
    if (sectors[i] >= kLocal) continue;
    Footprint::Served served = footprint_->find(sectors[i], round, c.l2_bytes);
    double share = served.known ? served.share : 1;
    end = outward.take(now, c.sector_bytes / std::min(c.port_bytes, c.l2_bytes_per_cycle / active_)) + c.l2_latency / 2;
    l2_write_bytes += c.sector_bytes;
    // What fits into L2 stays there: DRAM gets it after the launch.
    if (c.launch_bytes > c.l2_bytes) {
      end = std::max(end, dram.take(end, c.sector_bytes / share * active_ / c.dram_write));
      dram_write_bytes += c.sector_bytes / share;
    }
    last_store = std::max(last_store, end);
  }
  return end;
}

Arrival Memory::bulk_load(double now, const uint64_t* sectors, size_t count, int round, double wavefronts) {
  double begin = std::max(now, bulk_free_), half = c.l2_latency / 2;
  double lines = std::max(1.0, wavefronts);
  Arrival out{begin, Reason::kCopies};
  double issue = begin, last = begin;
  for (double line = 0; line < lines; ++line) {
    // One line of 128 bytes a cycle, and no more of them on their way than the engine keeps account of.
    while (bulk_flying_.size() >= static_cast<size_t>(c.bulk_lines)) {
      issue = std::max(issue, bulk_flying_.front());
      bulk_flying_.pop_front();
    }
    size_t first = static_cast<size_t>(line * count / lines), past = static_cast<size_t>((line + 1) * count / lines);
    double arrives = issue + c.l2_latency;  // a line that lies outside the tensor is filled with zeros
    for (size_t i = first; i < past; ++i) {
      arrives = std::max(arrives, fetch(issue + c.bulk_extra + half, sectors[i], round).time + half);
    }
    arrives = shared.take(arrives, wavefronts / lines);
    bulk_flying_.push_back(arrives);
    last = std::max(last, arrives);
    issue += 1;
  }
  bulk_free_ = std::max(begin + c.bulk_interval, issue);
  out.time = last;
  return out;
}

double Memory::bulk_store(double now, const uint64_t* sectors, size_t count, int round, double wavefronts,
                          double* read) {
  double begin = std::max(now, bulk_free_);
  *read = shared.take(begin, wavefronts);
  bulk_free_ = std::max(begin + c.bulk_interval, begin + wavefronts);
  return store(*read, sectors, count, round);
}

}  // namespace sm
