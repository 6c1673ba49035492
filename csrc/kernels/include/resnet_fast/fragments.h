// Who holds what: the fragments of ldmatrix and mma.m16n8k16 (PTX ISA, "Matrix fragments for mma.m16n8k16 with
// floating point type"; "ldmatrix"). Kernels place their epilogues by these functions, the emulator multiplies by them,
// and tests/emulator/test_layouts.py compares them with CuTe's traits, an independent source.
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

// Row and first of the two columns (k) that word `word` of operand a holds in lane `lane`.
RF_HOST_DEVICE constexpr int a_row(int lane, int word) {
  return lane / 4 + 8 * (word & 1);
}
RF_HOST_DEVICE constexpr int a_k(int lane, int word) {
  return lane % 4 * 2 + 8 * (word >> 1);
}
// Column, and first of the two rows (k), of operand b.
RF_HOST_DEVICE constexpr int b_column(int lane) {
  return lane / 4;
}
RF_HOST_DEVICE constexpr int b_k(int lane, int word) {
  return lane % 4 * 2 + 8 * word;
}
// Row and column of float `i` of the accumulator.
RF_HOST_DEVICE constexpr int d_row(int lane, int i) {
  return lane / 4 + 8 * (i >> 1);
}
RF_HOST_DEVICE constexpr int d_column(int lane, int i) {
  return lane % 4 * 2 + (i & 1);
}

// ldmatrix_x4: the lane that names the address of row `row` of matrix `matrix`, and what a lane gets of a matrix: row
// lane / 4, elements 2 * (lane % 4) and the next. To load operand a, matrices 0 … 3 are its quarters in the order of
// its words: rows 0-7 and 8-15 of k 0-7, then of k 8-15. To load two column blocks of b: block 0's k 0-7 and 8-15, then
// block 1's.
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

// Shared tiles are rows of 128 bytes: 64 16-bit numbers in eight chunks of 16 bytes. A chunk's place in its row is
// swapped by the row's number, so that neither eight rows of one chunk (ldmatrix, and the 4-byte stores of
// accumulators) nor two rows of four chunks (16-byte accesses by quads) meet in a bank: the chunk index xor the row's
// bits 0, 2, 1.
constexpr int kRowBytes = 128;
constexpr int kRowChunks = 8;

RF_HOST_DEVICE constexpr uint32_t swizzled(int row, int chunk) {
  return static_cast<uint32_t>(row * kRowBytes + ((chunk ^ ((row & 1) << 2 | (row >> 1 & 3))) << 4));
}

}  // namespace resnet_fast
