// When a warp's next instruction can issue, and what it holds and starts as it does.

#include "machine.h"

#include <algorithm>
#include <cmath>

namespace sm {

namespace {

constexpr int kTaken = static_cast<int>(Pipe::kFmaHeavy);

}  // namespace

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

}  // namespace sm
