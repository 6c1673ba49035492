// bra, brx, ret, exit, trap: which lanes go where, and where they meet again.

#include "families.h"
#include "machine.h"

namespace ptx {
namespace {

// The path that waited longest inside continues.
void next_path(Warp& w) {
  while (!w.below.empty()) {
    const Path p = w.below.back();
    w.below.pop_back();
    if (p.lanes == 0) continue;  // all of them have left
    w.pc = p.pc;
    w.meet = p.meet;
    w.path = p.lanes;
    w.held = p.held;
    return;
  }
  w.path = 0;
  w.done = w.alive == 0;
}

// The present path parts: `lanes` of it go to `pc`, or are where they meet already.
void part(Warp& w, int32_t pc, int32_t meet, uint32_t lanes) {
  if (pc != meet && lanes != 0) w.below.push_back({pc, meet, lanes, 0});
}

void run_branch_indexed(Warp& w, const Instruction& i) {
  const Slot& index = i.at(0);
  w.require(i, index, "the index of a branch");
  const uint32_t stay = w.path & ~w.active;
  const uint32_t* values = w.in<uint32_t>(index);
  std::vector<uint32_t> lanes(i.targets.size(), 0);
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(w.active >> lane & 1)) continue;
    if (values[lane] >= lanes.size())
      w.fail(i, lane,
             "branches to entry " + std::to_string(values[lane]) + " of a list of " + std::to_string(lanes.size()));
    lanes[values[lane]] |= 1u << lane;
  }
  for (size_t target = 0; target < lanes.size(); ++target)
    if (lanes[target] == w.path) {
      w.pc = i.targets[target];
      return;
    }
  if (i.meet != w.meet) w.below.push_back({i.meet, w.meet, w.path, 0});
  part(w, w.pc, i.meet, stay);
  for (size_t target = 0; target < lanes.size(); ++target) part(w, i.targets[target], i.meet, lanes[target]);
  next_path(w);
}

void run_trap(Warp& w, const Instruction& i) {
  w.fail(i, first_lane(w.active), "traps");
}

void run_assertion(Warp& w, const Instruction& i) {
  w.fail(i, first_lane(w.active), "fails an assertion");
}

void run_nothing(Warp&, const Instruction&) {
}

}  // namespace

void run_branch(Warp& w, const Instruction& i) {
  const uint32_t taken = w.active, other = w.path & ~taken;
  if (other == 0) {
    w.pc = i.target;
    return;
  }
  if (i.target == w.pc) return;
  if (i.meet != w.meet) w.below.push_back({i.meet, w.meet, w.path, 0});
  // Which side goes first is free, so the seed decides.
  if (w.launch->draw(2)) {
    part(w, w.pc, i.meet, other);
    part(w, i.target, i.meet, taken);
  } else {
    part(w, i.target, i.meet, taken);
    part(w, w.pc, i.meet, other);
  }
  next_path(w);
}

void run_exit(Warp& w, const Instruction&) {
  const uint32_t leave = w.active;
  w.alive &= ~leave;
  w.path &= ~leave;
  for (Path& p : w.below) p.lanes &= ~leave;
  if (w.path == 0) next_path(w);
  if (w.alive == 0) w.done = true;
  if (w.done) w.pause();
}

void meet_again(Warp& w) {
  next_path(w);
}

// Lanes that parted for good, because one side leaves the kernel, do not meet before the end. So a path that comes to
// an instruction where lanes wait for each other lets those beside it run first: they may leave, or come to where this
// one waits. Returns false if none is left that could.
bool let_others_first(Warp& w) {
  if (w.held == w.alive) return false;  // they have run since, and nobody left
  size_t place = w.below.size();
  while (place > 0 && w.below[place - 1].meet == w.meet) --place;
  if (place == w.below.size()) return false;
  w.below.insert(w.below.begin() + static_cast<int64_t>(place), {w.pc, w.meet, w.path, w.alive});
  next_path(w);
  return true;
}

Form decode_branch(Modifiers& m) {
  Form f;
  const std::string& name = m.name();
  if (name == "bra") {
    m.take("uni");
    f.run = run_branch;
    f.wants = {{Want::kLabel}};
  } else if (name == "brx" && m.take("idx")) {
    m.take("uni");
    f.run = run_branch_indexed;
    f.wants = {{Want::kRead, Type::kU32}, {Want::kLabel}};
  } else if (name == "ret" || name == "exit") {
    m.take("uni");
    f.run = run_exit;
  } else if (name == "trap" || name == "brkpt") {
    f.run = run_trap;
  } else if (name == kAssertion) {
    f.run = run_assertion;
  } else if (name == "nanosleep") {
    m.take("u32");
    f.run = [](Warp& w, const Instruction&) { w.pause(); };
    f.wants = {{Want::kRead, Type::kU32}};
  } else if (name == "griddepcontrol") {
    // Blocks of one launch run here, and no earlier launch is still running.
    m.take_one({"wait", "launch_dependents"});
    f.run = run_nothing;
  }
  return f;
}

}  // namespace ptx
