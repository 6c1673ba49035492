// The layouts of the fragments of ldmatrix and mma.m16n8k16 (PTX ISA, "Matrix fragments for mma.m16n8k16 with floating
// point type"; "ldmatrix"). The epilogues of kernels and the emulator's products use these functions, and
// tests/emulator/test_layouts.py compares them with CuTe's traits, an independent source.
//
//   a (16 x 16)  four words of two k each            d (16 x 8)  four floats           lane = 4 * group + quad
//
//              k 2q 2q+1   8+2q 8+2q+1                         n  2q  2q+1
//   row g           a0          a2                    row g       d0   d1
//   row g+8         a1          a3                    row g+8     d2   d3
//
//   b (16 x 8)   b0 = k 2q, 2q+1 of column n = g      b1 = k 8+2q, 8+2q+1 of it
#pragma once

#include <resnet_fast/device.h>

namespace resnet_fast {

// Operand a: row, and first of the two columns (k), of word `word` of lane `lane`.
RF_HOST_DEVICE constexpr int a_row(int lane, int word) {
  return lane / 4 + 8 * (word & 1);
}
RF_HOST_DEVICE constexpr int a_k(int lane, int word) {
  return lane % 4 * 2 + 8 * (word >> 1);
}
// Operand b: column, and first of the two rows (k), of word `word` of lane `lane`.
RF_HOST_DEVICE constexpr int b_column(int lane) {
  return lane / 4;
}
RF_HOST_DEVICE constexpr int b_k(int lane, int word) {
  return lane % 4 * 2 + 8 * word;
}
// Accumulator d: row and column of float `i` of lane `lane`.
RF_HOST_DEVICE constexpr int d_row(int lane, int i) {
  return lane / 4 + 8 * (i >> 1);
}
RF_HOST_DEVICE constexpr int d_column(int lane, int i) {
  return lane % 4 * 2 + (i & 1);
}

// ldmatrix_x4: the row and the 16-byte chunk whose address lane `lane` passes. From each matrix a lane gets row lane /
// 4, elements 2 * (lane % 4) and the next. For operand a, matrices 0 … 3 are its quarters in the order of its words:
// rows 0-7 and 8-15 of k 0-7, then of k 8-15. For two column blocks of b: k 0-7 and 8-15 of block 0, then of block 1.
RF_HOST_DEVICE constexpr int a_address_row(int lane) {
  return lane % 16;
}
RF_HOST_DEVICE constexpr int a_address_chunk(int lane) {
  return lane / 16;
}
RF_HOST_DEVICE constexpr int b_address_row(int lane) {
  return lane % 8 + lane / 16 * 8;
}
RF_HOST_DEVICE constexpr int b_address_chunk(int lane) {
  return lane / 8 % 2;
}

// Shared tiles are rows of 128 bytes: 64 values of 16 bits in eight chunks of 16 bytes. The position of a chunk in its
// row is its index xor bits 0, 2, 1 of the row. So neither one chunk of eight rows (ldmatrix, and the 4-byte stores of
// accumulators) nor four chunks of two rows (16-byte accesses by quads) have a bank conflict.
constexpr int kRowBytes = 128;
constexpr int kRowChunks = 8;

RF_HOST_DEVICE constexpr uint32_t swizzled(int row, int chunk) {
  return static_cast<uint32_t>(row * kRowBytes + ((chunk ^ ((row & 1) << 2 | (row >> 1 & 3))) << 4));
}

}  // namespace resnet_fast
