// ldmatrix, stmatrix, mma.sync: matrices of a warp. Layouts: resnet_fast/fragments.h and emulator/product.h.

#include <cstring>

#include <emulator/product.h>
#include <resnet_fast/fragments.h>

#include "asynchronous.h"
#include "families.h"
#include "machine.h"

namespace ptx {
namespace {

constexpr int kRows = 8, kRowBytes = 16;  // of an 8 x 8 matrix of 16 bits

// The lane and the half of its word that hold element (row, column) of a matrix.
struct Element {
  int lane, half;
};

Element element(int row, int column, bool transposed) {
  if (transposed) std::swap(row, column);
  return {row * 4 + column / 2, column % 2};
}

// Lane 8 m + r names the place of row r of matrix m.
struct RowAddresses {
  std::array<uint64_t, kWarp> at{};
  uint32_t lanes = 0;
};

RowAddresses rows_of(Warp& w, const Instruction& i, const Slot& address, int matrices) {
  w.require_together(i);
  RowAddresses rows;
  rows.lanes = matrices == 4 ? kAllLanes : (1u << kRows * matrices) - 1;
  const uint32_t active = w.active;
  w.active &= rows.lanes;
  w.require(i, address, "the address");
  w.active = active;
  for (int lane = 0; lane < kRows * matrices; ++lane) {
    rows.at[lane] = shared_address_of(w, address, lane);
    w.block->shared.check_bounds(w, i, lane, static_cast<int64_t>(rows.at[lane]), kRowBytes, kRowBytes);
  }
  LineCount& line = w.launch->line(i);
  const Rounds rounds = bank_rounds(rows.at.data(), rows.lanes, kRowBytes);
  line.instructions += 1;
  line.wavefronts += rounds.wavefronts;
  line.ideal += rounds.ideal;
  return rows;
}

void run_ldmatrix(Warp& w, const Instruction& i) {
  const int matrices = i.part[0].count;
  const RowAddresses rows = rows_of(w, i, i.at(1), matrices);
  for (int m = 0; m < matrices; ++m) {
    uint32_t words[kWarp] = {}, defined = kAllLanes;
    for (int row = 0; row < kRows; ++row) {
      const int lane = kRows * m + row;
      const auto at = static_cast<int64_t>(rows.at[lane]);
      const bool known = w.block->shared.check_read(w, i, lane, at, kRowBytes);
      uint16_t values[kRows];
      std::memcpy(values, w.block->shared.data() + at, kRowBytes);
      for (int column = 0; column < kRows; ++column) {
        const Element to = element(row, column, i.flags != 0);
        words[to.lane] |= static_cast<uint32_t>(values[column]) << 16 * to.half;
        if (!known && !w.block->shared.is_defined(at + 2 * column, 2)) defined &= ~(1u << to.lane);
      }
    }
    w.put(i, i.at(0, m), words, defined);
  }
}

void run_stmatrix(Warp& w, const Instruction& i) {
  const int matrices = i.part[1].count;
  const RowAddresses rows = rows_of(w, i, i.at(0), matrices);
  for (int m = 0; m < matrices; ++m) {
    const Slot& slot = i.at(1, m);
    const uint32_t defined = w.defined(i, slot);
    const uint32_t* words = w.in<uint32_t>(slot);
    for (int row = 0; row < kRows; ++row) {
      uint16_t values[kRows];
      uint32_t unknown = 0;  // columns
      for (int column = 0; column < kRows; ++column) {
        const Element from = element(row, column, i.flags != 0);
        values[column] = static_cast<uint16_t>(words[from.lane] >> 16 * from.half);
        unknown |= (~defined >> from.lane & 1) << column;
      }
      const int lane = kRows * m + row;
      const auto at = static_cast<int64_t>(rows.at[lane]);
      w.block->shared.check_write(w, i, lane, at, kRowBytes, unknown == 0 ? kWritten : kUndefined, values);
      std::memcpy(w.block->shared.data() + at, values, kRowBytes);
      for (int column = 0; column < kRows && unknown != 0; ++column)
        if (!(unknown >> column & 1)) w.block->shared.set_state(at + 2 * column, 2, kWritten);
    }
  }
}

// Operand a, (16, depth), of its words' lanes; and b, (depth, 8). `widened` makes one number of 16 bits, or of 32.
template <class Number, class F>
void unpack_a(const uint32_t* from, int word, int depth, float* a, F widened) {
  for (int lane = 0; lane < kWarp; ++lane) {
    if (sizeof(Number) == 4) {
      a[emulator::a_row32(lane, word) * depth + emulator::a_k32(lane, word)] = widened(static_cast<Number>(from[lane]));
    } else {
      float* to = a + resnet_fast::a_row(lane, word) * depth + resnet_fast::a_k(lane, word);
      to[0] = widened(static_cast<Number>(from[lane]));
      to[1] = widened(static_cast<Number>(from[lane] >> 16));
    }
  }
}

template <class Number, class F>
void unpack_b(const uint32_t* from, int word, int columns, float* b, F widened) {
  for (int lane = 0; lane < kWarp; ++lane) {
    if (sizeof(Number) == 4) {
      b[emulator::b_k32(lane, word) * columns + emulator::b_column32(lane)] = widened(static_cast<Number>(from[lane]));
    } else {
      float* to = b + resnet_fast::b_k(lane, word) * columns + resnet_fast::b_column(lane);
      to[0] = widened(static_cast<Number>(from[lane]));
      to[columns] = widened(static_cast<Number>(from[lane] >> 16));
    }
  }
}

constexpr int kM = 16, kN = 8;

// The lanes' bits of row r (of column n) of d, which come from lanes that hold row r of a (column n of b).
uint32_t rows_of_a(uint32_t lanes, int word) {
  uint32_t rows = 0;
  for (int lane = 0; lane < kWarp; ++lane) rows |= (lanes >> lane & 1) << resnet_fast::a_row(lane, word);
  return rows;
}
uint32_t columns_of_b(uint32_t lanes) {
  uint32_t columns = 0;
  for (int lane = 0; lane < kWarp; ++lane) columns |= (lanes >> lane & 1) << resnet_fast::b_column(lane);
  return columns;
}

// d (16 x 8) = a (16 x depth) . b (depth x 8) + c, in fp32.
void run_mma(Warp& w, const Instruction& i) {
  constexpr int kMostDepth = 16;
  w.require_together(i);
  const auto depth = static_cast<int>(i.number);
  float a[kM * kMostDepth], b[kMostDepth * kN], d[kM * kN];
  // A value of d is defined if its row of a, its column of b and its c are: compilers leave what lies beyond a tensor
  // undefined, and do not store what comes of it.
  uint32_t rows = 0, columns = 0;  // that have an undefined value
  for (int word = 0; word < i.part[1].count; ++word) {
    const Slot& slot = i.at(1, word);
    const uint32_t* from = w.in<uint32_t>(slot);
    if (const uint32_t missing = ~w.defined(i, slot)) rows |= rows_of_a(missing, word);
    if (i.type == Type::kTF32) {
      unpack_a<uint32_t>(from, word, depth, a, [](uint32_t raw) { return emulator::float_of_tf32(raw); });
    } else if (i.type == Type::kBF16) {
      unpack_a<uint16_t>(from, word, depth, a, [](uint16_t raw) { return emulator::float_of_bfloat16(raw); });
    } else {
      unpack_a<uint16_t>(from, word, depth, a, [](uint16_t raw) { return emulator::float_of_half(raw); });
    }
  }
  for (int word = 0; word < i.part[2].count; ++word) {
    const Slot& slot = i.at(2, word);
    const uint32_t* from = w.in<uint32_t>(slot);
    if (const uint32_t missing = ~w.defined(i, slot)) columns |= columns_of_b(missing);
    if (i.type == Type::kTF32) {
      unpack_b<uint32_t>(from, word, kN, b, [](uint32_t raw) { return emulator::float_of_tf32(raw); });
    } else if (i.type == Type::kBF16) {
      unpack_b<uint16_t>(from, word, kN, b, [](uint16_t raw) { return emulator::float_of_bfloat16(raw); });
    } else {
      unpack_b<uint16_t>(from, word, kN, b, [](uint16_t raw) { return emulator::float_of_half(raw); });
    }
  }
  const auto of_d = [](int lane, int n) { return resnet_fast::d_row(lane, n) * kN + resnet_fast::d_column(lane, n); };
  uint32_t defined[4];
  for (int n = 0; n < 4; ++n) {
    defined[n] = w.defined(i, i.at(3, n));
    const float* from = w.in<float>(i.at(3, n));
    for (int lane = 0; lane < kWarp; ++lane) d[of_d(lane, n)] = from[lane];
    if ((rows | columns) == 0) continue;
    for (int lane = 0; lane < kWarp; ++lane)
      if ((rows >> resnet_fast::d_row(lane, n) & 1) || (columns >> resnet_fast::d_column(lane, n) & 1))
        defined[n] &= ~(1u << lane);
  }
  emulator::multiply_add(d, a, b, kM, kN, depth);
  for (int n = 0; n < 4; ++n) {
    float out[kWarp];
    for (int lane = 0; lane < kWarp; ++lane) out[lane] = d[of_d(lane, n)];
    w.put(i, i.at(0, n), out, defined[n]);
  }
  Asynchronous& counts = *w.block->asynchronous;
  counts.mma += 1;
  counts.mma_multiply_adds += int64_t{kM} * kN * depth;
}

}  // namespace

Form decode_ldmatrix(Modifiers& m) {
  Form f;
  const bool loads = m.name() == "ldmatrix";
  const bool named = m.take("sync") & m.take("aligned") & m.take("m8n8") & m.take("b16");
  const std::string count = m.take_one({"x1", "x2", "x4"});
  f.flags = m.take("trans");
  const bool shared = m.take("shared") || m.take("shared::cta");
  if (!named || !shared || count.empty()) return f;
  const uint16_t registers = static_cast<uint16_t>(count[1] - '0');
  f.run = loads ? run_ldmatrix : run_stmatrix;
  f.wants = {{loads ? Want::kWriteMany : Want::kReadMany, Type::kB32}, {Want::kMemory}};
  f.wants[0].count = registers;
  if (!loads) std::swap(f.wants[0], f.wants[1]);
  return f;
}

Form decode_mma(Modifiers& m) {
  Form f;
  const bool named = m.take("sync") & m.take("aligned") & m.take("row") & m.take("col");
  const std::string shape = m.take_one({"m16n8k16", "m16n8k8", "m16n8k4"});
  const Type d = m.take_type(), a = m.take_type(), b = m.take_type(), c = m.take_type();
  const bool narrow = a == Type::kBF16 || a == Type::kF16;
  if (!named || d != Type::kF32 || c != d || a != b) return f;
  if (!(narrow && (shape == "m16n8k16" || shape == "m16n8k8")) && !(a == Type::kTF32 && shape != "m16n8k16")) return f;
  if (shape.empty()) return f;
  f.type = a;
  f.number = std::stoi(shape.substr(shape.find('k') + 1));
  const auto words = static_cast<uint16_t>(f.number / (narrow ? 4 : 2));
  f.run = run_mma;
  f.wants = {{Want::kWriteMany, Type::kB32},
             {Want::kReadMany, Type::kB32},
             {Want::kReadMany, Type::kB32},
             {Want::kReadMany, Type::kB32}};
  f.wants[0].count = f.wants[3].count = 4;
  f.wants[1].count = words;
  f.wants[2].count = static_cast<uint16_t>(words / 2);
  return f;
}

}  // namespace ptx
