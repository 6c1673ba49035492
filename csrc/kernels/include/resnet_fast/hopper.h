// The device vocabulary that Hopper adds (sm_90a), beside device.h:
//
//   mbarriers      mbarrier_init  mbarrier_init_fence  mbarrier_arrive  mbarrier_expect  mbarrier_wait
//
//   bulk copies    bulk_load  tensor_load  im2col_load    global -> shared by one thread, over when an mbarrier says so
//
//   tensor cores   wgmma  wgmma_fence  wgmma_commit  wgmma_wait  wgmma_operand         four warps together
//
//   proxies        fence_async    what this thread wrote to shared memory, for bulk copies and wgmma
//
//   on the host    encode         a TensorBox or an Im2colBox -> the TensorMap that a kernel's parameters carry
//
// An mbarrier is 8 bytes of shared memory. A phase of it ends when as many threads have arrived as it was told at its
// start, and as many bytes as were expected have come; mbarrier_wait(at, parity) waits for the end of the phase of this
// parity, the first phase's being 0. A thread that has waited sees what those that arrived had written, and the copies.
//
// wgmma(d, a, b, accumulate): d (64 x columns, fp32) = a . b (+ d), 16 of k. a comes from registers (the fragment of
// mma_m16n8k16, warp w of the four holds rows 16 w ...) or, as b does, from shared memory, k in a row. It reads its
// operands and writes d until wgmma_wait: neither may be touched before. Registers that it reads or writes, unless by
// the wgmma before it, need a wgmma_fence after they were last touched; shared memory that threads wrote needs their
// fence_async, before the barrier that says it is written.
//
// Only code in `if constexpr (kHopper)` may use these: false where a fat binary's other architectures are compiled. A
// launcher asks kHopperBuilt whether sm_90a is among them.
#pragma once

#include <resnet_fast/device.h>
#include <resnet_fast/fragments.h>

namespace resnet_fast {

constexpr int kWarpgroup = 4 * kWarp;
constexpr int kBarrierBytes = 8;

// A tensor of 16-bit numbers and the box of it that tensor_load brings; the innermost dimension first, which is dense.
// Boxes lie in shared memory as dense rows of `box[0]`; `swizzled`: those are kRowBytes long, their chunks placed by
// swizzled128, and the box starts at a multiple of kSwizzleBytes.
struct TensorBox {
  static constexpr int kRank = 4;
  const void* start;
  uint64_t size[kRank];
  uint64_t stride[kRank];  // bytes; multiples of 16 but the first, which is 2
  uint32_t box[kRank];     // at most 256 each
  bool swizzle;
};

// Windows of a convolution, for im2col_load: which pixels of `x` (C, W, H, N) the filter's first tap meets, when it is
// put down everywhere. `lower` is the first of them by (W, H), `upper` the last one's distance from the image's last
// pixel, `step` the convolution's stride. im2col_load brings box[1] pixels of box[0] channels, each a row: it begins at
// the pixel that it is given, walks along W, then H, then N, and reads every pixel at its distance (right, down), which
// is the tap's; zeros where that is outside of the image, and behind the last image. (PTX ISA, "Im2col mode".)
struct Im2colBox {
  static constexpr int kMaxPixels = 1024, kMaxStep = 8, kMaxOffset = 255;
  TensorBox x;  // box: channels, pixels, 1, 1
  int lower[2], upper[2];
  uint32_t step[2];
};

// lower and upper of one side of a filter.
RF_HOST_DEVICE constexpr int im2col_lower(int padding) {
  return -padding;
}
RF_HOST_DEVICE constexpr int im2col_upper(int padding, int filter, int dilation) {
  return padding - (filter - 1) * dilation;
}

// The hardware's swizzle: within every kSwizzleBytes of shared memory, a 16-byte chunk's place in its row of 128 bytes
// is its number xor the row's.
constexpr int kSwizzleRows = 8;
constexpr int kSwizzleBytes = kSwizzleRows * kRowBytes;

RF_HOST_DEVICE constexpr uint32_t swizzled128(int row, int chunk) {
  return static_cast<uint32_t>(row * kRowBytes + ((chunk ^ (row & (kSwizzleRows - 1))) << 4));
}

// Row and column of float `j` of column tile `n` of wgmma's accumulator, d[n][j], in a thread of the warpgroup; of a
// in registers, row and first k of a word are a_row + 16 * warp and a_k.
RF_HOST_DEVICE constexpr int wgmma_row(int thread, int j) {
  return thread / kWarp * 16 + d_row(thread % kWarp, j);
}
RF_HOST_DEVICE constexpr int wgmma_column(int thread, int n, int j) {
  return n * 8 + d_column(thread % kWarp, j);
}

// Bits of a matrix descriptor (PTX ISA, "Matrix descriptor format"): addresses and distances in units of 16 bytes.
constexpr int kDescriptorStrideBit = 32, kDescriptorSwizzleBit = 62;
constexpr uint64_t kDescriptorSwizzle128 = 1;

// Rows of kRowBytes placed by swizzled128, of which the operand takes 32 bytes: `address`, of shared_address, is that
// of the first row, plus 0, 32, 64 or 96. The rows start at a multiple of kSwizzleBytes; groups of eight are `stride`
// bytes apart.
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

RF_DEVICE uint64_t wgmma_operand(uint32_t at, int stride = kSwizzleBytes) {
  return wgmma_descriptor(shared_address(at), stride);
}

}  // namespace resnet_fast
