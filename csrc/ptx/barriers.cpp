// Barriers of a block and of a warp: bar, barrier, and the fences that order weak memory.

#include "families.h"
#include "machine.h"
#include "members.h"

namespace ptx {
namespace {

enum Kind : uint32_t { kSync, kArrive, kCount, kAnd, kOr };

int threads_alive(const Block& b) {
  int warps = 0;
  for (const Warp& w : b.warps) warps += !w.done;
  return warps * kWarp;
}

// Lets the waiting warps go on if all that the barrier expects have arrived. Those without a number expect every warp
// that has not left the kernel.
void complete(Block& b, NamedBarrier& barrier) {
  const int expected = barrier.expected != 0 ? barrier.expected : threads_alive(b);
  if (barrier.arrived == 0 || barrier.arrived < expected) return;
  ++barrier.generation;
  barrier.last_count = barrier.count;
  barrier.last_lanes = barrier.lanes;
  for (Warp& w : b.warps)
    if (barrier.warps >> w.index & 1) b.shared.learn(w.index, barrier.past);
  barrier.arrived = barrier.count = barrier.lanes = 0;
  barrier.warps = 0;
  barrier.past = Clock{};
  barrier.first = nullptr;
  b.launch->counters.events["barriers"] += 1;
}

bool is_over(Warp& w) {
  NamedBarrier& barrier = w.block->barriers[w.wait.detail];
  complete(*w.block, barrier);
  if (barrier.generation == static_cast<uint32_t>(w.wait.more)) return false;
  w.block->shared.advance(w.index);
  return true;
}

// bar.red gives its result when the warp goes on: the scheduler resumes it at the next instruction, so the result is
// written by what asks whether the wait is over.
bool is_over_with_result(Warp& w) {
  if (!is_over(w)) return false;
  const Instruction& i = *w.wait.at;
  const NamedBarrier& barrier = w.block->barriers[w.wait.detail];
  const uint32_t before = w.active;
  w.active = w.path;
  if (i.flags == kCount) {
    uint32_t out[kWarp];
    std::fill_n(out, kWarp, static_cast<uint32_t>(barrier.last_count));
    w.put(i, i.at(0), out, kAllLanes);
  } else {
    const bool holds = i.flags == kAnd ? barrier.last_count == barrier.last_lanes : barrier.last_count > 0;
    w.put_mask(i, i.at(0), holds ? kAllLanes : 0, kAllLanes);
  }
  w.active = before;
  return true;
}

uint64_t uniform(Warp& w, const Instruction& i, const Slot& slot, const char* what) {
  w.require(i, slot, what);
  const uint64_t first = w.value(slot, first_lane(w.active));
  for (int lane = 0; lane < kWarp; ++lane)
    if (w.active >> lane & 1 && w.value(slot, lane) != first)
      w.fail(i, lane, std::string(what) + " differs between lanes of the warp");
  return first;
}

void run_barrier(Warp& w, const Instruction& i) {
  w.require_together(i);
  const bool reduces = i.flags >= kCount;
  const int operand = reduces ? 1 : 0;
  const uint64_t number = uniform(w, i, i.at(operand), "the number of a barrier");
  const bool counted = i.parts > operand + (reduces ? 2 : 1);
  const auto expected =
      counted ? static_cast<int>(uniform(w, i, i.at(operand + 1), "the thread count of a barrier")) : 0;
  Block& b = *w.block;
  if (number >= b.barriers.size()) w.fail(i, -1, "uses barrier " + std::to_string(number) + " of 16");
  if (counted && (expected % kWarp != 0 || expected <= 0))
    w.fail(i, -1, "expects " + std::to_string(expected) + " threads at a barrier, which is not a multiple of 32");
  if (expected > static_cast<int>(b.warps.size()) * kWarp)
    w.fail(i, -1,
           "expects " + std::to_string(expected) + " threads at a barrier of a block that has " +
               std::to_string(b.warps.size() * kWarp));
  NamedBarrier& barrier = b.barriers[number];
  if (barrier.arrived > 0) {
    const std::string other =
        "; warp " + std::to_string(barrier.first_warp) + " is at line " + std::to_string(barrier.first->line);
    if (barrier.expected != expected)
      w.fail(i, -1, "warps disagree on how many threads barrier " + std::to_string(number) + " expects" + other);
    if (!counted && barrier.first->line != i.line)
      w.finding(i, -1, "warps of the block wait at different barriers" + other);
    if (barrier.warps >> w.index & 1)
      w.fail(i, -1, "the warp arrives again at barrier " + std::to_string(number) + ", where others have not arrived");
  } else {
    barrier.first = &i;
    barrier.first_warp = w.index;
    barrier.expected = expected;
  }
  if (reduces) {
    const Slot& predicate = i.at(counted ? 3 : 2);
    w.require(i, predicate, "the predicate of a barrier");
    barrier.count += __builtin_popcount(w.mask(predicate) & w.active);
    barrier.lanes += __builtin_popcount(w.active);
  }
  barrier.arrived += kWarp;
  b.shared.join_into(barrier.past, w.index);
  if (i.flags == kArrive) {
    b.shared.advance(w.index);
    complete(b, barrier);
    return;
  }
  barrier.warps |= 1u << w.index;
  w.wait = {reduces ? is_over_with_result : is_over, "a barrier", number, barrier.generation, &i};
  w.pause();
}

void run_warp_sync(Warp& w, const Instruction& i) {
  require_members(w, i, i.at(0));
  w.block->shared.advance(w.index);
}

// Stores are visible at once here; what a fence orders between blocks, order.h says.
void run_fence(Warp& w, const Instruction& i) {
  if (i.flags & kAllBlocks) w.launch->order.fence(w);
}

}  // namespace

Form decode_barrier(Modifiers& m) {
  Form f;
  const std::string& name = m.name();
  if (name == "membar" || name == "fence") {
    if (f = decode_proxy_fence(m); f.run != nullptr) return f;
    const bool proxy = name == "membar" && m.take("proxy");
    m.take_one({"sc", "acq_rel", "acquire", "release"});
    const std::string scope = m.take_one({"cta", "cluster", "gl", "gpu", "sys"});
    f.run = proxy || scope.empty() ? nullptr : run_fence;
    f.flags = scope == "cta" || scope == "cluster" ? 0 : kAllBlocks;
    return f;
  }
  m.take("cta");
  if (m.take("warp")) {
    f.run = m.take("sync") ? run_warp_sync : nullptr;
    f.wants = {{Want::kRead, Type::kB32}};
    return f;
  }
  // barrier.sync without .aligned may be executed by lanes that have parted; compilers do not make use of that here.
  m.take("aligned");
  const Want number{Want::kRead, Type::kU32}, any{Want::kRead, Type::kNone};
  Want count = number;
  count.optional = true;
  if (m.take("red")) {
    f.flags = m.take("popc") ? kCount : m.take("and") ? kAnd : m.take("or") ? kOr : kSync;
    const Type type = m.take_type();
    f.run = f.flags != kSync ? run_barrier : nullptr;
    Want last = any;
    last.optional = true;
    f.wants = {{Want::kWrite, type}, number, any, last};
  } else if (m.take("sync")) {
    f.run = run_barrier;
    f.flags = kSync;
    f.wants = {number, count};
  } else if (m.take("arrive")) {
    f.run = run_barrier;
    f.flags = kArrive;
    f.wants = {number, number};
  }
  return f;
}

}  // namespace ptx
