// Binds the code to a launch, and walks its blocks: warp after warp, each until it waits for others.

#include <algorithm>
#include <cstring>
#include <set>

#include "warp.h"

namespace sass {

Run refused();  // flow.cpp

namespace {

// Opcodes that move data or control, so that leaving them out would be a wrong trace and not only an unknown value.
const std::set<std::string>& consequential() {
  static const std::set<std::string> all = {"ATOM",   "ATOMG",   "ATOMS",   "BAR",      "BMOV",    "BRA",     "BREAK",
                                            "BRX",    "BSSY",    "BSYNC",   "CALL",     "EXIT",    "JMX",     "LD",
                                            "LDG",    "LDGSTS",  "LDL",     "LDS",      "LDSM",    "RED",     "REDG",
                                            "RET",    "ST",      "STG",     "STL",      "STS",     "STSM",    "SYNCS",
                                            "UBLKCP", "UBLKRED", "UTMALDG", "UTMAREDG", "UTMASTG", "WARPSYNC"};
  return all;
}

void bind_constants(const Launch& l, Instruction& i) {
  for (Operand& o : i.operands) {
    if (o.kind != Kind::kConstant || o.base >= 0 || o.uniform >= 0) continue;
    for (int part = 0; part < 2; ++part) {
      uint32_t value = 0;
      const bool known = constant(l, o.bank, o.offset + 4 * part, 4, value);
      o.value[part] = Vec::of(value);
      if (!known) o.value[part].known = 0;
    }
  }
}

void decode(Instruction& i) {
  bool found = false;
  for (const auto* decoders : {&integer_decoders(), &bit_decoders(), &lane_decoders(), &floating_decoders(),
                               &memory_decoders(), &copy_decoders(), &flow_decoders()}) {
    const auto one = decoders->find(i.name);
    if (one == decoders->end()) continue;
    // A modifier that no decoder knows changes what the instruction does.
    found = one->second(i) && (i.modifiers.empty() || flow_decoders().count(i.name));
    break;
  }
  if (found) return;
  i.run = nullptr;
  if (!consequential().count(i.name)) return;
  i.strict = false;
  i.run = refused();
}

void step(Warp& w) {
  Launch& l = *w.launch;
  Fragment& f = w.fragments[w.fragment];
  Instruction& i = l.code[f.at];
  w.active = f.lanes;
  w.exec = w.active;
  w.maybe = 0;
  if (i.guard >= 0) {
    const Mask m = i.uniform_guard ? w.up[i.guard] : w.p[i.guard];
    const uint32_t value = i.guard_negated ? ~m.v : m.v;
    w.exec = w.active & value & m.known;
    w.maybe = w.active & ~m.known;
    if (w.maybe != 0 && i.strict && !i.branch) w.fail(i, "has a guard that is not known");
  }
  const uint32_t lanes = w.exec | w.maybe;
  const int at = f.at;  // the fragments may move
  w.next = at + 1;
  w.repeat = false;
  if (i.run != nullptr)
    i.run(w, i);
  else
    w.forget(i, w.exec);
  if (!i.branch) w.forget(i, w.maybe);
  if (w.repeat) return;
  if (l.record)
    w.path.push_back({static_cast<uint32_t>(at), lanes});
  else
    w.events.clear();
  i.executed += 1;
  l.instructions += 1;
  w.fragments[w.fragment].at = w.next;
  if ((l.instructions & 0xfffff) == 0 && l.tick) l.tick();
  if (l.instructions > l.limit)
    w.fail(i, "is reached after " + std::to_string(l.limit) + " instructions of the walk: does the kernel end?");
}

// Takes away fragments without lanes, and frees those that waited for lanes which have come or left.
void settle(Warp& w) {
  auto& all = w.fragments;
  all.erase(std::remove_if(all.begin(), all.end(), [](const Fragment& f) { return f.lanes == 0; }), all.end());
  for (size_t n = 0; n < all.size(); ++n) {
    Fragment& f = all[n];
    if (f.state == Fragment::kReady) continue;
    const bool converging = f.state == Fragment::kConverging;
    const uint32_t awaited = (converging ? w.b[f.barrier] : f.awaited) & w.alive;
    uint32_t here = 0;
    for (const Fragment& other : all)
      if (other.state == f.state && other.barrier == f.barrier) here |= other.lanes;
    if (awaited & ~here) continue;
    const auto state = f.state;
    const int barrier = f.barrier;
    if (converging) {
      Fragment joined = f;
      joined.state = Fragment::kReady;
      joined.lanes = here;
      joined.barrier = -1;
      all.erase(std::remove_if(all.begin(), all.end(),
                               [&](const Fragment& o) { return o.state == state && o.barrier == barrier; }),
                all.end());
      all.push_back(joined);
      n = static_cast<size_t>(-1);
      continue;
    }
    // Lanes that WARPSYNC gathered go on together where they are at one instruction.
    std::vector<Fragment> kept, met;
    for (const Fragment& o : all) (o.state == state ? met : kept).push_back(o);
    for (Fragment& o : met) {
      o.state = Fragment::kReady;
      const auto same = std::find_if(kept.begin(), kept.end(), [&](const Fragment& k) {
        return k.state == Fragment::kReady && k.at == o.at && k.awaited == o.awaited;
      });
      if (same == kept.end())
        kept.push_back(o);
      else
        same->lanes |= o.lanes;
    }
    all = std::move(kept);
    n = static_cast<size_t>(-1);
  }
}

// Runs a warp until it waits or ends. Of fragments that can run, the one with the lowest address does.
void run_warp(Warp& w) {
  while (w.state == Warp::kRunning) {
    if (w.fragments.size() != 1 || w.fragments[0].state != Fragment::kReady || w.fragments[0].lanes == 0) settle(w);
    if (w.fragments.empty()) {
      w.state = Warp::kDone;
      return;
    }
    int best = -1;
    for (size_t n = 0; n < w.fragments.size(); ++n)
      if (w.fragments[n].state == Fragment::kReady && (best < 0 || w.fragments[n].at < w.fragments[best].at))
        best = static_cast<int>(n);
    if (best < 0) w.fail(w.launch->code[w.fragments[0].at - 1], "gathers lanes that never come");
    w.fragment = best;
    const size_t fragments = w.fragments.size();
    do {
      if (w.fragments[w.fragment].at >= static_cast<int>(w.launch->code.size()))
        throw Error("the code ends without EXIT");
      step(w);
    } while (w.state == Warp::kRunning && w.fragments.size() == fragments &&
             w.fragments[w.fragment].state == Fragment::kReady && w.fragments[w.fragment].lanes != 0);
  }
}

uint32_t path_of(Launch& l, std::vector<Step>&& path) {
  uint64_t hash = 1469598103934665603u;
  for (const Step& s : path) hash = (hash ^ (uint64_t{s.instruction} << 32 | s.lanes)) * 1099511628211u;
  const auto equal = [&](uint32_t known) {
    const auto& other = l.paths[known];
    return other.size() == path.size() && std::memcmp(other.data(), path.data(), path.size() * sizeof(Step)) == 0;
  };
  for (uint32_t known : l.by_hash[hash])
    if (equal(known)) return known;
  const auto fresh = static_cast<uint32_t>(l.paths.size());
  l.paths.push_back(std::move(path));
  l.by_hash[hash].push_back(fresh);
  return fresh;
}

void release(Block& block, std::vector<Warp>& warps) {
  int alive = 0;
  for (const Warp& w : warps) alive += w.state != Warp::kDone;
  const int64_t all = static_cast<int64_t>(warps.size());
  for (auto& [number, named] : block.barriers) {
    if (named.waiting.empty()) continue;
    const int64_t wanted = named.threads > 0 ? named.threads / kWarp : std::min<int64_t>(all, alive);
    if (named.arrived < wanted) continue;
    for (int n : named.waiting) warps[n].state = Warp::kRunning;
    named = {};
  }
}

void run_block(Launch& l, int64_t index, std::vector<Warp>& warps) {
  Block block;
  block.launch = &l;
  block.record.index = index;
  block.index[0] = static_cast<int>(index % l.grid[0]);
  block.index[1] = static_cast<int>(index / l.grid[0] % l.grid[1]);
  block.index[2] = static_cast<int>(index / (int64_t{l.grid[0]} * l.grid[1]));
  block.shared.assign(l.shared_bytes, 0);
  block.shared_known.assign(l.shared_bytes, 0);
  const int threads = l.threads_of_block();
  for (size_t n = 0; n < warps.size(); ++n) {
    Warp& w = warps[n];
    w.block = &block;
    w.launch = &l;
    w.number = static_cast<int>(n);
    for (Vec& v : w.r) v.known = 0;
    for (auto& lanes : w.bits) std::fill(std::begin(lanes), std::end(lanes), kAll);
    for (Vec& v : w.ur) v.known = 0;
    w.r[kRZ] = w.ur[kURZ] = Vec::of(0);
    for (int k = 0; k < 7; ++k) w.p[k] = w.up[k] = Mask{0, 0};
    w.p[kPT] = w.up[kPT] = Mask{kAll, kAll};
    std::fill(std::begin(w.b), std::end(w.b), 0);
    const int left = threads - static_cast<int>(n) * kWarp;
    w.alive = left >= kWarp ? kAll : (1u << left) - 1;
    Fragment f;
    f.lanes = w.alive;
    w.fragments = {f};
    w.state = Warp::kRunning;
    w.local.clear();
    w.local_known.clear();
    w.path.clear();
    w.events.clear();
  }
  for (;;) {
    bool moved = false, done = true;
    for (Warp& w : warps) {
      if (w.state == Warp::kWaiting) w.state = Warp::kRunning;
      if (w.state == Warp::kRunning) {
        const int64_t before = l.instructions;
        run_warp(w);
        moved |= l.instructions != before || w.state == Warp::kDone;
      }
      done &= w.state == Warp::kDone;
      release(block, warps);
    }
    if (done) break;
    const bool running =
        std::any_of(warps.begin(), warps.end(), [](const Warp& w) { return w.state == Warp::kRunning; });
    if (!moved && !running) {
      for (const Warp& w : warps)
        if (w.state != Warp::kDone) w.fail(l.code[w.fragments[0].at], "waits for ever: no warp of the block can go on");
    }
  }
  for (Warp& w : warps) {
    WarpRecord one;
    if (l.record) {
      one.path = path_of(l, std::move(w.path));
      one.events = std::move(w.events);
    }
    block.record.warps.push_back(std::move(one));
  }
  for (auto* sectors : {&block.record.reads, &block.record.writes}) {
    std::sort(sectors->begin(), sectors->end());
    sectors->erase(std::unique(sectors->begin(), sectors->end()), sectors->end());
  }
  l.blocks.push_back(std::move(block.record));
}

}  // namespace

void bind(Launch& l) {
  for (size_t n = 0; n < l.code.size(); ++n) l.places[l.code[n].address] = static_cast<int>(n);
  for (Instruction& i : l.code) {
    bind_constants(l, i);
    i.branch = i.name == "BRA";
    if (i.branch || i.name == "CALL") {
      const auto to = l.places.find(static_cast<uint32_t>(i.number));
      i.target = to == l.places.end() ? -1 : to->second;
    }
    decode(i);
    if ((i.branch || i.name == "CALL") && i.target < 0) i.run = refused();
  }
}

void run(Launch& l, const std::vector<int64_t>& blocks) {
  std::vector<Warp> warps((l.threads_of_block() + kWarp - 1) / kWarp);
  for (int64_t index : blocks) run_block(l, index, warps);
}

}  // namespace sass
