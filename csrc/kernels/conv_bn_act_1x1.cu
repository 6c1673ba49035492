// Conv 1x1 + BatchNorm + residual + ReLU as one matrix product. The kernel to read first: a pipelined GEMM and no more.
//
//   y[m, co] = act( sum_ci x[row(m), ci] * w[co, ci]  +  b[co]  +  residual[m, co] )
//
//   x (N, H, W, Ci)   w (Co, Ci)   b (Co) fp32   residual, y (N, Ho, Wo, Co)      NHWC, 16 bit, BatchNorm folded into
//   w, b m = (n, ho, wo)   row(m) = (n, ho * stride, wo * stride)                      of a stride the skipped rows
//   stay unread
//
// Saved bytes. Stock runs convolution, BatchNorm, add and ReLU as four kernels, which write y four times and read it
// three times; here it is written once. At 256 channels and 56 x 56 in 16 bit: 11.2 MB per image -> 1.6 MB.
//
// GEMM. gemm_m = N * Ho * Wo pixels, gemm_n = Co, gemm_k = Ci; k is the fastest axis of both operands.
//
//            gemm_k ->  64 at a time                    A block makes one tile of y, kRows pixels x kColumns channels.
//           +----+----+----+                            It walks along k in steps of 64 numbers: 128 bytes, one row of
//   pixels  | x  | x  | x  | kRows                      shared memory for each pixel and each channel. 8 warps share
//           |    |    |    |           +-------+        the tile, each kTall * 16 pixels x 32 channels.
//           +----+----+----+           | y     |
//   channels| w  | w  | w  | kColumns  | tile  |        A warp reads 16 x 16 numbers of x and 16 x 16 of w with one
//           +----+----+----+           +-------+        ldmatrix_x4 each, and multiplies them into fp32 registers.
//
//   step      0        1        2        3              Three slots of shared memory form a ring. While step s is
//   slot 0  [copy....|mma    |         |copy....        multiplied, the copies (cp.async: no register, no waiting) of
//   slot 1  [copy.............|mma     |                steps s + 1 and s + 2 are on their way. One barrier a step does
//   slot 2           [copy.............|mma             both: step s has arrived, and slot s - 1 is read no more.
//
// Copies. Thread t copies the 16 bytes number t % 8 of rows t / 8, t / 8 + 32, ...: eight lanes read 128 bytes of a
// pixel that lie together. Which pixel a row is, is computed once, before the loop. Pixels behind the last, channels
// behind the last and k behind the last are zeros: they are asked for with inside = false and never read.
//
// No bank conflicts: chunks are swapped within their shared row (fragments.h, `swizzled`), so that the eight addresses
// of an ldmatrix quarter and the eight chunks of a copied row each touch all 32 banks once.
//
// Numerics: fp32 accumulators; bias, then residual, then ReLU, then one rounding (epilogue.h). The order of the sum
// over k is the same in every tile of every shape: neither kColumns nor the number of SMs changes a bit of y.
//
// Limits: Ci and Co multiples of 8, which 16-byte copies need; rows, blocks and chunks of 16 bytes are counted in 32
// bits (ops/conv_bn_act_1x1.cpp). Alone: python -m pytest tests/emulator -k 1x1.
//
// Not taken: steps of 32 (twice the barriers for the same bytes); the accumulators through shared memory to
// memory, whole pixels at a time (a quad's 64 bytes already fill two sectors).

#include <resnet_fast/conv_bn_act_1x1.h>
#include <resnet_fast/device.h>
#include <resnet_fast/epilogue.h>
#include <resnet_fast/fragments.h>
#include <resnet_fast/multiply.h>

namespace resnet_fast {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kRows = 128;  // pixels of a tile
constexpr int kStep = 64;   // k of a step: a shared row
constexpr int kChunkBytes = 16;
constexpr int kSlots = 3;                       // steps in the ring
constexpr int kWide = 4;                        // column tiles of 8 of a warp
constexpr int kCopied = kThreads / kRowChunks;  // rows that the block copies at once

// Tiles of kColumns channels, 64 or 128, and what follows from that.
template <typename T_, int kColumns_>
struct Variant {
  using T = T_;
  static constexpr int kColumns = kColumns_;
  static constexpr int kWarpsN = kColumns / (kWide * 8), kWarpsM = kWarps / kWarpsN;
  static constexpr int kTall = kRows / 16 / kWarpsM;  // row tiles of 16 of a warp
  static constexpr int kSlotBytes = (kRows + kColumns) * kRowBytes;
};

template <typename V>
RF_KERNEL(kThreads, 2)
conv_bn_act_1x1_kernel(const Conv1x1Params p) {
  using T = typename V::T;
  const int lane = lane_index(), warp_m = warp_index() / V::kWarpsN, warp_n = warp_index() % V::kWarpsN;

  // The tile. Neighbouring blocks take the channels of the same pixels, whose x comes from L2 after the first.
  const int tiles_n = (p.co + V::kColumns - 1) / V::kColumns;
  const int first_row = block_index() / tiles_n * kRows, first_column = block_index() % tiles_n * V::kColumns;

  // What this thread copies: chunk `column` of a step in rows `copied`, `copied` + 32, ... of x and of w. Offsets count
  // chunks of 16 bytes, for which 32 bits reach to 32 GB; -1 is a row behind the last.
  const int copied = thread_index() / kRowChunks, column = thread_index() % kRowChunks;
  const int gemm_m = p.gemm_m(), ho = p.ho(), wo = p.wo(), chunks = p.ci / 8;
  int x_row[kRows / kCopied], w_row[V::kColumns / kCopied];
#pragma unroll
  for (int i = 0; i < kRows / kCopied; ++i) {
    const bool real = first_row + copied + i * kCopied < gemm_m;
    const int m = real ? first_row + copied + i * kCopied : 0;
    const int image = m / (ho * wo), h = m / wo % ho * p.stride_h, w = m % wo * p.stride_w;
    x_row[i] = real ? ((image * p.h + h) * p.w + w) * chunks : -1;
  }
#pragma unroll
  for (int i = 0; i < V::kColumns / kCopied; ++i) {
    const int co = first_column + copied + i * kCopied;
    w_row[i] = co < p.co ? co * chunks : -1;
  }

  // Starts the copies of a step: kRows rows of x and behind them kColumns rows of w.
  const auto issue = [&](int step) {
    const int chunk = step * kRowChunks + column;
    const uint32_t slot = step % kSlots * V::kSlotBytes;
    const auto copy = [&](uint32_t to, const void* tensor, int row) {
      const bool inside = row >= 0 && chunk < chunks;
      const int64_t from = inside ? row + chunk : 0;
      cp_async16(to, static_cast<const char*>(tensor) + from * kChunkBytes, inside);
    };
#pragma unroll
    for (int i = 0; i < kRows / kCopied; ++i) copy(slot + swizzled(copied + i * kCopied, column), p.x, x_row[i]);
#pragma unroll
    for (int i = 0; i < V::kColumns / kCopied; ++i)
      copy(slot + swizzled(kRows + copied + i * kCopied, column), p.weight, w_row[i]);
  };

  // Fill the ring but for one slot. Every step is one group, an empty one behind the end, so that counting groups is
  // counting steps.
  const int steps = (p.ci + kStep - 1) / kStep;
  for (int step = 0; step < kSlots - 1; ++step) {
    if (step < steps) issue(step);
    cp_async_commit();
  }

  // tile = sum over ci of x[row(m), ci] * w[co, ci]
  float acc[V::kTall][kWide][4] = {};
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<kSlots - 2>();  // this thread's part of this step has arrived
    sync_block();                 // and everyone's; and everyone is done with the step before
    if (step + kSlots - 1 < steps) issue(step + kSlots - 1);
    cp_async_commit();

    const uint32_t x_at = step % kSlots * V::kSlotBytes, w_at = x_at + kRows * kRowBytes;
#pragma unroll
    for (int k = 0; k < kStep / 16; ++k) {
      uint32_t a[V::kTall][4];
#pragma unroll
      for (int m = 0; m < V::kTall; ++m) {
        const int row = (warp_m * V::kTall + m) * 16 + a_address_row(lane);
        ldmatrix_x4(a[m], x_at + swizzled(row, k * 2 + a_address_chunk(lane)));
      }
      multiply<T>(acc, a, w_at, warp_n * kWide * 8, k, lane);
    }
  }

  // y = act(tile + b + residual)
  const Output out{p.bias, p.residual, p.y, gemm_m, p.co, p.relu};
  store_tile<T>(acc, out, first_row + warp_m * V::kTall * 16, first_column + warp_n * kWide * 8);
}

int tiles_of(const Conv1x1Params& p, int columns) {
  return (p.gemm_m() + kRows - 1) / kRows * ((p.co + columns - 1) / columns);
}

template <typename V>
Status launch(const Conv1x1Params& p, const Device& device) {
  const Grid grid{tiles_of(p, V::kColumns), kThreads, kSlots * V::kSlotBytes};
  return RF_LAUNCH(conv_bn_act_1x1_kernel<V>, grid, device, p);
}

// Wide tiles read x half as often; narrow ones where wide ones would leave an SM without any.
template <typename T>
Status launch_as(const Conv1x1Params& p, const Device& device) {
  const bool wide = p.co > 64 && tiles_of(p, 128) >= device.sms;
  return wide ? launch<Variant<T, 128>>(p, device) : launch<Variant<T, 64>>(p, device);
}

}  // namespace

Status launch_conv_bn_act_1x1(const Conv1x1Params& p, const Device& device) {
  return p.bfloat16 ? launch_as<Bfloat16>(p, device) : launch_as<Half>(p, device);
}

}  // namespace resnet_fast
