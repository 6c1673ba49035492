// The PTX machine: runs a compiled kernel on the CPU, and watches it.
//
// From a line of PTX to lanes. The parser (parser.cpp) makes statements of the text: an opcode's name and its operands
// as written. decode.cpp resolves them once: every register, constant and special register becomes a place in the
// register file of a warp, every opcode a function that its family chose by its modifiers (families.h), every called
// function is written out at its call. What runs is a flat array of instructions. A warp executes one for all of its 32
// lanes in a loop over two or three arrays, which the C++ compiler turns into vector instructions.
//
// Which lanes. A warp has a present path: some lanes and a program counter. A branch that not all of these lanes take
// splits the path. One side goes on, by the seed, until it comes to where both meet again, the branch's immediate
// post-dominator (flow.cpp); then the other side runs to there; then they go on together. So lanes that part meet as
// early as they can, which compiled code relies on at instructions that are .aligned. A GPU since Volta may let the
// sides take turns; a lane that waits in a loop for another lane of its warp ends here at the limit of instructions.
//
// Which warp. The scheduler draws one that is not waiting, lets it run for a number of instructions that it draws too,
// and draws again. Blocks run one after another in an order that is drawn. The seed decides all of it, so a result that
// depends on the order changes with the seed, and a run can be repeated. An instruction that waits sets Warp::wait and
// returns; the warp is resumed when its condition holds. If all warps wait, the block is stuck: a finding.
//
// Poison. A register that was not written has no value, and neither has the result of an instruction that reads one,
// nor what a division by zero returns. Compilers emit such reads on purpose, where the value is not used. So the
// machine hands the mark on, bit by bit, through registers, and byte by byte through shared memory, and reports where
// it would matter: in an address, a branch, a guard, a value stored to global memory. Bits are needed because compilers
// pack: two numbers of 8 bits and two undefined bytes in one register, or four predicates of a mask, of which a false
// one decides. Logic, shifts, copies of bits, comparisons, sums and products say which bits of a result are defined
// (apply.h); the result of any other instruction is wholly undefined if an operand is in part. Registers that wgmma
// reads or writes are pending until its wait; any use is a finding.
//
// Memory. Only registered allocations may be accessed, within their bounds, aligned to the access's width. Bytes of
// shared memory have a history (shared.h): vector clocks of the warps say whether a barrier orders two accesses of
// different warps, a warp's own clock whether bar.warp.sync orders accesses of different lanes. Bytes of global memory
// have one too (order.h), across the blocks of a launch.
//
// Not modelled. Weakly ordered memory: a store is visible at once. Other blocks of a cluster. Approximate instructions
// (ex2.approx, rcp.approx, div.full, ...) return the correctly rounded value, which is within the documented error.
// Time: %clock and %globaltimer count instructions at the start of the block. Races between single bytes of the same
// two bytes of shared memory.

#include "machine.h"

#include "asynchronous.h"

#include <algorithm>
#include <climits>
#include <limits>
#include <numeric>
#include <sstream>

namespace ptx {

// branches.cpp
void meet_again(Warp& w);
bool let_others_first(Warp& w);

namespace {

constexpr int kLongestTurn = 192;        // instructions until another warp is drawn
constexpr int64_t kTickEvery = 1 << 20;  // instructions between two calls of Launch::tick
constexpr int kMostThreads = 1024;
constexpr std::array<int, 3> kMostAlong{INT_MAX, 65535, 65535}, kMostThreadsAlong{1024, 1024, 64};
constexpr int64_t kMostShared = 227 << 10;  // of an H100's block, the most of all architectures
constexpr int64_t kMostBlocks = 1 << 22;

int64_t product(const std::array<int, 3>& v) {
  const int64_t plane = int64_t{v[0]} * v[1];
  return v[2] > 0 && plane > std::numeric_limits<int64_t>::max() / v[2] ? std::numeric_limits<int64_t>::max()
                                                                        : plane * v[2];
}

std::string text_of(const std::array<int, 3>& v) {
  return "(" + std::to_string(v[0]) + ", " + std::to_string(v[1]) + ", " + std::to_string(v[2]) + ")";
}

[[noreturn]] void refuse(const Launch& l, const std::string& what) {
  throw Error(l.program->name, 0, "cannot be launched: " + what);
}

void check_launch(const Launch& l) {
  const Program& p = *l.program;
  for (int axis = 0; axis < 3; ++axis)
    if (l.grid[axis] < 1 || l.threads[axis] < 1)
      refuse(l, "expected a grid and a block of at least 1, got " + text_of(l.grid) + " and " + text_of(l.threads));
  for (int axis = 0; axis < 3; ++axis)
    if (l.grid[axis] > kMostAlong[axis] || l.threads[axis] > kMostThreadsAlong[axis])
      refuse(l, "expected at most " + text_of(kMostAlong) + " blocks and " + text_of(kMostThreadsAlong) +
                    " threads along the axes, as on every GPU, got " + text_of(l.grid) + " and " + text_of(l.threads));
  if (product(l.grid) > kMostBlocks)
    refuse(l, "expected at most " + std::to_string(kMostBlocks) + " blocks, got " + text_of(l.grid));
  if (product(l.threads) > kMostThreads)
    refuse(l, "expected at most " + std::to_string(kMostThreads) + " threads, got " + text_of(l.threads));
  const std::array<int, 3> required{p.required_threads[0], p.required_threads[1], p.required_threads[2]};
  if (required[0] > 0 && required != l.threads)
    refuse(l, "expected " + text_of(required) + " threads, as .reqntid says, got " + text_of(l.threads));
  const std::array<int, 3> most{p.maximum_threads[0], p.maximum_threads[1], p.maximum_threads[2]};
  if (most[0] > 0 && product(l.threads) > product(most))
    refuse(l, "expected at most " + text_of(most) + " threads, as .maxntid says, got " + text_of(l.threads));
  if (p.static_shared + l.dynamic_shared > kMostShared)
    refuse(l, "expected at most " + std::to_string(kMostShared) + " bytes of shared memory, got " +
                  std::to_string(p.static_shared + l.dynamic_shared));
  if (static_cast<int>(l.parameters.size()) != p.parameter_bytes)
    refuse(l, "expected " + std::to_string(p.parameter_bytes) + " bytes of parameters, got " +
                  std::to_string(l.parameters.size()));
}

// ---- registers at the start of a block ----

void set_special(Launch& l, Warp& w, const std::string& name, const Slot& slot) {
  const Block& b = l.block;
  const int64_t threads = product(l.threads);
  const auto axis = [&](const std::array<int, 3>& v) { return static_cast<uint64_t>(v[name.back() - 'x']); };
  for (int lane = 0; lane < kWarp; ++lane) {
    const int thread = w.index * kWarp + lane;
    const std::array<int, 3> tid{thread % l.threads[0], thread / l.threads[0] % l.threads[1],
                                 thread / l.threads[0] / l.threads[1]};
    const uint64_t bit = uint64_t{1} << lane;
    uint64_t value = 0;  // also of the clocks' high words and of ranks within a cluster of one block
    if (name.rfind("%tid.", 0) == 0) {
      value = axis(tid);
    } else if (name.rfind("%ntid.", 0) == 0) {
      value = axis(l.threads);
    } else if (name.rfind("%ctaid.", 0) == 0 || name.rfind("%clusterid.", 0) == 0) {
      value = axis(b.index);
    } else if (name.rfind("%nctaid.", 0) == 0 || name.rfind("%nclusterid.", 0) == 0) {
      value = axis(l.grid);
    } else if (name.rfind("%cluster_nct", 0) == 0 || name == "%nsmid") {
      value = 1;
    } else if (name == "%laneid") {
      value = lane;
    } else if (name == "%warpid") {
      value = w.index;
    } else if (name == "%nwarpid") {
      value = (threads + kWarp - 1) / kWarp;
    } else if (name == "%lanemask_eq") {
      value = bit;
    } else if (name == "%lanemask_lt") {
      value = bit - 1;
    } else if (name == "%lanemask_le") {
      value = bit | (bit - 1);
    } else if (name == "%lanemask_gt") {
      value = ~(bit | (bit - 1));
    } else if (name == "%lanemask_ge") {
      value = ~(bit - 1);
    } else if (name == "%dynamic_smem_size") {
      value = l.dynamic_shared;
    } else if (name == "%total_smem_size") {
      value = l.program->static_shared + l.dynamic_shared;
    } else if (name == "%clock" || name == "%clock64" || name == "%globaltimer") {
      value = l.counters.instructions;
    }
    if (bytes_of(slot.type) == 8) {
      w.out<uint64_t>(slot)[lane] = value;
    } else {
      w.out<uint32_t>(slot)[lane] = static_cast<uint32_t>(value);
    }
  }
}

// ---- blocks ----

struct Storage {
  std::vector<std::vector<uint8_t>> files, undefined_bits, keeps_bits;
  std::vector<std::vector<uint32_t>> written, pending;
};

uint8_t* aligned(std::vector<uint8_t>& storage) {
  const auto at = reinterpret_cast<uintptr_t>(storage.data());
  return storage.data() + (64 - at % 64) % 64;
}

void make_warps(Launch& l, Storage& storage) {
  const int64_t threads = product(l.threads);
  const auto warps = static_cast<size_t>((threads + kWarp - 1) / kWarp);
  const Program& p = *l.program;
  l.block.warps.resize(warps);
  storage.files.resize(warps);
  storage.written.resize(warps);
  storage.pending.resize(warps);
  storage.undefined_bits.resize(warps);
  storage.keeps_bits.resize(warps);
  for (size_t n = 0; n < warps; ++n) {
    storage.files[n].assign(p.file_bytes + 64, 0);
    storage.written[n].resize(p.registers.size());
    storage.pending[n].resize(p.registers.size());
    storage.undefined_bits[n].resize(p.file_bytes);
    storage.keeps_bits[n].resize(p.registers.size());
    Warp& w = l.block.warps[n];
    w.file = aligned(storage.files[n]);
    w.written = storage.written[n].data();
    w.pending = storage.pending[n].data();
    w.undefined_bits = storage.undefined_bits[n].data();
    w.keeps_bits = storage.keeps_bits[n].data();
    if (!p.initial.empty()) std::memcpy(w.file, p.initial.data(), p.initial.size());
  }
}

void start_block(Launch& l, Storage& storage, int64_t number) {
  Block& b = l.block;
  const Program& p = *l.program;
  b.launch = &l;
  b.index = {static_cast<int>(number % l.grid[0]), static_cast<int>(number / l.grid[0] % l.grid[1]),
             static_cast<int>(number / l.grid[0] / l.grid[1])};
  b.barriers.fill(NamedBarrier{});
  b.shared.start(p.static_shared + l.dynamic_shared, static_cast<int>(b.warps.size()));
  const int64_t threads = product(l.threads);
  for (size_t n = 0; n < b.warps.size(); ++n) {
    Warp& w = b.warps[n];
    w.block = &b;
    w.launch = &l;
    w.index = static_cast<int>(n);
    std::fill(storage.written[n].begin(), storage.written[n].end(), 0);
    std::fill(storage.pending[n].begin(), storage.pending[n].end(), 0);
    std::fill(storage.keeps_bits[n].begin(), storage.keeps_bits[n].end(), uint8_t{0});
    w.written[kConstantRegister] = kAllLanes;
    w.pending_registers = 0;
    const int64_t lanes = std::min<int64_t>(kWarp, threads - static_cast<int64_t>(n) * kWarp);
    w.alive = w.path = lanes == kWarp ? kAllLanes : (1u << lanes) - 1;
    w.active = 0;
    w.carry = 0;
    w.pc = 0;
    w.meet = -1;
    w.held = 0;
    w.below.clear();
    w.done = false;
    w.wait = Wait{};
    w.local.assign(static_cast<size_t>(p.local_bytes) * kWarp, 0xff);
    w.local_written.assign(static_cast<size_t>(p.local_bytes) * kWarp, 0);
    for (const auto& [name, slot] : p.special) set_special(l, w, name, slot);
  }
  start_asynchronous(b);
  l.order.start_block(static_cast<uint32_t>(number), static_cast<int>(b.warps.size()));
}

void check_limit(Launch& l, Warp& w, const Instruction& i) {
  if (l.counters.instructions < l.limit) return;
  w.fail(i, -1,
         "the launch has executed " + std::to_string(l.limit) +
             " instructions of warps, its limit: an endless loop, or a limit that is too low");
}

// Lets a warp run until its turn is over, it waits, or it has left.
void run_warp(Launch& l, Warp& w) {
  const Instruction* code = l.program->instructions.data();
  int64_t* executed = l.counters.executed.data();
  w.quantum = 1 + static_cast<int64_t>(l.draw(kLongestTurn));
  int64_t count = 0;
  while (w.quantum > 0) {
    if (w.pc == w.meet) {
      meet_again(w);
      continue;
    }
    const int32_t at = w.pc;
    const Instruction& i = code[at];
    if (i.collective && w.path != w.alive && let_others_first(w)) continue;
    ++w.pc;
    w.active = w.path;
    if (i.guarded) {
      if (w.path & ~w.written[i.guard_reg]) {
        w.active = w.path & ~w.written[i.guard_reg];
        const int lane = first_lane(w.active);
        w.active = w.path;
        w.finding(i, lane,
                  "its guard, register " + l.program->registers[i.guard_reg] + ", was never given a value" +
                      l.order.undefined_load());
      }
      const uint32_t guard = *reinterpret_cast<const uint32_t*>(w.file + i.guard_at);
      w.active &= i.guard_negated ? ~guard : guard;
    }
    ++executed[at];
    ++count;
    --w.quantum;
    if (w.active) i.run(w, i);
  }
  l.counters.instructions += count;
  check_limit(l, w, code[std::max(w.pc - 1, 0)]);
}

std::string stuck(const Block& b) {
  std::ostringstream out;
  out << "no warp can go on: ";
  int told = 0;
  for (const Warp& w : b.warps) {
    if (w.done) continue;
    if (++told > 4) {
      out << "; ...";
      break;
    }
    out << (told > 1 ? "; " : "") << "warp " << w.index << " waits for " << w.wait.what << " at line "
        << w.wait.at->line;
  }
  return out.str();
}

void run_block(Launch& l, Storage& storage, int64_t number) {
  start_block(l, storage, number);
  Block& b = l.block;
  std::vector<Warp*> ready;
  int64_t next_tick = l.counters.instructions + kTickEvery;
  for (;;) {
    ready.clear();
    Warp* waiting = nullptr;
    for (Warp& w : b.warps) {
      if (w.done) continue;
      if (w.wait.ready != nullptr && !w.wait.ready(w)) {
        waiting = &w;
      } else {
        ready.push_back(&w);
      }
    }
    if (ready.empty()) {
      if (waiting == nullptr) break;
      waiting->fail(*waiting->wait.at, -1, stuck(b));
    }
    Warp& w = *ready[l.draw(ready.size())];
    w.wait = Wait{};
    run_warp(l, w);
    if (l.tick && l.counters.instructions >= next_tick) {
      l.tick();
      next_tick = l.counters.instructions + kTickEvery;
    }
  }
  count_events(b);
  if (const std::string left = left_in_flight(b); !left.empty())
    b.warps[0].finding(l.program->instructions.back(), -1, "the block ends while " + left);
}

}  // namespace

uint64_t Launch::draw(uint64_t below) {
  random ^= random << 13;
  random ^= random >> 7;
  random ^= random << 17;
  return (random >> 11) % below;
}

std::string Finding::text() const {
  std::ostringstream out;
  out << kernel << ", line " << line << " (" << opcode << ")";
  if (!source.empty()) out << " from " << source;
  out << ": " << what << "\n  block (" << block[0] << ", " << block[1] << ", " << block[2] << "), warp " << warp;
  if (lane >= 0) out << ", lane " << lane;
  return out.str();
}

void run(Launch& l) {
  check_launch(l);
  const Program& p = *l.program;
  l.counters.executed.assign(p.instructions.size(), 0);
  l.counters.accesses.assign(p.instructions.size(), LineCount{});
  Storage storage;
  make_warps(l, storage);
  std::vector<int64_t> order(static_cast<size_t>(product(l.grid)));
  std::iota(order.begin(), order.end(), 0);
  for (size_t i = order.size() - 1; i > 0; --i) std::swap(order[i], order[l.draw(i + 1)]);
  for (int64_t number : order) run_block(l, storage, number);
}

}  // namespace ptx
