// The fragments of mma and wgmma as arrays: what 32 lanes hold of a matrix, put in rows and taken out of them.
//
// The four lanes 4 g to 4 g + 3 together hold row g of a quarter of a or of d, and column g of a half of b, one value
// after another. So a register of 32 lanes is a matrix of eight rows in memory, and rows are copied whole. Of d, one
// register has the even and another the odd columns: in the arrays here, the eight columns of a block stand in the
// order 0 2 4 6 1 3 5 7, and those of b likewise. The layouts are those of resnet_fast/fragments.h and
// emulator/product.h, which tests compare with CuTe's traits; agrees() compares this file with them.
#pragma once

#include <cstdint>
#include <cstring>

#include <emulator/product.h>
#include <resnet_fast/fragments.h>

#include "types.h"

namespace ptx {

constexpr int kGroups = 8;   // of four lanes
constexpr int kHalfRow = 4;  // values of d that a group holds in one register
constexpr int kColumns = 8;  // of a block of d

// Where a column of a block stands.
constexpr int place_of_column(int column) {
  return column / 2 + kHalfRow * (column % 2);
}

// One number of an operand, as tensor cores read it.
struct OfBFloat16 {
  using Raw = uint16_t;
  static float widened(Raw raw) {
    return emulator::float_of_bfloat16(raw);
  }
};
struct OfHalf {
  using Raw = uint16_t;
  static float widened(Raw raw) {
    return emulator::float_of_half(raw);
  }
};
struct OfTF32 {
  using Raw = uint32_t;
  static float widened(Raw raw) {
    return emulator::float_of_tf32(raw);
  }
};

// Calls f with the numbers of a type of operands.
template <class F>
inline void with_numbers(Type type, F f) {
  if (type == Type::kTF32) return f(OfTF32{});
  if (type == Type::kBF16) return f(OfBFloat16{});
  f(OfHalf{});
}

// Values of k that a group holds of a row in one register.
template <class Number>
constexpr int kDepthOfWord = 16 / static_cast<int>(sizeof(typename Number::Raw));

// Operand a, (16, depth), of word `word` of 32 lanes.
template <class Number>
inline void unpack_a(const uint32_t* from, int word, int depth, float* a) {
  constexpr int kDepth = kDepthOfWord<Number>;
  typename Number::Raw raw[kGroups][kDepth];
  std::memcpy(raw, from, sizeof(raw));
  for (int g = 0; g < kGroups; ++g) {
    float* row = a + (g + kGroups * (word & 1)) * depth + kDepth * (word >> 1);
    for (int k = 0; k < kDepth; ++k) row[k] = Number::widened(raw[g][k]);
  }
}

// Operand b, (depth, 8), of word `word` of 32 lanes.
template <class Number>
inline void unpack_b(const uint32_t* from, int word, float* b) {
  constexpr int kDepth = kDepthOfWord<Number>;
  typename Number::Raw raw[kGroups][kDepth];
  std::memcpy(raw, from, sizeof(raw));
  float wide[kGroups][kDepth];
  for (int g = 0; g < kGroups; ++g)
    for (int k = 0; k < kDepth; ++k) wide[g][k] = Number::widened(raw[g][k]);
  for (int k = 0; k < kDepth; ++k)
    for (int g = 0; g < kGroups; ++g) b[(kDepth * word + k) * kColumns + place_of_column(g)] = wide[g][k];
}

// Float `n` of 32 lanes of d, whose rows are `columns` apart: into the array, and out of it.
inline void unpack_d(const float* from, int n, int columns, float* d) {
  float* first = d + (n >> 1) * kGroups * columns + (n & 1) * kHalfRow;
  for (int g = 0; g < kGroups; ++g) std::memcpy(first + g * columns, from + g * kHalfRow, kHalfRow * sizeof(float));
}
inline void pack_d(const float* d, int n, int columns, float* to) {
  const float* first = d + (n >> 1) * kGroups * columns + (n & 1) * kHalfRow;
  for (int g = 0; g < kGroups; ++g) std::memcpy(to + g * kHalfRow, first + g * columns, kHalfRow * sizeof(float));
}

// Whether the copies above are the layouts of fragments.h and product.h.
constexpr bool agrees() {
  for (int lane = 0; lane < kWarp; ++lane) {
    const int g = lane / 4, q = lane % 4;
    for (int word = 0; word < 4; ++word) {
      if (resnet_fast::a_row(lane, word) != g + kGroups * (word & 1)) return false;
      if (resnet_fast::a_k(lane, word) != 8 * (word >> 1) + 2 * q) return false;
      if (emulator::a_row32(lane, word) != g + kGroups * (word & 1)) return false;
      if (emulator::a_k32(lane, word) != 4 * (word >> 1) + q) return false;
      if (resnet_fast::d_row(lane, word) != g + kGroups * (word >> 1)) return false;
      if (place_of_column(resnet_fast::d_column(lane, word)) != kHalfRow * (word & 1) + q) return false;
    }
    for (int word = 0; word < 2; ++word) {
      if (resnet_fast::b_k(lane, word) != 8 * word + 2 * q || emulator::b_k32(lane, word) != 4 * word + q) return false;
      if (resnet_fast::b_column(lane) != g || emulator::b_column32(lane) != g) return false;
    }
  }
  return true;
}
static_assert(agrees());

}  // namespace ptx
