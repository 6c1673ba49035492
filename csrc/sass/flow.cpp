// Branches, lanes that part and meet again, barriers, and what has no effect on values.
//
// The lanes of a warp that are at one instruction form a fragment. A branch that they disagree on makes two. BSSY notes
// the lanes that a convergence barrier gathers, and BSYNC holds a fragment until all of them that live have come.

#include "warp.h"

namespace sass {
namespace {

Fragment& own(Warp& w) {
  return w.fragments[w.fragment];
}

// Lets `taken` of the fragment's lanes go to `target`. The part with the lower address runs first.
void part(Warp& w, uint32_t taken, int target) {
  const uint32_t rest = w.active & ~taken;
  if (taken == 0) return;
  if (rest == 0) {
    w.next = target;
    return;
  }
  Fragment other;
  const bool back = target < w.next;
  own(w).lanes = back ? taken : rest;
  other.lanes = back ? rest : taken;
  other.at = back ? w.next : target;
  if (back) w.next = target;
  w.fragments.push_back(other);
}

void run_branch(Warp& w, const Instruction& i) {
  uint32_t taken = w.exec, unknown = w.maybe;
  for (const Operand& o : i.operands) {
    if (o.kind != Kind::kP && o.kind != Kind::kUP) continue;
    const Mask m = w.predicate(o);
    unknown = (unknown | (taken & ~m.known)) & ~(m.known & ~m.v);
    taken &= m.v & m.known;
  }
  if (unknown != 0) {
    if (!i.slow_if_taken && !i.slow_if_not) w.fail(i, "branches on a value that is not known");
    w.launch->assumed["numbers are ordinary: no slow path of a quotient or root"] += 1;
    taken = i.slow_if_taken ? taken : taken | unknown;
  }
  part(w, taken, i.target);
}

bool decode_branch(Instruction& i) {
  i.form = 1;  // BRA handles an unknown guard itself
  i.run = run_branch;
  return true;
}

// BRA.DIV leaves for code that gathers the lanes where they have parted.
void run_divergent(Warp& w, const Instruction& i) {
  if (w.active != w.alive) w.fail(i, "finds lanes that have parted, which is not followed");
}

bool decode_branches(Instruction& i) {
  i.strict = true;
  if (i.take("DIV")) {
    i.run = run_divergent;
    return true;
  }
  return decode_branch(i);
}

void run_exit(Warp& w, const Instruction&) {
  w.alive &= ~w.exec;
  own(w).lanes &= ~w.exec;
}
bool decode_exit(Instruction& i) {
  i.strict = true;
  i.run = run_exit;
  return true;
}

void run_call(Warp& w, const Instruction& i) {
  part(w, w.exec, i.target);
}
bool decode_call(Instruction& i) {
  i.strict = true;
  i.run = run_call;
  return i.opcode.find(".REL") != std::string::npos;
}

void run_return(Warp& w, const Instruction& i) {
  if (w.exec == 0) return;
  if (w.exec != w.active) w.fail(i, "returns in some lanes of a fragment, which is not followed");
  const Vec& to = w.r[i.operands[0].number];
  const uint32_t address = to.v[w.leader()];
  for (int lane = 0; lane < kWarp; ++lane)
    if ((w.exec >> lane & 1) && (!(to.known >> lane & 1) || to.v[lane] != address))
      w.fail(i, "returns to an address that is not known, or not one");
  const auto place = w.launch->places.find(address);
  if (place == w.launch->places.end()) w.fail(i, "returns to an address without code");
  w.next = place->second;
}
bool decode_return(Instruction& i) {
  i.strict = true;
  i.run = run_return;
  return i.opcode.find(".REL") != std::string::npos && !i.operands.empty() && i.operands[0].kind == Kind::kR;
}

// ---- convergence ----

void run_announce(Warp& w, const Instruction& i) {
  w.b[i.operands[0].number] = w.active;
}
bool decode_announce(Instruction& i) {
  i.strict = true;
  i.run = run_announce;
  return i.guard < 0;
}

void run_break(Warp& w, const Instruction& i) {
  w.b[i.operands.back().number] &= ~w.exec;
}
bool decode_break(Instruction& i) {
  i.strict = true;
  i.run = run_break;
  return i.operands.back().kind == Kind::kB;
}

void run_converge(Warp& w, const Instruction& i) {
  if (w.exec == 0) return;
  if (w.exec != w.active) w.fail(i, "gathers some lanes of a fragment, which is not followed");
  const int barrier = i.operands.back().number;
  if ((w.b[barrier] & w.alive & ~w.active) == 0) return;
  own(w).state = Fragment::kConverging;
  own(w).barrier = barrier;
}
bool decode_converge(Instruction& i) {
  i.strict = true;
  i.run = run_converge;
  return i.operands.back().kind == Kind::kB;
}

// WARPSYNC gathers the lanes of a mask.
void run_together(Warp& w, const Instruction& i) {
  if (w.exec == 0) return;
  uint32_t mask = kAll;
  if (i.form == 1) {
    Vec scratch;
    const Vec& given = w.plain(i, i.operands[0], scratch);
    if (w.exec & ~given.known) w.fail(i, "gathers lanes that are not known");
    mask = given.v[w.leader()];
  }
  if ((mask & w.alive & ~w.active) == 0) return;
  own(w).state = Fragment::kSynchronising;
  own(w).awaited = mask;
}
bool decode_together(Instruction& i) {
  i.strict = true;
  if (i.take("COLLECTIVE")) return false;
  i.form = i.take("ALL") ? 0 : 1;
  i.take("EXCLUSIVE");
  i.run = run_together;
  return i.form == 0 || !i.operands.empty();
}

// A convergence barrier is kept in a register where routines are called.
void run_keep(Warp& w, const Instruction& i) {
  const Operand &to = i.operands[0], &from = i.operands[1];
  if (from.kind == Kind::kB) {
    w.put(to, Vec::of(w.b[from.number]));
    if (i.flag) w.b[from.number] = 0;
  } else {
    const Vec& x = w.r[from.number];
    if (w.exec & ~x.known) w.fail(i, "restores a convergence barrier that is not known");
    if (w.exec) w.b[to.number] = x.v[w.leader()];
  }
}
bool decode_keep(Instruction& i) {
  i.strict = true;
  i.take("32");
  i.flag = i.take("CLEAR");
  i.run = run_keep;
  if (i.operands.size() != 2) return false;
  const Kind a = i.operands[0].kind, b = i.operands[1].kind;
  return (a == Kind::kR && b == Kind::kB) || (a == Kind::kB && b == Kind::kR);
}

// ---- barriers of the block ----

void run_barrier(Warp& w, const Instruction& i) {
  if (w.exec == 0) return;
  if (w.active != w.alive || w.exec != w.active) w.fail(i, "is reached by some lanes of a warp, which is not followed");
  int64_t numbers[2] = {0, 0};
  int given = 0;
  for (const Operand& o : i.operands) {
    if (o.kind != Kind::kR && o.kind != Kind::kUR && o.kind != Kind::kImmediate) continue;
    Vec scratch;
    const Vec& x = w.plain(i, o, scratch);
    if (!(x.known >> w.leader() & 1)) w.fail(i, "names a barrier or a count that is not known");
    if (given < 2) numbers[given++] = x.v[w.leader()];
  }
  Block& block = *w.block;
  Block::Named& named = block.barriers[static_cast<int>(numbers[0])];
  named.arrived += 1;
  named.threads = numbers[1];
  Event& e = w.event(i);
  e.value = numbers[0] | numbers[1] << 8;
  e.address = static_cast<uint64_t>(numbers[0]);
  if (i.form == 1) return;
  named.waiting.push_back(w.number);
  w.state = Warp::kBarrier;
}

bool decode_barrier(Instruction& i) {
  i.strict = true;
  i.form = i.take("ARV") ? 1 : 0;
  if (!i.take("SYNC") && !i.take("RED") && i.form == 0) return false;
  i.modifiers.clear();
  i.run = run_barrier;
  return true;
}

void run_nothing(Warp&, const Instruction&) {
}
bool decode_nothing(Instruction& i) {
  i.run = run_nothing;
  return true;
}

void run_trap(Warp& w, const Instruction& i) {
  if (w.exec) w.fail(i, "is a trap");
}
bool decode_trap(Instruction& i) {
  i.strict = true;
  i.run = run_trap;
  return true;
}

void run_refused(Warp& w, const Instruction& i) {
  if (w.exec | w.maybe) w.fail(i, "is not followed");
}

}  // namespace

const std::map<std::string, Decoder>& flow_decoders() {
  static const std::map<std::string, Decoder> all = [] {
    std::map<std::string, Decoder> found = {
        {"BRA", decode_branches},      {"EXIT", decode_exit},   {"CALL", decode_call},      {"RET", decode_return},
        {"BSSY", decode_announce},     {"BREAK", decode_break}, {"BSYNC", decode_converge}, {"BMOV", decode_keep},
        {"WARPSYNC", decode_together}, {"BAR", decode_barrier}, {"BPT", decode_trap},       {"KILL", decode_trap},
    };
    // Waits, fences, hints and products: the walk has no time, and memory is as it was left.
    for (const char* name : {"ACQBULK", "CCTL",        "CGAERRBAR",    "DEPBAR",     "ENDCOLLECTIVE", "ERRBAR",
                             "FENCE",   "LDGDEPBAR",   "MEMBAR",       "NANOSLEEP",  "NOP",           "PMTRIG",
                             "PREEXIT", "UCGABAR_ARV", "UCGABAR_WAIT", "USETMAXREG", "UTMACCTL",      "UTMACMDFLUSH",
                             "UTMAPF",  "UBLKPF",      "WARPGROUP",    "YIELD"})
      found[name] = decode_nothing;
    return found;
  }();
  return all;
}

Run refused() {
  return run_refused;
}

}  // namespace sass
