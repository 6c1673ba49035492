// Where a wgmma finds an operand in shared memory (PTX ISA, "Shared memory matrix layout" and "Matrix descriptor").
//
// A descriptor names a start, two distances and a swizzle. The unit is a chunk of 16 bytes. A core matrix is eight rows
// of one chunk; what a row is depends on the operand:
//
//   k along the rows         row r of a (or column of b), chunk c of k: two chunks, 16 or 8 values of k
//     swizzled               r % 8 * pitch + r / 8 * stride + c * 16
//     not swizzled           r % 8 * 16    + r / 8 * stride + c * leading
//   k across the rows        value k is row k, chunk c of the 64 rows of a (or n columns of b); 16-bit values only
//     swizzled               k % 8 * pitch + k / 8 * stride + c % chunks * 16 + c / chunks * leading
//     not swizzled           k % 8 * 16    + k / 8 * leading + c * stride
//
// The pitch is the swizzle's 32, 64 or 128 bytes, which are `chunks` chunks. A swizzle xors bits 4 ... of the address
// with bits 7 ...: one, two or three of them. tests/emulator/test_layouts.py compares these with CuTe's layouts.
#pragma once

#include <cstdint>

namespace emulator {

constexpr uint32_t kChunkBytes = 16;
constexpr int kCoreRows = 8;

// Xors the bits of an address that a swizzle of `pitch` bytes (16: none) exchanges.
constexpr uint32_t swizzled_by(uint32_t pitch, uint32_t at) {
  return at ^ (at >> 7 & (pitch / kChunkBytes - 1)) << 4;
}

struct Operand {
  uint32_t start, leading, stride;  // bytes
  uint32_t pitch;                   // 16: no swizzle
  uint32_t base_offset;

  explicit constexpr Operand(uint64_t descriptor)
      : start(static_cast<uint32_t>(descriptor & 0x3fff) << 4),
        leading(static_cast<uint32_t>(descriptor >> 16 & 0x3fff) << 4),
        stride(static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4),
        pitch(descriptor >> 62 == 0 ? kChunkBytes : 256u >> (descriptor >> 62)),
        base_offset(static_cast<uint32_t>(descriptor >> 49 & 7)) {
  }

  constexpr bool swizzles() const {
    return pitch != kChunkBytes;
  }
  // Whether core matrices begin where the swizzle's pattern does, apart from the chunk of the row: these are the
  // operands that are understood here.
  constexpr bool starts_with_pattern() const {
    const uint32_t pattern = kCoreRows * pitch;
    return !swizzles() || (start % pattern < pitch && stride % pattern == 0 && base_offset == 0);
  }
  // The address of a chunk. k along the rows: of row `row`, chunk 0 or 1 of k.
  constexpr uint32_t along(int row, int chunk) const {
    const auto group = static_cast<uint32_t>(row / kCoreRows), in_group = static_cast<uint32_t>(row % kCoreRows);
    const uint32_t at = start + group * stride + in_group * pitch;
    return swizzles() ? swizzled_by(pitch, at + static_cast<uint32_t>(chunk) * kChunkBytes)
                      : at + static_cast<uint32_t>(chunk) * leading;
  }
  // k across the rows: of value k, chunk of eight rows of a (or columns of b).
  constexpr uint32_t across(int k, int chunk) const {
    const auto group = static_cast<uint32_t>(k / kCoreRows), in_group = static_cast<uint32_t>(k % kCoreRows);
    const auto c = static_cast<uint32_t>(chunk), chunks = pitch / kChunkBytes;
    const uint32_t at = start + in_group * pitch;
    return swizzles() ? swizzled_by(pitch, at + group * stride + c % chunks * kChunkBytes + c / chunks * leading)
                      : at + group * leading + c * stride;
  }
};

}  // namespace emulator
