// wgmma: products of four warps that read shared memory and registers while the warps go on.
//
// What is checked, at wgmma.mma_async: the four warps come to the same instructions in the same order with the same
// descriptors; the bytes of a and b are written, by writes that are ordered before, and that a fence.proxy.async
// follows if they were made by threads; registers are not written between the last wgmma.fence and the product, except
// by a product of the same shape; until wgmma.wait_group nobody touches the registers, or writes the bytes.

#include <algorithm>
#include <cstring>

#include <emulator/operand.h>

#include "asynchronous.h"
#include "families.h"
#include "fragments.h"
#include "machine.h"

namespace ptx {
namespace {

constexpr int kRows = 64, kRowsOfWarp = 16;
constexpr int kChunk = emulator::kChunkBytes;

// Operands. Transpositions: of b alone if a comes from registers.
enum { kD, kA, kB, kScaleD, kScaleA, kScaleB, kTransposeFirst, kTransposeSecond };

struct Shape {
  int columns, depth, element;  // bytes of an operand's element
  explicit Shape(const Instruction& i)
      : columns(static_cast<int>(i.number)),
        depth(i.type == Type::kTF32 ? 8 : 16),
        element(i.type == Type::kTF32 ? 4 : 2) {
  }
  int of_chunk() const {
    return kChunk / element;
  }
};

// The numbers of a chunk.
void widen_chunk(Type type, const unsigned char* from, float* to) {
  with_numbers(type, [&](auto number) {
    using Number = decltype(number);
    constexpr int kNumbers = kChunk / static_cast<int>(sizeof(typename Number::Raw));
    typename Number::Raw raw[kNumbers];
    std::memcpy(raw, from, sizeof(raw));
    for (int n = 0; n < kNumbers; ++n) to[n] = Number::widened(raw[n]);
  });
}

// Whether operand a is in shared memory: a descriptor in place of registers.
bool shares_a(const Instruction& i) {
  return i.part[kA].count == 1;
}

bool flag(const Instruction& i, int operand) {
  return i.parts > operand && i.at(operand).plus != 0;
}

// Calls f(address, row, k) for each chunk of rows `first` to `end` of an operand: its values lie along k, or along rows
// if k is across the rows.
template <class F>
void for_chunks(const emulator::Operand& operand, const Shape& s, bool across, int first, int end, F f) {
  const int each = s.of_chunk();
  if (!across) {
    for (int row = first; row < end; ++row)
      for (int chunk = 0; chunk < s.depth / each; ++chunk) f(operand.along(row, chunk), row, chunk * each);
    return;
  }
  for (int k = 0; k < s.depth; ++k)
    for (int chunk = first / each; chunk < end / each; ++chunk) f(operand.across(k, chunk), chunk * each, k);
}

emulator::Operand operand_of(Warp& w, const Instruction& i, uint64_t descriptor) {
  const emulator::Operand operand(descriptor);
  if (!operand.starts_with_pattern())
    w.fail(i, -1,
           "multiplies rows from shared memory byte " + std::to_string(operand.start) + " in groups " +
               std::to_string(operand.stride) + " bytes apart, which do not start where the swizzle's pattern of " +
               std::to_string(operand.pitch) + " bytes does");
  return operand;
}

// Where row r of b stands in memory: its columns are in the order of fragments.h.
int place_of_row(int r, bool of_b) {
  return of_b ? r / kColumns * kColumns + place_of_column(r % kColumns) : r;
}

// Reads rows `first` to `end` of an operand into `to`, (rows, depth) or, for b, (depth, rows). What the bytes need is
// added to `needed`.
void read_operand(Warp& w, const Instruction& i, Product& p, uint64_t descriptor, bool across, int first, int end,
                  bool of_b, std::vector<float>& to, std::vector<bool>& undefined, std::vector<Needed>& needed) {
  const Shape s(i);
  SharedMemory& shared = w.block->shared;
  const int each = s.of_chunk();
  const int row_step = of_b ? 1 : s.depth, depth_step = of_b ? end : 1;  // between values of `to`
  for_chunks(operand_of(w, i, descriptor), s, across, first, end, [&](uint32_t at, int row, int k) {
    shared.check_bounds(w, i, -1, at, kChunk, kChunk);
    const bool defined = shared.collect(w, i, at, kChunk, "multiplies", needed);
    shared.add_read(p.reads, at);
    float values[kChunk / 2];
    widen_chunk(i.type, shared.data() + at, values);
    if (across) {
      for (int e = 0; e < each; ++e) to[place_of_row(row + e, of_b) * row_step + k * depth_step] = values[e];
    } else {
      float* place = &to[place_of_row(row, of_b) * row_step + k * depth_step];
      for (int e = 0; e < each; ++e) place[e * depth_step] = values[e];
    }
    if (defined) return;
    for (int e = 0; e < each; ++e)
      if (!shared.is_defined(at + e * s.element, s.element)) undefined[across ? row + e : row] = true;
  });
}

std::shared_ptr<Product> first_of_group(Warp& w, const Instruction& i, uint64_t a, uint64_t b, bool accumulates) {
  const Shape s(i);
  const auto p = std::make_shared<Product>();
  p->at = &i;
  p->first_warp = w.index;
  p->a_descriptor = a;
  p->b_descriptor = b;
  p->accumulates = accumulates;
  p->reads = w.block->shared.begin_reads(w.index / kWarpsOfGroup * kWarpsOfGroup, kWarpsOfGroup, i.line, "a wgmma");
  p->b.resize(static_cast<size_t>(s.depth) * s.columns);
  p->undefined_rows.resize(kRows);
  p->undefined_columns.resize(s.columns);
  read_operand(w, i, *p, b, flag(i, shares_a(i) ? kTransposeSecond : kTransposeFirst), 0, s.columns, true, p->b,
               p->undefined_columns, p->needed[kWarpsOfGroup]);
  if (shares_a(i)) {
    p->a.resize(static_cast<size_t>(kRows) * s.depth);
    for (int part = 0; part < kWarpsOfGroup; ++part)
      read_operand(w, i, *p, a, flag(i, kTransposeFirst), part * kRowsOfWarp, (part + 1) * kRowsOfWarp, false, p->a,
                   p->undefined_rows, p->needed[part]);
  }
  return p;
}

uint64_t descriptor_of(Warp& w, const Instruction& i, const Slot& slot) {
  w.require(i, slot, "a descriptor");
  const uint64_t* values = w.in<uint64_t>(slot);
  for (int lane = 1; lane < kWarp; ++lane)
    if (values[lane] != values[0]) w.fail(i, lane, "a descriptor differs between lanes of the warp");
  return values[0];
}

// The product that this warp takes part in: its n-th, which another warp of the group may have come to before.
std::shared_ptr<Product> product_of(Warp& w, const Instruction& i, bool accumulates) {
  const uint64_t a = shares_a(i) ? descriptor_of(w, i, i.at(kA)) : 0, b = descriptor_of(w, i, i.at(kB));
  const int index = w.index / kWarpsOfGroup;
  if ((index + 1) * kWarpsOfGroup > static_cast<int>(w.block->warps.size()))
    w.fail(
        i, -1,
        "needs four warps, from a multiple of four on, of a block that has " + std::to_string(w.block->warps.size()));
  OfGroup& group = w.block->asynchronous->groups[index];
  const uint64_t n = of(w).wgmmas++ - group.finished;
  if (n == group.products.size()) group.products.push_back(first_of_group(w, i, a, b, accumulates));
  const std::shared_ptr<Product> p = group.products[n];
  const std::string first = "warp " + std::to_string(p->first_warp) + " of its warpgroup";
  if (p->at != &i)
    w.fail(i, -1, "is at another product than " + first + ", which is at line " + std::to_string(p->at->line));
  if (p->a_descriptor != a || p->b_descriptor != b || p->accumulates != accumulates)
    w.fail(i, -1, "names other operands than " + first);
  if (++p->warps == kWarpsOfGroup) {
    while (!group.products.empty() && group.products.front()->warps == kWarpsOfGroup) {
      group.products.pop_front();
      ++group.finished;
    }
    w.launch->counters.events["wgmma"] += 1;
    w.launch->counters.events["wgmma_multiply_adds"] += int64_t{kRows} * Shape(i).columns * Shape(i).depth;
  }
  return p;
}

// ---- registers ----

void run_fence(Warp& w, const Instruction& i);

// Whether a mov between the last wgmma.fence and the product writes the register. Compilers leave copies of
// accumulators and packed operands there, which ptxas merges or moves in front of the fence.
bool is_copied(const Warp& w, const Instruction& i, int32_t reg) {
  const Program& program = *w.launch->program;
  for (const Instruction* other = &i - 1; other >= program.instructions.data() && other->run != run_fence; --other)
    if (other->parts > 0 && other->at(0).reg == reg && program.opcodes[other->opcode].rfind("mov.", 0) == 0)
      return true;
  return false;
}

// A register of a product must not have been written since the last wgmma.fence, but by products.
void expect_fenced(Warp& w, const Instruction& i, const Slot& s) {
  const OfWarp& mine = of(w);
  const bool kept = std::memcmp(mine.snapshot.data() + mine.kept_at[s.reg] * kWarp, w.in<uint32_t>(s), 4 * kWarp) == 0;
  if (mine.fenced && (kept || is_copied(w, i, s.reg))) return;
  w.finding(i, -1,
            "takes register " + w.launch->program->registers[s.reg] +
                (mine.fenced ? ", which was written after the last wgmma.fence" : ", and no wgmma.fence came before"));
}

void keep(Warp& w, const Slot& s) {
  OfWarp& mine = of(w);
  std::memcpy(mine.snapshot.data() + mine.kept_at[s.reg] * kWarp, w.in<uint32_t>(s), 4 * kWarp);
}

void take_accumulator(Warp& w, const Instruction& i, const Slot& s) {
  RegisterUse& use = of(w).uses[s.reg];
  const auto shape = static_cast<int32_t>(i.number);
  const bool in_flight = use.accumulates > 0 || use.copied;
  if (use.reads > 0 || (in_flight && use.shape != shape)) w.used_while_pending(i, s);
  expect_fenced(w, i, s);
  use.accumulates += 1;
  use.shape = shape;
  use.last = of(w).wgmmas;
}

void take_operand(Warp& w, const Instruction& i, const Slot& s) {
  RegisterUse& use = of(w).uses[s.reg];
  if (use.accumulates > 0 || use.copied) w.used_while_pending(i, s);
  expect_fenced(w, i, s);
  use.reads += 1;
}

void set_pending(Warp& w, int32_t reg, bool pending) {
  const uint32_t lanes = pending ? kAllLanes : 0;
  if (w.pending[reg] == lanes) return;
  w.pending[reg] = lanes;
  w.pending_registers += pending ? 1 : -1;
}

void end_if_unused(Warp& w, int32_t reg) {
  const RegisterUse& use = of(w).uses[reg];
  if (use.accumulates == 0 && use.reads == 0 && !use.copied) set_pending(w, reg, false);
}

void give_back(Warp& w, int32_t reg, int RegisterUse::* count) {
  of(w).uses[reg].*count -= 1;
  end_if_unused(w, reg);
}

}  // namespace

// The products' results are known already, so the copy has its value. Where another accumulator was, that one must have
// been copied in its turn, or be lost: either way this register holds the copy.
bool move_accumulator(Warp& w, const Instruction& i) {
  const Slot &to = i.slot[0], &from = i.slot[1];
  OfWarp& mine = of(w);
  if (to.absent || mine.uses.empty()) return false;
  const RegisterUse& origin = mine.uses[from.reg];
  RegisterUse& use = mine.uses[to.reg];
  if ((origin.accumulates == 0 && !origin.copied) || origin.reads > 0 || use.reads > 0) return false;
  w.require_together(i);
  uint32_t undefined[kWarp];
  for (int lane = 0; lane < kWarp; ++lane) undefined[lane] = w.undefined_in<uint32_t>(from, lane);
  set_pending(w, to.reg, false);
  w.put(i, to, w.in<uint32_t>(from), w.written[from.reg]);
  w.note_bits(to, undefined);
  set_pending(w, to.reg, true);
  if (!use.copied) mine.copied.push_back(to.reg);
  use.copied = true;
  use.shape = origin.shape;
  use.last = origin.last;
  return true;
}

namespace {

// ---- instructions ----

void run_wgmma(Warp& w, const Instruction& i) {
  w.require_together(i);
  const Shape s(i);
  w.require(i, i.at(kScaleD), "the predicate scale-d");
  const uint32_t scale = w.mask(i.at(kScaleD));
  if (scale != 0 && scale != kAllLanes) w.fail(i, -1, "the predicate scale-d differs between lanes of the warp");
  const bool accumulates = scale != 0;
  const std::shared_ptr<Product> p = product_of(w, i, accumulates);
  const int part = w.index % kWarpsOfGroup;
  w.block->shared.check_needed(w, i, "multiplies", p->needed[kWarpsOfGroup]);
  w.block->shared.check_needed(w, i, "multiplies", p->needed[part]);

  constexpr int kMostDepth = 16, kMostColumns = 256;
  alignas(64) float a[kRowsOfWarp * kMostDepth], d[kRowsOfWarp * kMostColumns];
  // As for mma: a value of d is defined if its row of a, its column of b and what it is added to are.
  uint32_t undefined_rows = 0;
  for (int row = 0; row < kRowsOfWarp; ++row)
    undefined_rows |= static_cast<uint32_t>(p->undefined_rows[part * kRowsOfWarp + row]) << row;
  if (shares_a(i)) {
    std::copy_n(p->a.begin() + static_cast<ptrdiff_t>(part) * kRowsOfWarp * s.depth, kRowsOfWarp * s.depth, a);
  } else {
    for (int word = 0; word < i.part[kA].count; ++word) {
      const Slot& slot = i.at(kA, word);
      take_operand(w, i, slot);
      for (uint32_t missing = ~w.written[slot.reg]; missing != 0; missing &= missing - 1)
        undefined_rows |= 1u << resnet_fast::a_row(first_lane(missing), word);
      with_numbers(i.type, [&](auto number) { unpack_a<decltype(number)>(w.in<uint32_t>(slot), word, s.depth, a); });
    }
  }
  const bool negates = (i.at(kScaleA).plus < 0) != (i.at(kScaleB).plus < 0);
  if (negates)
    for (int n = 0; n < kRowsOfWarp * s.depth; ++n) a[n] = -a[n];

  const auto columns_from = [](int n) { return n / 4 * kColumns; };  // of the block that float n belongs to
  if (!accumulates) std::fill_n(d, kRowsOfWarp * s.columns, 0.0f);
  for (int n = 0; n < i.part[kD].count; ++n) {
    const Slot& slot = i.at(kD, n);
    take_accumulator(w, i, slot);
    if (accumulates) unpack_d(w.in<float>(slot), n % 4, s.columns, d + columns_from(n));
  }
  emulator::multiply_add(d, a, p->b.data(), kRowsOfWarp, s.columns, s.depth);
  const bool partly = undefined_rows != 0 || p->has_undefined_columns();
  for (int n = 0; n < i.part[kD].count; ++n) {
    const Slot& slot = i.at(kD, n);
    pack_d(d + columns_from(n), n % 4, s.columns, w.out<float>(slot));
    if (!accumulates) w.written[slot.reg] = kAllLanes;
    for (int lane = 0; lane < kWarp && partly; ++lane)
      if ((undefined_rows >> resnet_fast::d_row(lane, n % 4) & 1) ||
          p->undefined_columns[columns_from(n) + resnet_fast::d_column(lane, n % 4)])
        w.written[slot.reg] &= ~(1u << lane);
    keep(w, slot);
    set_pending(w, slot.reg, true);
  }
  if (!shares_a(i))
    for (int word = 0; word < i.part[kA].count; ++word) set_pending(w, i.at(kA, word).reg, true);
  of(w).products.push_back(p);
}

void run_fence(Warp& w, const Instruction& i) {
  w.require_together(i);
  OfWarp& mine = of(w);
  mine.fenced = true;
  for (const Slot& slot : w.block->asynchronous->product_registers) keep(w, slot);
}

void run_commit(Warp& w, const Instruction& i) {
  w.require_together(i);
  OfWarp& mine = of(w);
  mine.product_groups.push_back(std::move(mine.products));
  mine.products.clear();
}

void run_wait(Warp& w, const Instruction& i) {
  w.require_together(i);
  OfWarp& mine = of(w);
  const auto most = static_cast<size_t>(i.at(0).plus);
  while (mine.product_groups.size() > most) {
    for (const std::shared_ptr<Product>& product : mine.product_groups.front()) {
      const Instruction& at = *product->at;
      for (int n = 0; n < at.part[kD].count; ++n) give_back(w, at.at(kD, n).reg, &RegisterUse::accumulates);
      for (int n = 0; n < at.part[kA].count && !shares_a(at); ++n) give_back(w, at.at(kA, n).reg, &RegisterUse::reads);
      w.block->shared.end_reads(product->reads, w.index);
      mine.ended += 1;
    }
    mine.product_groups.pop_front();
  }
  const auto over = [&](int32_t reg) {
    if (mine.uses[reg].last > mine.ended) return false;
    mine.uses[reg].copied = false;
    end_if_unused(w, reg);
    return true;
  };
  mine.copied.erase(std::remove_if(mine.copied.begin(), mine.copied.end(), over), mine.copied.end());
}

}  // namespace

void start_products(Block& b) {
  const Program& program = *b.launch->program;
  std::vector<int32_t> kept_at(program.registers.size(), -1);
  std::vector<Slot>& kept = b.asynchronous->product_registers;
  for (const Instruction& i : program.instructions) {
    if (i.run != run_wgmma) continue;
    for (int operand : {kD, kA}) {
      if (operand == kA && shares_a(i)) continue;
      for (int e = 0; e < i.part[operand].count; ++e) {
        const Slot& slot = i.at(operand, e);
        if (kept_at[slot.reg] >= 0) continue;
        kept_at[slot.reg] = static_cast<int32_t>(kept.size());
        kept.push_back(slot);
      }
    }
  }
  if (kept.empty()) return;
  for (OfWarp& warp : b.asynchronous->warps) {
    warp.kept_at = kept_at;
    warp.snapshot.resize(kept.size() * kWarp);
    warp.uses.resize(program.registers.size());
  }
}

Form decode_wgmma(Modifiers& m) {
  Form f;
  const bool named = m.take("sync") & m.take("aligned");
  if (!named) return f;
  if (m.take("fence")) {
    f.run = run_fence;
    return f;
  }
  if (m.take("commit_group")) {
    f.run = run_commit;
    return f;
  }
  if (m.take("wait_group")) {
    f.run = run_wait;
    f.wants = {{Want::kConstant}};
    return f;
  }
  if (!m.take("mma_async")) return f;
  for (int columns = 8; columns <= 256; columns += 8) {
    const std::string shape = "m64n" + std::to_string(columns);
    for (const char* depth : {"k16", "k8"})
      if (m.take((shape + depth).c_str())) {
        f.number = columns;
        f.flags = depth == std::string("k8");
      }
  }
  const bool shallow = f.flags != 0;
  const Type d = m.take_type();
  const Type a = m.take_type(), b = m.take_type();
  f.flags = 0;
  f.type = a;
  const bool narrow = a == Type::kBF16 || a == Type::kF16;
  if (f.number == 0 || d != Type::kF32 || a != b || !(shallow ? a == Type::kTF32 : narrow)) return f;
  f.run = run_wgmma;
  f.wants = {{Want::kWriteMany, Type::kB32}, {Want::kReadMany}, {Want::kRead, Type::kB64},
             {Want::kRead, Type::kPred},     {Want::kConstant}, {Want::kConstant}};
  f.wants[0].count = static_cast<uint16_t>(f.number / 2);
  if (narrow) {
    f.wants.push_back({Want::kConstant, Type::kNone, true});
    f.wants.push_back({Want::kConstant, Type::kNone, true});
  }
  return f;
}

}  // namespace ptx
