// The arithmetic of tensor cores, and the fragments that resnet_fast/fragments.h does not have.
//
// A tensor core multiplies exactly and adds in fp32, in an order and with a rounding that NVIDIA does not specify. Here
// the products are added one after another, k ascending, to the accumulator; each addition rounds to nearest even.
// Products of 16-bit numbers and of TF32 have at most 22 significant bits, so fp32 holds them exactly, apart from
// underflow. The distance to the exact sum is then at most depth * 2^-24 * sum |a b| (+ |d|), and a tensor core that
// truncates stays within twice of that: compare within depth * 2^-23.
#pragma once

#include <cstdint>
#include <cstring>

namespace emulator {

inline float float_of(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline uint32_t bits_of(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return bits;
}

inline float float_of_bfloat16(uint16_t raw) {
  return float_of(static_cast<uint32_t>(raw) << 16);
}

// Without a branch, for loops over lanes. The exponent's bias differs by 112, and subnormal numbers become normal ones.
inline float float_of_half(uint16_t raw) {
  constexpr float kBias = 5192296858534827628530496329220096.0f;  // 2^112
  const uint32_t rest = static_cast<uint32_t>(raw & 0x7fffu) << 13;
  const uint32_t finite = bits_of(float_of(rest) * kBias), special = rest | 0x7f800000u;
  return float_of((static_cast<uint32_t>(raw & 0x8000u) << 16) | (rest >= 0x7c00u << 13 ? special : finite));
}

// A tensor core reads the upper 19 bits of a TF32 operand and ignores the others.
inline float float_of_tf32(uint32_t raw) {
  return float_of(raw & 0xffffe000u);
}

// Eight columns of a product, as a compiler keeps them in vector registers.
using Eight = float __attribute__((vector_size(32)));
constexpr int kEight = 8;

// A block of kRows rows and kVectors times eight columns: d[row * columns + ...] += a[row * depth + k] * b[k * columns
// +
// ...]. Its sums stay in registers, so that a value of b is loaded once for all rows.
template <int kRows, int kVectors>
inline void multiply_add_block(float* d, const float* a, const float* b, int columns, int depth) {
  Eight sum[kRows][kVectors];
  for (int row = 0; row < kRows; ++row) std::memcpy(sum[row], d + row * columns, sizeof(sum[row]));
  for (int k = 0; k < depth; ++k) {
    Eight other[kVectors];
    std::memcpy(other, b + k * columns, sizeof(other));
    for (int row = 0; row < kRows; ++row)
      for (int v = 0; v < kVectors; ++v) sum[row][v] += a[row * depth + k] * other[v];
  }
  for (int row = 0; row < kRows; ++row) std::memcpy(d + row * columns, sum[row], sizeof(sum[row]));
}

// d (rows, columns) += a (rows, depth) . b (depth, columns), all dense and fp32; rows is a multiple of 4, columns of 8.
inline void multiply_add(float* d, const float* a, const float* b, int rows, int columns, int depth) {
  constexpr int kRows = 4;
  for (int row = 0; row < rows; row += kRows) {
    int column = 0;
    for (; column + 2 * kEight <= columns; column += 2 * kEight)
      multiply_add_block<kRows, 2>(d + row * columns + column, a + row * depth, b + column, columns, depth);
    if (column < columns)
      multiply_add_block<kRows, 1>(d + row * columns + column, a + row * depth, b + column, columns, depth);
  }
}

// The 32-bit operands of mma.m16n8k8 (PTX ISA, "Matrix fragments for mma.m16n8k8"): each word is one k.
//
//   a (16 x 8)   a0 = row g, k q      a1 = row g + 8, k q      a2 = row g, k q + 4      a3 = row g + 8, k q + 4
//   b (8 x 8)    b0 = k q, b1 = k q + 4 of column g            d as in fragments.h
constexpr int a_row32(int lane, int word) {
  return lane / 4 + 8 * (word & 1);
}
constexpr int a_k32(int lane, int word) {
  return lane % 4 + 4 * (word >> 1);
}
constexpr int b_column32(int lane) {
  return lane / 4;
}
constexpr int b_k32(int lane, int word) {
  return lane % 4 + 4 * word;
}

}  // namespace emulator
