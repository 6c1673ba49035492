#include "machine.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace sm {

namespace {

constexpr int kTaken = static_cast<int>(Pipe::kFmaHeavy);

const char* const kReasonNames[] = {"issue",  "fixed",   "branch", "other",  "pipe", "registers",
                                    "queue",  "special", "shared", "l1",     "l2",   "dram",
                                    "copies", "barrier", "phase",  "tensor", "fence"};
const char* const kPipeNames[] = {"none",   "alu",     "fma",    "fma_heavy", "half", "special",
                                  "double", "uniform", "branch", "tensor",    "queue"};
const char* const kActionNames[] = {"plain",        "variable",   "branch",         "load",        "store",
                                    "atomic",       "copy",       "copy_group",     "copy_arrive", "scoreboard_wait",
                                    "shared",       "barrier",    "barrier_arrive", "phase_init",  "phase_arrive",
                                    "phase_wait",   "bulk_load",  "bulk_store",     "bulk_commit", "product",
                                    "group_arrive", "group_wait", "fence",          "exit"};
static_assert(std::size(kReasonNames) == kReasons && std::size(kPipeNames) == kPipes &&
              std::size(kActionNames) == static_cast<int>(Action::kCount));

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

const char* name(Reason reason) {
  return kReasonNames[static_cast<int>(reason)];
}
const char* name(Pipe pipe) {
  return kPipeNames[static_cast<int>(pipe)];
}
const char* name(Action action) {
  return kActionNames[static_cast<int>(action)];
}

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

// Lets a held warp go at `time`; or, if it is not held, has it looked at again then.
void Machine::wake(int w, double time, Reason reason) {
  Warp& p = warps_[w];
  p.held = false;
  p.reason = reason;
  p.ready = std::max(p.ready, static_cast<int64_t>(std::ceil(time)));
  p.ready_reason = reason;
  until_[w] = p.ready;
}

void Machine::complete_barrier(Block& block, Barrier& barrier) {
  int64_t expected = barrier.expected ? barrier.expected : block.alive;
  if (barrier.arrived < expected || barrier.arrived == 0) return;
  double at = barrier.time + barrier_release_;
  for (int w : barrier.waiting) wake(w, at, Reason::kBarrier);
  barrier = Barrier{};
}

void Machine::complete_phase(Block&, Phase& phase) {
  while (phase.pending <= 0 && phase.bytes == 0 && phase.count > 0) {
    phase.completed = phase.latest;
    phase.latest = 0;
    phase.phase += 1;
    phase.pending += phase.count;
    double at = phase.completed + phase_release_;
    for (const Phase::Waiter& waiter : phase.waiting) {
      if (waiter.scoreboard == kNoScoreboard) {
        wake(waiter.warp, at, Reason::kPhase);
      } else {
        for (Open& open : warps_[waiter.warp].open[waiter.scoreboard]) {
          if (open.time >= kNever && open.reason == Reason::kPhase) {
            open.time = at;
            break;
          }
        }
        if (until_[waiter.warp] >= kNever) until_[waiter.warp] = warps_[waiter.warp].since;
      }
    }
    phase.waiting.clear();
  }
}

// All four warps have issued a product: it takes the tensor cores after those before it, reads its operands on the way.
void Machine::schedule_product(Block& block, Group& group, Product& product, const Row& row) {
  double begin = std::max(product.ready, tensor_free_);
  double end = begin + row.tensor;
  // Operands are read while the product before is computed.
  double read = std::max(product.ready, begin - std::max(row.tensor, row.operands));
  end = std::max(end, memory_.shared.spread(read, row.operands, row.tensor));
  tensor_free_ = end;
  result_.tensor += row.tensor;
  product.end = end;
  if (row.commits) group.commits.push_back(end + product_tail_);
  size_t g = static_cast<size_t>(&group - block.groups.data());
  for (size_t i = 4 * g; i < std::min(block.warps.size(), 4 * g + 4); ++i) {
    int w = block.warps[i];
    if (!warps_[w].held && until_[w] >= kNever) until_[w] = warps_[w].since;
  }
}

bool Machine::check(int w, int64_t now) {
  Warp& p = warps_[w];
  auto wait = [&](double until, Reason reason) {
    // What it waited for until now, and from now on.
    int64_t told = std::min(until_[w], now);
    account(w, told, p.reason);
    account(w, now, reason);
    p.reason = reason;
    until_[w] = until >= kNever ? kNever : std::max(now + 1, static_cast<int64_t>(std::ceil(until)));
    return false;
  };
  if (now < p.ready) return wait(static_cast<double>(p.ready), p.ready_reason);
  const Step& step = p.trace->steps[p.step];
  const Row& row = rows_[step.instruction];
  double until = 0;
  Reason why = Reason::kFixed;
  for (int b = 0; b < 6; ++b) {
    if (!(row.wait >> b & 1)) continue;
    auto& open = p.open[b];
    open.erase(std::remove_if(open.begin(), open.end(), [&](const Open& o) { return o.time <= now; }), open.end());
    for (const Open& o : open) {
      if (o.time > until) until = o.time, why = o.reason;
    }
  }
  if (until > now) return wait(until, why);
  if (step.lanes == 0) return true;
  auto action = static_cast<Action>(row.action);
  Block& block = blocks_[p.block];
  switch (action) {
    case Action::kScoreboardWait: {
      auto& open = p.open[row.scoreboard];
      open.erase(std::remove_if(open.begin(), open.end(), [&](const Open& o) { return o.time <= now; }), open.end());
      int over = static_cast<int>(open.size()) - row.immediate;
      if (over > 0) {
        std::vector<Open> sorted = open;
        std::sort(sorted.begin(), sorted.end(), [](const Open& a, const Open& b) { return a.time < b.time; });
        return wait(sorted[over - 1].time, sorted[over - 1].reason);
      }
      break;
    }
    case Action::kProduct: {
      const auto& products = block.groups[p.index / 4].products;
      int before = p.products - static_cast<int>(row.registers ? product_queue_registers_ : product_queue_);
      if (before >= 0 && products[before].end > now) return wait(products[before].end, Reason::kTensor);
      break;
    }
    case Action::kGroupWait: {
      const auto& commits = block.groups[p.index / 4].commits;
      int needed = p.commits - row.immediate;
      if (needed > static_cast<int>(commits.size())) return wait(static_cast<double>(kNever), Reason::kTensor);
      double last = 0;
      for (int i = std::max(0, needed - 8); i < needed; ++i) last = std::max(last, commits[i]);
      if (last > now) return wait(last, Reason::kTensor);
      break;
    }
    case Action::kFence:
      if (row.immediate && p.stores > now) return wait(p.stores, Reason::kFence);
      break;
    default:
      break;
  }
  int s = p.scheduler;
  if (row.interval > 0) {
    auto pipe = static_cast<Pipe>(row.pipe);
    double free = pipe == Pipe::kFma     ? std::min(pipe_free_[s][kTaken], lite_free_[s])
                  : pipe == Pipe::kQueue ? memory_.queue_free(s)
                                         : pipe_free_[s][row.pipe];
    // A pipe with a rate that is no whole number of cycles takes the next instruction in the cycle in which it is free.
    if (free >= now + 1) return wait(std::floor(free), pipe == Pipe::kQueue ? Reason::kQueue : Reason::kPipe);
    if (pipe == Pipe::kQueue && free > now) return wait(free, Reason::kQueue);
  }
  for (int bank = 0; bank < 2; ++bank) {
    int reads = bank ? row.odd : row.even;
    double busy = std::max(0.0, bank_free_[s][bank] - now) + reads;
    if (reads && busy > std::max(read_window_, static_cast<double>(reads))) {
      return wait(now + busy - read_window_, Reason::kRegisters);
    }
  }
  return true;
}

void Machine::issue(int w, int64_t now) {
  Warp& p = warps_[w];
  account(w, std::min(until_[w], now), p.reason);
  account(w, now, Reason::kOther);
  account(w, now + 1, Reason::kIssue);
  const Step step = p.trace->steps[p.step];
  const Row& row = rows_[step.instruction];
  int s = p.scheduler;
  Block& block = blocks_[p.block];
  result_.issued += 1;
  result_.executed[step.instruction] += 1;

  double stall = std::max<double>(row.stall, 1);
  if (row.yields) {
    stall = row.stall > 11 ? overlong_stall_ : std::max(stall, yield_);
  }
  p.ready = now + static_cast<int64_t>(stall);
  p.ready_reason = Reason::kFixed;
  double result = 0, released = now + row.release;
  Reason why = Reason::kSpecial;

  bool has_event = p.event < p.trace->event_count && p.trace->events[p.event].step == p.step;
  if (step.lanes) {
    for (int bank = 0; bank < 2; ++bank) {
      int reads = bank ? row.odd : row.even;
      if (reads) bank_free_[s][bank] = std::max<double>(bank_free_[s][bank], static_cast<double>(now)) + reads;
    }
    auto pipe = static_cast<Pipe>(row.pipe);
    if (row.interval > 0 && pipe != Pipe::kQueue) {
      double* free = &pipe_free_[s][row.pipe];
      if (pipe == Pipe::kFma) {
        free = &pipe_free_[s][kTaken];
        if (lite_free_[s] < *free) free = &lite_free_[s];
      }
      *free = std::max(*free, static_cast<double>(now)) + row.interval;
      result_.pipes[row.pipe] += row.interval;
    }
    switch (static_cast<Action>(row.action)) {
      case Action::kPlain:
      case Action::kExit:
      case Action::kGroupWait:
      case Action::kScoreboardWait:
      case Action::kCount:
        break;
      case Action::kVariable:
        result = now + row.latency;
        if (pipe == Pipe::kQueue) result = memory_.enter(s, now, row.interval) - row.interval + row.latency;
        break;
      case Action::kBranch: {
        bool taken = p.step + 1 < p.trace->count && p.trace->steps[p.step + 1].instruction != step.instruction + 1;
        if (taken) {
          p.ready += static_cast<int64_t>(taken_branch_);
          p.ready_reason = Reason::kBranch;
        }
        break;
      }
      case Action::kLoad: {
        const Event& e = event(p);
        double waves = std::max<double>(1, e.wavefronts), end = memory_.enter(s, now, waves), begin = end - waves;
        Arrival a = memory_.load(begin, sectors(e), e.sectors, block.round, !row.bypass);
        result = std::max(a.time, begin + constants_.at("l1_latency") + waves - 1) + row.latency;
        released = begin + row.release;
        why = a.reason;
        break;
      }
      case Action::kStore: {
        const Event& e = event(p);
        double waves = std::max<double>(1, e.wavefronts), end = memory_.enter(s, now, waves);
        p.stores = std::max(p.stores, memory_.store(end, sectors(e), e.sectors, block.round));
        released = end - waves + row.release;
        break;
      }
      case Action::kAtomic: {
        const Event& e = event(p);
        double waves = std::max<double>(1, e.wavefronts), end = memory_.enter(s, now, waves);
        double there = memory_.store(end, sectors(e), e.sectors, block.round);
        p.stores = std::max(p.stores, there);
        result = there + constants_.at("l2_latency") / 2 + atomic_extra_;
        released = end - waves + row.release;
        why = Reason::kL2;
        break;
      }
      case Action::kCopy: {
        const Event& e = event(p);
        double begin = memory_.enter(s, now, 0);  // shared memory is written when the data comes
        Arrival a = memory_.load(begin, sectors(e), e.sectors, block.round, !row.bypass);
        result = memory_.shared.take(a.time, std::max<double>(1, e.wavefronts));
        released = begin + row.release;
        why = Reason::kCopies;
        p.copies = std::max(p.copies, result);
        break;
      }
      case Action::kCopyGroup:
        p.copies_before = std::max({p.copies_before, p.copies, static_cast<double>(now)});
        p.copies = 0;
        p.open[row.scoreboard].push_back({p.copies_before, Reason::kCopies});
        break;
      case Action::kShared: {
        const Event& e = event(p);
        double waves = std::max<double>(1, e.wavefronts), end = memory_.enter(s, now, waves);
        result = end - 1 + row.latency;
        released = end - waves + row.release;
        why = Reason::kShared;
        break;
      }
      case Action::kBarrier:
      case Action::kBarrierArrive: {
        const Event& e = event(p);
        Barrier& b = block.barriers[e.value & 255];
        b.expected = (e.value >> 8) / 32;
        b.arrived += 1;
        b.time = std::max(b.time, static_cast<double>(now));
        if (static_cast<Action>(row.action) == Action::kBarrier) {
          b.waiting.push_back(w);
          p.held = true;
        }
        break;
      }
      case Action::kPhaseInit: {
        const Event& e = event(p);
        Phase fresh;
        fresh.count = fresh.pending = e.value;
        block.phases[e.address] = fresh;
        result = now + row.latency;
        break;
      }
      case Action::kPhaseArrive:
      case Action::kCopyArrive: {
        const Event& e = event(p);
        Phase& phase = block.phases[e.address];
        bool copies = static_cast<Action>(row.action) == Action::kCopyArrive;
        phase.pending -= __builtin_popcount(step.lanes);
        phase.bytes += e.value;
        double at = copies ? std::max({p.copies, p.copies_before, static_cast<double>(now)}) : static_cast<double>(now);
        phase.latest = std::max(phase.latest, at + phase_arrive_);
        result = now + row.latency;
        break;
      }
      case Action::kPhaseWait: {
        const Event& e = event(p);
        Phase& phase = block.phases[e.address];
        why = Reason::kPhase;
        if ((phase.phase & 1) != (e.value & 1)) {
          result = std::max<double>(now + phase_pass_, phase.completed + phase_release_);
          if (row.write == kNoScoreboard) p.ready = std::max(p.ready, static_cast<int64_t>(result));
        } else {
          result = static_cast<double>(kNever);
          phase.waiting.push_back({w, row.write});
          if (row.write == kNoScoreboard) p.held = true;
        }
        break;
      }
      case Action::kBulkLoad: {
        const Event& e = event(p);
        Arrival a =
            memory_.bulk_load(static_cast<double>(now), sectors(e), e.sectors, block.round, (e.bytes + 127) / 128);
        Phase& phase = block.phases[e.address];
        phase.bytes -= e.bytes;
        phase.latest = std::max(phase.latest, a.time);
        released = now + bulk_read_release_;
        complete_phase(block, phase);
        break;
      }
      case Action::kBulkStore: {
        const Event& e = event(p);
        double read = 0;
        double there = memory_.bulk_store(static_cast<double>(now), sectors(e), e.sectors, block.round,
                                          (e.bytes + 127) / 128, &read);
        p.stores = std::max(p.stores, there);
        p.bulk_read = std::max(p.bulk_read, read);
        released = now + bulk_read_release_;
        break;
      }
      case Action::kBulkCommit:
        p.open[row.scoreboard].push_back({std::max(p.bulk_read, static_cast<double>(now)), Reason::kShared});
        break;
      case Action::kProduct: {
        size_t g = p.index / 4;
        if (4 * g + 4 > block.warps.size()) fail(p, "expected a product to be issued by four warps of one warpgroup");
        Group& group = block.groups[g];
        if (p.products == static_cast<int>(group.products.size())) group.products.emplace_back();
        Product& product = group.products[p.products++];
        product.ready = std::max(product.ready, static_cast<double>(now));
        if (row.commits) p.commits += 1;
        if (++product.arrived == 4) schedule_product(block, group, product, row);
        break;
      }
      case Action::kGroupArrive: {
        size_t g = p.index / 4;
        if (4 * g + 4 > block.warps.size()) fail(p, "expected WARPGROUP.ARRIVE in a warpgroup of four warps");
        Group& group = block.groups[g];
        group.arrived_at = std::max(group.arrived_at, static_cast<double>(now));
        if (++group.arrived < 4) {
          group.waiting.push_back(w);
          p.held = true;
        } else {
          for (int other : group.waiting) wake(other, group.arrived_at + stall, Reason::kTensor);
          group.waiting.clear();
          group.arrived = 0;
          group.arrived_at = 0;
        }
        break;
      }
      case Action::kFence:
        p.ready = std::max(p.ready, now + static_cast<int64_t>(row.latency));
        p.ready_reason = Reason::kFence;
        result = now + row.latency;
        why = Reason::kFence;
        break;
    }
    if (result == 0) result = now + row.latency;
    if (row.write != kNoScoreboard) p.open[row.write].push_back({result, why});
    if (row.read != kNoScoreboard) p.open[row.read].push_back({released, Reason::kQueue});
  }
  uint64_t address = has_event ? p.trace->events[p.event].address : 0;
  int64_t value = has_event ? p.trace->events[p.event].value : 0;
  if (has_event) p.event += 1;
  p.step += 1;
  p.reason = p.ready_reason;
  until_[w] = p.held ? kNever : p.ready;
  if (step.lanes) {
    // Only now that this warp is held as the others are, for these may let it go.
    auto action = static_cast<Action>(row.action);
    if (action == Action::kBarrier || action == Action::kBarrierArrive) {
      p.reason = p.held ? Reason::kBarrier : p.reason;
      complete_barrier(block, block.barriers[value & 255]);
    } else if (action == Action::kPhaseArrive || action == Action::kCopyArrive) {
      complete_phase(block, block.phases[address]);
    } else if (p.held) {
      p.reason = action == Action::kPhaseWait ? Reason::kPhase : Reason::kTensor;
    }
  }
  if (p.step == p.trace->count) {
    p.done = true;
    p.held = false;
    until_[w] = kNever;
    auto& list = lists_[s];
    list.erase(std::find(list.begin(), list.end(), w));
    if (greedy_[s] == w) greedy_[s] = -1;
    block.alive -= 1;
    for (auto& [id, barrier] : block.barriers) {
      if (barrier.arrived && !barrier.expected) complete_barrier(block, barrier);
    }
    if (block.alive == 0) {
      result_.ends[block.position] = now + 1;
      resident_ -= 1;
      if (block.round < last_round_) resident_full_ -= 1;
      memory_.share(resident_full_ > 0 || next_block_ < traces_->size() ? shape_->active : shape_->active_last);
      dispatch_free_ = std::max(dispatch_free_, now + static_cast<int64_t>(constant("block_replacement")));
    }
  }
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
