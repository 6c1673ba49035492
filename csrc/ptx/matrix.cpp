// ldmatrix, stmatrix, mma.sync: matrices of a warp. Layouts: fragments.h.

#include <cstring>

#include "apply.h"
#include "asynchronous.h"
#include "families.h"
#include "fragments.h"
#include "machine.h"

namespace ptx {
namespace {

constexpr int kRows = 8, kRowBytes = 16;  // of an 8 x 8 matrix of 16 bits

// A matrix of 16 bits is 32 words: its rows one after another, of four words each; transposed, its columns.
using Matrix = std::array<uint16_t, kRows * kRows>;

int place_in_matrix(int row, int column, bool transposed) {
  return transposed ? column * kRows + row : row * kRows + column;
}

void put_row(Matrix& m, int row, bool transposed, const unsigned char* from) {
  if (!transposed) {
    std::memcpy(&m[row * kRows], from, kRowBytes);
    return;
  }
  uint16_t values[kRows];
  std::memcpy(values, from, kRowBytes);
  for (int column = 0; column < kRows; ++column) m[column * kRows + row] = values[column];
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
  const bool transposed = i.flags != 0;
  const RowAddresses rows = rows_of(w, i, i.at(1), matrices);
  SharedMemory& shared = w.block->shared;
  for (int m = 0; m < matrices; ++m) {
    alignas(64) Matrix values;
    uint32_t words[kWarp];
    Halves halves;
    for (int row = 0; row < kRows; ++row) {
      const int lane = kRows * m + row;
      const auto at = static_cast<int64_t>(rows.at[lane]);
      const bool known = shared.check_read(w, i, lane, at, kRowBytes);
      put_row(values, row, transposed, shared.data() + at);
      for (int column = 0; column < kRows && !known; ++column) {
        const int place = place_in_matrix(row, column, transposed);
        if (!shared.is_defined(at + 2 * column, 2)) halves.lanes[place % 2] &= ~(1u << place / 2);
      }
    }
    std::memcpy(words, values.data(), sizeof(words));
    w.put(i, i.at(0, m), words, halves.lanes[0] & halves.lanes[1]);
    halves.keep(w, i.at(0, m));
  }
}

void run_stmatrix(Warp& w, const Instruction& i) {
  const int matrices = i.part[1].count;
  const bool transposed = i.flags != 0;
  const RowAddresses rows = rows_of(w, i, i.at(0), matrices);
  for (int m = 0; m < matrices; ++m) {
    const Slot& slot = i.at(1, m);
    const uint32_t defined[2] = {w.defined(i, slot, 0, 16), w.defined(i, slot, 16, 16)};
    Matrix held;
    std::memcpy(held.data(), w.in<uint32_t>(slot), sizeof(held));
    for (int row = 0; row < kRows; ++row) {
      uint16_t values[kRows];
      uint32_t unknown = 0;  // columns
      for (int column = 0; column < kRows; ++column) {
        const int from = place_in_matrix(row, column, transposed);
        values[column] = held[from];
        unknown |= (~defined[from % 2] >> from / 2 & 1) << column;
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
  alignas(64) float a[kM * kMostDepth], b[kMostDepth * kN], d[kM * kN];
  // A value of d is defined if its row of a, its column of b and its c are: compilers leave what lies beyond a tensor
  // undefined, and do not store what comes of it.
  uint32_t rows = 0, columns = 0;  // that have an undefined value
  with_numbers(i.type, [&](auto number) {
    using Number = decltype(number);
    for (int word = 0; word < i.part[1].count; ++word) {
      const Slot& slot = i.at(1, word);
      if (const uint32_t missing = ~w.defined(i, slot)) rows |= rows_of_a(missing, word);
      unpack_a<Number>(w.in<uint32_t>(slot), word, depth, a);
    }
    for (int word = 0; word < i.part[2].count; ++word) {
      const Slot& slot = i.at(2, word);
      if (const uint32_t missing = ~w.defined(i, slot)) columns |= columns_of_b(missing);
      unpack_b<Number>(w.in<uint32_t>(slot), word, b);
    }
  });
  uint32_t defined[4];
  for (int n = 0; n < 4; ++n) {
    defined[n] = w.defined(i, i.at(3, n));
    unpack_d(w.in<float>(i.at(3, n)), n, kN, d);
    if ((rows | columns) == 0) continue;
    for (int lane = 0; lane < kWarp; ++lane)
      if ((rows >> resnet_fast::d_row(lane, n) & 1) || (columns >> resnet_fast::d_column(lane, n) & 1))
        defined[n] &= ~(1u << lane);
  }
  emulator::multiply_add(d, a, b, kM, kN, depth);
  for (int n = 0; n < 4; ++n) {
    alignas(64) float out[kWarp];
    pack_d(d, n, kN, out);
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
