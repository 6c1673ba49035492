// The machine's constants, its blocks' start, and the loop over its cycles.

#include "machine.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace sm {

namespace {

MemoryConstants memory_constants(const Constants& c, double clock, double shared_in_use, double launch_bytes) {
  MemoryConstants m{};
  m.queue_interval = c.at("queue_interval");
  m.queue_interval_sm = c.at("queue_interval_sm");
  m.queue_depth = c.at("queue_depth");
  m.sector_bytes = 32;
  m.port_bytes = c.at("l2_port_bytes");
  m.l2_bytes_per_cycle = c.at("l2_bytes_per_cycle");
  m.l2_bytes = c.at("l2_bytes");
  m.l1_latency = c.at("l1_latency");
  m.l2_latency = c.at("l2_latency");
  m.l2_far_extra = c.at("l2_far_extra");
  m.dram_extra = c.at("dram_extra_seconds") * clock;
  m.dram_read = c.at("dram_read_bandwidth") / clock;
  m.dram_write = c.at("dram_write_bandwidth") / clock;
  m.l1_bytes = std::max(0.0, c.at("l1_and_shared_bytes") - shared_in_use);
  m.bulk_interval = c.at("bulk_issue_interval");
  m.bulk_extra = c.at("bulk_extra_latency");
  m.bulk_lines = c.at("bulk_lines_in_flight");
  m.launch_bytes = launch_bytes;
  return m;
}

}  // namespace

const std::vector<std::string>& Machine::names() {
  static const std::vector<std::string> all = {"queue_interval",      "queue_interval_sm",
                                               "queue_depth",         "l2_port_bytes",
                                               "l2_bytes_per_cycle",  "l2_bytes",
                                               "l1_latency",          "l2_latency",
                                               "l2_far_extra",        "dram_extra_seconds",
                                               "dram_read_bandwidth", "dram_write_bandwidth",
                                               "l1_and_shared_bytes", "bulk_issue_interval",
                                               "bulk_extra_latency",  "bulk_lines_in_flight",
                                               "taken_branch",        "yield_cycles",
                                               "overlong_stall",      "barrier_release",
                                               "phase_arrive",        "phase_pass",
                                               "phase_release",       "product_tail",
                                               "product_queue",       "product_queue_registers",
                                               "operand_window",      "atomic_extra",
                                               "bulk_read_release",   "block_replacement"};
  return all;
}

Machine::Machine(const Constants& constants, double clock, const std::vector<Row>& rows, const Footprint& footprint,
                 const uint64_t* sectors, size_t sector_count, double shared_in_use, double launch_bytes)
    : constants_(constants),
      rows_(rows),
      sectors_(sectors),
      sector_count_(sector_count),
      memory_(memory_constants(constants, clock, shared_in_use, launch_bytes), &footprint) {
  taken_branch_ = constant("taken_branch");
  yield_ = constant("yield_cycles");
  overlong_stall_ = constant("overlong_stall");
  barrier_release_ = constant("barrier_release");
  phase_arrive_ = constant("phase_arrive");
  phase_pass_ = constant("phase_pass");
  phase_release_ = constant("phase_release");
  product_tail_ = constant("product_tail");
  product_queue_ = constant("product_queue");
  product_queue_registers_ = constant("product_queue_registers");
  read_window_ = constant("operand_window");
  atomic_extra_ = constant("atomic_extra");
  bulk_read_release_ = constant("bulk_read_release");
}

void Machine::fail(const Warp& warp, const std::string& what) const {
  size_t at = std::min(warp.step, warp.trace->count - 1);
  throw std::runtime_error("block " + std::to_string((*traces_)[blocks_[warp.block].position].index) + ", warp " +
                           std::to_string(warp.index) + ", instruction " +
                           std::to_string(warp.trace->steps[at].instruction) + ": " + what);
}

const Event& Machine::event(const Warp& warp) const {
  if (warp.event >= warp.trace->event_count || warp.trace->events[warp.event].step != warp.step) {
    fail(warp, "expected the trace to say what this instruction accesses, it does not");
  }
  return warp.trace->events[warp.event];
}

const uint64_t* Machine::sectors(const Event& e) const {
  if (static_cast<size_t>(e.first) + e.sectors > sector_count_) {
    throw std::runtime_error("expected an event's sectors within the trace's " + std::to_string(sector_count_) +
                             ", got " + std::to_string(e.first) + " + " + std::to_string(e.sectors));
  }
  return sectors_ + e.first;
}

// Notes that warp `w` spent its time until `to` for `reason`.
void Machine::account(int w, int64_t to, Reason reason) {
  Warp& p = warps_[w];
  if (to <= p.since) return;
  int at = static_cast<int>(p.trace->steps[std::min(p.step, p.trace->count - 1)].instruction);
  result_.waits[static_cast<int>(reason)] += to - p.since;
  result_.by_instruction[at][static_cast<int>(reason)] += to - p.since;
  if (blocks_[p.block].position == shape_->watched) {
    auto& line = result_.timeline;
    Segment part{p.since, to, p.index, at, static_cast<int32_t>(reason), 0};
    bool joined = false;
    for (auto it = line.rbegin(); it != line.rend() && it - line.rbegin() < 64; ++it) {
      if (it->warp != part.warp) continue;
      if (it->end == part.start && it->reason == part.reason && it->instruction == at) it->end = to, joined = true;
      break;
    }
    if (!joined) line.push_back(part);
  }
  p.since = to;
}

void Machine::start_block(int64_t now) {
  const BlockTrace& trace = (*traces_)[next_block_];
  int b = static_cast<int>(blocks_.size());
  blocks_.emplace_back();
  Block& block = blocks_.back();
  block.position = static_cast<int>(next_block_++);
  block.round = trace.round;
  block.alive = static_cast<int>(trace.warps.size());
  block.groups.resize((trace.warps.size() + 3) / 4);
  block.start = now;
  result_.starts[block.position] = now;
  resident_ += 1;
  if (block.round < last_round_) resident_full_ += 1;
  memory_.share(resident_full_ > 0 || next_block_ < traces_->size() ? shape_->active : shape_->active_last);
  for (size_t i = 0; i < trace.warps.size(); ++i) {
    int s = 0;
    for (int other = 1; other < kSchedulers; ++other) {
      if (lists_[other].size() < lists_[s].size()) s = other;
    }
    int w = static_cast<int>(warps_.size());
    warps_.emplace_back();
    Warp& p = warps_.back();
    p.trace = &trace.warps[i];
    if (p.trace->count == 0)
      throw std::runtime_error("expected every warp of a block to execute something, one has no steps");
    p.block = b;
    p.index = static_cast<int>(i);
    p.scheduler = s;
    p.ready = p.since = now;
    until_.push_back(now);
    lists_[s].push_back(w);
    block.warps.push_back(w);
  }
}

Result Machine::run(const std::vector<BlockTrace>& blocks, const LaunchShape& shape) {
  traces_ = &blocks;
  shape_ = &shape;
  result_.starts.assign(blocks.size(), 0);
  result_.ends.assign(blocks.size(), 0);
  result_.by_instruction.resize(rows_.size());
  result_.executed.resize(rows_.size());
  greedy_.fill(-1);
  last_round_ = blocks.empty() ? 0 : blocks.back().round;
  blocks_.reserve(blocks.size());
  memory_.share(shape.active);
  int64_t now = 0, last = 0;
  while (next_block_ < blocks.size() || resident_ > 0) {
    int64_t next = kNever;
    if (next_block_ < blocks.size() && resident_ < shape.resident) {
      int64_t due = dispatch_free_;
      if (static_cast<int>(next_block_) < shape.resident) {
        due = static_cast<int64_t>(shape.first_block + shape.between_blocks * static_cast<double>(next_block_));
      }
      if (due <= now) {
        start_block(now);
        continue;
      }
      next = due;
    }
    bool issued = false;
    for (int s = 0; s < kSchedulers; ++s) {
      // The same warp again if it can, else the youngest that can.
      int chosen = -1, greedy = greedy_[s];
      if (greedy >= 0 && until_[greedy] <= now && check(greedy, now)) chosen = greedy;
      if (chosen < 0) {
        for (auto it = lists_[s].rbegin(); it != lists_[s].rend(); ++it) {
          if (*it == greedy || until_[*it] > now) continue;
          if (check(*it, now)) {
            chosen = *it;
            break;
          }
        }
      }
      if (chosen >= 0) {
        greedy_[s] = chosen;
        issue(chosen, now);
        issued = true;
        last = now;
      }
    }
    if (issued) {
      now += 1;
      continue;
    }
    for (int s = 0; s < kSchedulers; ++s) {
      for (int w : lists_[s]) next = std::min(next, until_[w]);
    }
    if (next >= kNever) {
      std::string where;
      int shown = 0;
      for (const Warp& p : warps_) {
        if (p.done || shown++ == 8) continue;
        where += "\n  warp " + std::to_string(p.index) + " of block " +
                 std::to_string(blocks[blocks_[p.block].position].index) + " before instruction " +
                 std::to_string(p.trace->steps[std::min(p.step, p.trace->count - 1)].instruction) + " waits for " +
                 name(p.reason);
      }
      throw std::runtime_error("expected some warp to go on, all of them wait for each other:" + where);
    }
    now = std::max(now + 1, next);
  }
  result_.cycles = last + 1;
  result_.drained = std::max(result_.cycles, static_cast<int64_t>(std::ceil(memory_.last_store)));
  result_.shared = memory_.shared.taken();
  result_.port = memory_.port.taken();
  result_.outward = memory_.outward.taken();
  result_.dram = memory_.dram.taken();
  result_.dram_read = memory_.dram_read_bytes;
  result_.dram_write = memory_.dram_write_bytes;
  result_.l2_read = memory_.l2_read_bytes;
  result_.l2_write = memory_.l2_write_bytes;
  result_.l1_hit = memory_.l1_hit_bytes;
  return result_;
}

}  // namespace sm
