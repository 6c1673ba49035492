// Tensor maps and the boxes that the copy engine moves (PTX ISA, "Tensor": tiled mode; CUDA driver API,
// cuTensorMapEncodeTiled).
//
// A tensor has up to five dimensions, the innermost first and dense. A box is a corner and a size in each dimension.
// In shared memory its rows are dense, one after another, the first coordinate fastest; a swizzle of 32, 64 or 128
// bytes then exchanges chunks of 16 bytes (operand.h). What lies outside the tensor is filled in by loads and left out
// by stores.
//
// NVIDIA does not document its 128 bytes of a tensor map. TensorMapBytes is an encoding of our own, for kernels that
// run on a CPU and take the map as a parameter.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include <emulator/operand.h>

namespace emulator {

enum class Fill : uint8_t { kZero, kNaN };

struct TiledTensor {
  static constexpr int kMaxRank = 5;
  uint64_t start = 0;
  uint64_t size[kMaxRank] = {}, stride[kMaxRank] = {};  // stride in bytes
  uint32_t box[kMaxRank] = {};
  uint8_t rank = 0, element = 0;  // bytes of an element
  uint8_t pitch = kChunkBytes;    // of the swizzle; 16: none
  Fill fill = Fill::kZero;

  uint32_t row_bytes() const {
    return box[0] * element;
  }
  uint32_t rows() const {
    uint32_t product = 1;
    for (int i = 1; i < rank; ++i) product *= box[i];
    return product;
  }
  uint32_t box_bytes() const {
    return rows() * row_bytes();
  }
  // What a box's place in shared memory must be a multiple of: with a swizzle, its pattern.
  uint32_t alignment() const {
    return pitch == kChunkBytes ? 128 : kCoreRows * pitch;
  }
  // The place of a chunk of a row, from the start of the box.
  uint32_t place(uint32_t row, uint32_t chunk) const {
    return swizzled_by(pitch, row * row_bytes() + chunk * kChunkBytes);
  }
};

// What the driver refuses in a tensor map, or null. `most_rows` is the largest second side of a box.
inline const char* refused(const TiledTensor& t, uint32_t most_rows = 256) {
  if (t.rank < 1 || t.rank > TiledTensor::kMaxRank) return "a tensor's rank is not 1 to 5";
  if (t.element != 1 && t.element != 2 && t.element != 4 && t.element != 8)
    return "a tensor's elements are not of 1, 2, 4 or 8 bytes";
  if (t.start % 16 != 0) return "a tensor's start is not aligned to 16 bytes";
  if (t.stride[0] != t.element) return "a tensor's innermost dimension is not dense";
  for (int i = 0; i < t.rank; ++i) {
    if (t.size[i] == 0 || t.size[i] > uint64_t{1} << 32) return "a tensor's dimension is none or too large";
    if (i > 0 && (t.stride[i] % 16 != 0 || t.stride[i] >= uint64_t{1} << 40)) return "a stride is not of 16 bytes";
    if (t.box[i] == 0 || t.box[i] > (i == 1 ? most_rows : 256)) return "a box's dimension is none or too large";
  }
  if (t.row_bytes() % kChunkBytes != 0) return "a box's rows are not of 16 bytes";
  if (t.pitch != 16 && t.pitch != 32 && t.pitch != 64 && t.pitch != 128)
    return "a swizzle is not of 32, 64 or 128 bytes";
  if (t.pitch != kChunkBytes && t.row_bytes() > t.pitch) return "a swizzled box's rows are longer than its swizzle";
  return nullptr;
}

// One row of a box. Its elements `first` to `end` (without `end`) are in the tensor, from `address` on; none if these
// are equal.
struct BoxRow {
  uint32_t row;
  uint64_t address;
  uint32_t first, end;
};

// The row that begins at these coordinates.
inline BoxRow row_at(const TiledTensor& t, uint32_t row, const int64_t* at) {
  const int64_t width = t.box[0], size = static_cast<int64_t>(t.size[0]);
  const int64_t first = std::clamp<int64_t>(-at[0], 0, width), end = std::clamp<int64_t>(size - at[0], first, width);
  bool present = true;
  uint64_t address = t.start + static_cast<uint64_t>(at[0] + first) * t.element;
  for (int d = 1; d < t.rank; ++d) {
    present &= at[d] >= 0 && at[d] < static_cast<int64_t>(t.size[d]);
    address += static_cast<uint64_t>(at[d]) * t.stride[d];
  }
  return {row, address, static_cast<uint32_t>(first), static_cast<uint32_t>(present ? end : first)};
}

// Calls f(BoxRow) for each row of the box at `corner`, in the order of shared memory.
template <typename F>
void for_rows(const TiledTensor& t, const int* corner, F f) {
  int64_t at[TiledTensor::kMaxRank] = {};
  for (int d = 0; d < t.rank; ++d) at[d] = corner[d];
  for (uint32_t row = 0; row < t.rows(); ++row) {
    f(row_at(t, row, at));
    for (int d = 1; d < t.rank; ++d) {
      at[d] += 1;
      if (at[d] < int64_t{corner[d]} + t.box[d]) break;
      at[d] = corner[d];
    }
  }
}

constexpr int kTensorMapBytes = 128;

struct TensorMapBytes {
  static constexpr uint32_t kMark = 0x50414d54;  // "TMAP"
  uint32_t mark;
  TiledTensor tensor;
};
static_assert(sizeof(TensorMapBytes) <= kTensorMapBytes, "a tensor map is a parameter of 128 bytes");

inline void encode(const TiledTensor& tensor, unsigned char* to) {
  const TensorMapBytes map{TensorMapBytes::kMark, tensor};
  std::memset(to, 0, kTensorMapBytes);
  std::memcpy(to, &map, sizeof(map));
}

// Whether these 128 bytes are a tensor map; if so, which.
inline bool decode(const unsigned char* from, TiledTensor& tensor) {
  TensorMapBytes map;
  std::memcpy(&map, from, sizeof(map));
  tensor = map.tensor;
  return map.mark == TensorMapBytes::kMark;
}

}  // namespace emulator
