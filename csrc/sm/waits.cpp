// What warps wait for together: barriers, the phases of mbarriers, and the products of a warpgroup.

#include "machine.h"

#include <algorithm>
#include <cmath>

namespace sm {

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

}  // namespace sm
