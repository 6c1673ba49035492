// Conv 1x1 + BatchNorm + residual + ReLU as one matrix product. Read this kernel first: it is a plain pipelined GEMM.
// The loop itself, which conv_bn_act.cu shares, is in ring_product.h.
//
//   y[m, co] = act( sum_ci x[row(m), ci] * w[co, ci]  +  b[co]  +  residual[m, co] )
//
//   x (N, H, W, Ci)   w (Co, Ci)   b (Co) fp32   residual, y (N, Ho, Wo, Co)   NHWC, 16 bit, BatchNorm folded into w, b
//   m = (n, ho, wo)   row(m) = (n, ho * stride, wo * stride)      pixels that a stride skips are not read
//
// Saved bytes. Stock PyTorch runs convolution, BatchNorm, add and ReLU as four kernels, which write y four times and
// read it three times. Here y is written once. At 256 channels, 56 x 56 and 16 bit: 11.2 MB per image -> 1.6 MB.
//
// GEMM. gemm_m = N * Ho * Wo pixels, gemm_n = Co, gemm_k = Ci; k is the fastest axis of both operands.
//
//            gemm_k ->  64 at a time                    A block computes a tile of y, kRows pixels x kColumns channels.
//           +----+----+----+                            It walks along k in steps of 64 values: 128 bytes, one row of
//   pixels  | x  | x  | x  | kRows                      shared memory for each pixel and each channel. 8 warps share
//           |    |    |    |           +-------+        the tile, each kTall * 16 pixels x 32 channels.
//           +----+----+----+           | y     |
//   channels| w  | w  | w  | kColumns  | tile  |        A warp reads 16 x 16 values of x and 16 x 16 of w with one
//           +----+----+----+           +-------+        ldmatrix_x4 each, and multiplies them into fp32 registers.
//
//   step      0        1        2        3              Three slots of shared memory form a ring. While step s is
//   slot 0  [copy....|mma    |         |copy....        multiplied, the copies (cp.async: no register, no waiting) of
//   slot 1  [copy.............|mma     |                steps s + 1 and s + 2 are in flight. One barrier per step is
//   slot 2           [copy.............|mma             enough for both: step s has arrived, slot s - 1 is free.
//
// Copies. Thread t copies chunk t % 8 (16 bytes) of rows t / 8, t / 8 + 32, ...: eight lanes read 128 adjacent bytes of
// a pixel. The pixel of each row is computed once, before the loop. Pixels, channels and k past the end are requested
// with inside = false: they arrive as zeros and memory is not read.
//
// No bank conflicts: chunks are permuted within their shared row (`swizzled` in fragments.h), so that the eight
// addresses of an ldmatrix quarter, and the eight chunks of a copied row, each touch all 32 banks once.
//
// Numerics: fp32 accumulators; bias, then residual, then ReLU, then one rounding (epilogue.h). The order of the sum
// over k is the same in every tile of every shape, so neither kColumns nor the number of SMs changes a bit of y.
//
// Limits: Ci and Co multiples of 8, for 16-byte copies; rows, blocks and chunks of 16 bytes are counted in 32 bits
// (ops/conv_bn_act_1x1.cpp). To test this file: python -m pytest tests/emulator -k 1x1.
//
// Tried and rejected: steps of 32 (twice the barriers for the same bytes); storing whole pixels by way of shared memory
// (the 64 bytes of a quad already fill two sectors).

#include <resnet_fast/conv_bn_act_1x1.h>
#include <resnet_fast/ring_product.h>

namespace resnet_fast {
namespace {

constexpr int kChunkBytes = 16;

template <typename V>
RF_KERNEL(V::kThreads, 2)
conv_bn_act_1x1_kernel(const Conv1x1Params p) {
  const TilePlace<V> tile(p.co);

  // This thread copies chunk `column` of each step in rows `copied`, `copied` + 32, ... of x and of w. Offsets count
  // chunks of 16 bytes, for which 32 bits reach 32 GB; -1 is a row past the last.
  const int copied = thread_index() / kRowChunks, column = thread_index() % kRowChunks;
  const int gemm_m = p.gemm_m(), ho = p.ho(), wo = p.wo(), chunks = p.ci / 8;
  int x_row[V::kRowsEach], w_row[V::kColumnsEach];
#pragma unroll
  for (int i = 0; i < V::kRowsEach; ++i) {
    const bool real = tile.row + copied + i * V::kCopied < gemm_m;
    const int m = real ? tile.row + copied + i * V::kCopied : 0;
    const int image = m / (ho * wo), h = m / wo % ho * p.stride_h, w = m % wo * p.stride_w;
    x_row[i] = real ? ((image * p.h + h) * p.w + w) * chunks : -1;
  }
#pragma unroll
  for (int i = 0; i < V::kColumnsEach; ++i) {
    const int co = tile.column + copied + i * V::kCopied;
    w_row[i] = co < p.co ? co * chunks : -1;
  }

  // Starts the copies of a step: kRows rows of x, followed by kColumns rows of w.
  const auto issue = [&](int step, uint32_t slot) {
    const int chunk = step * kRowChunks + column;
    const auto copy = [&](uint32_t to, const void* tensor, int row) {
      const bool inside = row >= 0 && chunk < chunks;
      const int64_t from = inside ? row + chunk : 0;
      cp_async16(to, static_cast<const char*>(tensor) + from * kChunkBytes, inside);
    };
#pragma unroll
    for (int i = 0; i < V::kRowsEach; ++i) copy(slot + swizzled(copied + i * V::kCopied, column), p.x, x_row[i]);
#pragma unroll
    for (int i = 0; i < V::kColumnsEach; ++i)
      copy(slot + swizzled(V::kRows + copied + i * V::kCopied, column), p.weight, w_row[i]);
  };

  ring_product(tile, p.ci, Output{p.bias, p.residual, p.y, gemm_m, p.co, p.relu}, issue);
}

template <typename V>
Status launch(const Conv1x1Params& p, const Device& device) {
  return RF_LAUNCH(conv_bn_act_1x1_kernel<V>, grid_of<V>(p), device, p);
}

template <typename T>
Status launch_as(const Conv1x1Params& p, const Device& device) {
  return takes_wide_tiles(p, device) ? launch<ConvTile<T, 128>>(p, device) : launch<ConvTile<T, 64>>(p, device);
}

}  // namespace

Status launch_conv_bn_act_1x1(const Conv1x1Params& p, const Device& device) {
  return p.bfloat16 ? launch_as<Bfloat16>(p, device) : launch_as<Half>(p, device);
}

}  // namespace resnet_fast
