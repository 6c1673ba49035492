// Device functions for Hopper (sm_90a), in addition to device.h:
//
//   mbarriers      mbarrier_init  mbarrier_init_fence  mbarrier_arrive  mbarrier_expect  mbarrier_wait
//
//   bulk copies    bulk_load  tensor_load  im2col_load    global -> shared by one thread; an mbarrier signals the end
//
//   tensor cores   wgmma  wgmma_fence  wgmma_commit  wgmma_wait  wgmma_operand         four warps together
//
//   proxies        fence_async    orders this thread's accesses to shared memory before later bulk copies and wgmma
//
//   on the host    tensor_map     a TensorBox or an Im2colBox -> the TensorMap in a kernel's parameters
//
// An mbarrier is 8 bytes of shared memory. Its phase ends when the number of threads given at its initialization have
// arrived and all expected bytes have come. mbarrier_wait(at, parity) waits for the end of the phase with this parity;
// the first phase has parity 0. After the wait a thread sees the copies, and all that the arrived threads wrote before.
//
// wgmma(d, a, b, accumulate): d (64 x columns, fp32) = a . b (+ d), for 16 values of k. Operand b is in shared memory,
// with k along the rows. Operand a is there too, or in registers (the fragment of mma_m16n8k16; warp w of the four
// holds rows 16 w ...). wgmma reads its operands and writes d until wgmma_wait, and neither may be touched before. A
// wgmma_fence must follow the last access to its registers, unless that was by the previous wgmma. Threads that wrote
// its shared memory must call fence_async before the barrier after the write. So must threads that read (ldmatrix,
// load_shared) what a bulk copy then overwrites.
//
// Only code in `if constexpr (kHopper)` may use these functions. kHopper is false when a fat binary's other
// architectures are compiled. Launchers read kHopperBuilt, which says whether sm_90a is among the architectures.
#pragma once

#include <algorithm>

#include <resnet_fast/device.h>
#include <resnet_fast/fragments.h>

namespace resnet_fast {

constexpr int kWarpgroup = 4 * kWarp;
constexpr int kBarrierBytes = 8;

// A tensor of 16-bit values, and the box of it that tensor_load copies. The innermost dimension comes first and is
// dense. In shared memory a box is dense rows of box[0] values. `swizzle`: rows are kRowBytes long with their chunks
// placed by swizzled128, and the box starts at a multiple of kSwizzleBytes.
struct TensorBox {
  static constexpr int kRank = 4;
  const void* start;
  uint64_t size[kRank];
  uint64_t stride[kRank];  // bytes; multiples of 16 but the first, which is 2
  uint32_t box[kRank];     // at most 256 each
  bool swizzle;

  bool operator==(const TensorBox& other) const {
    return start == other.start && std::equal(size, size + kRank, other.size) &&
           std::equal(stride, stride + kRank, other.stride) && std::equal(box, box + kRank, other.box) &&
           swizzle == other.swizzle;
  }
};

// The windows of a convolution, for im2col_load. They are named by the pixel of `x` (C, W, H, N) under the first tap of
// the filter. `lower` is the first such pixel as (W, H), `upper` the distance of the last one from the last pixel of
// the image, `step` the stride of the convolution. im2col_load copies box[1] pixels of box[0] channels, one row each.
// It starts at a given pixel, walks along W, then H, then N, and reads each pixel at the offset (right, down) of a tap.
// Pixels outside the image or past the last image are zeros. (PTX ISA, "Im2col mode".)
struct Im2colBox {
  static constexpr int kMaxPixels = 1024, kMaxStep = 8, kMaxOffset = 255;
  TensorBox x;  // box: channels, pixels, 1, 1
  int lower[2], upper[2];
  uint32_t step[2];

  bool operator==(const Im2colBox& other) const {
    return x == other.x && std::equal(lower, lower + 2, other.lower) && std::equal(upper, upper + 2, other.upper) &&
           std::equal(step, step + 2, other.step);
  }
};

// `lower` and `upper` along one dimension.
RF_HOST_DEVICE constexpr int im2col_lower(int padding) {
  return -padding;
}
RF_HOST_DEVICE constexpr int im2col_upper(int padding, int filter, int dilation) {
  return padding - (filter - 1) * dilation;
}

// The hardware's swizzle: within every kSwizzleBytes of shared memory, the position of a 16-byte chunk in its row of
// 128 bytes is its index xor the index of the row.
constexpr int kSwizzleRows = 8;
constexpr int kSwizzleBytes = kSwizzleRows * kRowBytes;

RF_HOST_DEVICE constexpr uint32_t swizzled128(int row, int chunk) {
  return static_cast<uint32_t>(row * kRowBytes + ((chunk ^ (row & (kSwizzleRows - 1))) << 4));
}

// Row and column of wgmma's accumulator d[n][j] in a thread of the warpgroup. With operand a in registers, the row and
// first k of a word are a_row + 16 * warp and a_k.
RF_HOST_DEVICE constexpr int wgmma_row(int thread, int j) {
  return thread / kWarp * 16 + d_row(thread % kWarp, j);
}
RF_HOST_DEVICE constexpr int wgmma_column(int thread, int n, int j) {
  return n * 8 + d_column(thread % kWarp, j);
}

// Bits of a matrix descriptor (PTX ISA, "Matrix descriptor format"): addresses and distances in units of 16 bytes.
constexpr int kDescriptorStrideBit = 32, kDescriptorSwizzleBit = 62;
constexpr uint64_t kDescriptorSwizzle128 = 1;

// The descriptor of an operand that takes 32 bytes of each of its rows of kRowBytes, placed by swizzled128. `address`,
// from shared_address, is that of the first row plus 0, 32, 64 or 96. The rows start at a multiple of kSwizzleBytes;
// groups of eight rows are `stride` bytes apart.
RF_HOST_DEVICE constexpr uint64_t wgmma_descriptor(uint32_t address, int stride = kSwizzleBytes) {
  return kDescriptorSwizzle128 << kDescriptorSwizzleBit | static_cast<uint64_t>(stride >> 4) << kDescriptorStrideBit |
         (address & 0x3ffffu) >> 4;
}

}  // namespace resnet_fast

#ifdef __CUDACC__
#include <resnet_fast/hopper_cuda.h>
#else
#include <emulator/hopper.h>
#endif

namespace resnet_fast {

inline const void* start_of(const TensorBox& box) {
  return box.start;
}
inline const void* start_of(const Im2colBox& box) {
  return box.x.start;
}

// Writes the TensorMap of a box, a pure function of the box, so that each thread keeps those of the last tensors: a net
// meets the same weights at every call, and the allocator gives its activations the same addresses.
template <typename Box>
Status tensor_map(TensorMap* map, const Box& box) {
  struct Kept {
    Box box;
    TensorMap map;
    bool used;
  };
  constexpr uintptr_t kPlaces = 64, kAllocation = 512;  // bytes that the allocator rounds to
  thread_local Kept all[kPlaces] = {};
  const uintptr_t start = reinterpret_cast<uintptr_t>(start_of(box)) / kAllocation;
  Kept& kept = all[(start ^ start / kPlaces ^ start / (kPlaces * kPlaces)) % kPlaces];
  if (!kept.used || !(kept.box == box)) {
    kept.used = false;
    if (const Status failed = encode(&kept.map, box)) return failed;
    kept.box = box;
    kept.used = true;
  }
  *map = kept.map;
  return nullptr;
}

RF_DEVICE uint64_t wgmma_operand(uint32_t at, int stride = kSwizzleBytes) {
  return wgmma_descriptor(shared_address(at), stride);
}

}  // namespace resnet_fast
