// Any convolution + BatchNorm + residual + ReLU as an implicit GEMM: conv_bn_act_1x1.cu with windows in place of
// pixels. What the two have in common (ring, products, epilogue) is explained there.
//
//   y[m, co] = act( sum_k x[pixel(m, k), channel(k)] * w[co, k]  +  b[co]  +  residual[m, co] )
//   k = (r * S + s) * Ci + ci        pixel(m, k) = (n, ho * stride - pad + r * dilation, wo * stride - pad + s *
//   dilation)
//
//   x (N, H, W, Ci)   w (Co, R, S, Ci), BatchNorm folded   b (Co) fp32   residual, y (N, Ho, Wo, Co)      NHWC, 16 bit
//
// Saved bytes. No matrix of windows: im2col of a 3x3 convolution writes and reads nine times x; here a window's pixels
// are copied from x itself, once from memory and eight times from L2. And as in the 1x1: y is written once.
//
// GEMM. gemm_m = N * Ho * Wo, gemm_n = Co, gemm_k = R * S * Ci as ONE axis, cut into steps of 64 and those into chunks
// of 8 channels, 16 bytes. A chunk never crosses a tap, a step may:
//
//     Ci = 64    step 0 = tap 0            step 1 = tap 1            ...        all chunks of a step shift alike
//     Ci = 24    step 0 = |tap 0|tap 1|ta  step 1 = p 2|tap 3|tap 4| ...        each chunk has its own (r, s, ci)
//
//   A thread copies chunk `thread % 8` of four pixels in every step, so that it has ONE (r, s, ci) a step: carried from
//   step to step by additions, never divided. Each of its pixels contributes where its window begins (computed once);
//   the rest is one shift for all four and two comparisons each, whether the tap is inside the image.
//
//          x, one image               window of pixel m, 3x3: corner (h, w) may lie outside
//       +---------------+               +---+---+---+
//       |  . . .        |               |0,0|0,1|0,2|      pixel(m, k) = corner(m)       [once per tile]
//       |  . m .        |               +---+---+---+                  + r * dilation * W + s * dilation
//       |  . . .        |               |1,0|1,1| ...                                   [once per thread and step]
//       +---------------+
//
// Zero padding: chunks outside of the image are asked for with inside = false and arrive as zeros, as are those behind
// the last k, pixel or channel.
//
// Numerics, bank conflicts: as conv_bn_act_1x1.cu. Limits: groups 1, Ci and Co multiples of 8; pixels, with
// padding, are counted in 32 bits (ops/conv_bn_act.cpp). Alone: python -m pytest tests/emulator -k conv_bn_act.
//
// Not taken: x of a tile with its halo in shared memory, and nine shifted views of it, as in bottleneck_fwd.cu (x from
// L2 once instead of nine times, but a kernel for each filter and stride).

#include <resnet_fast/conv_bn_act.h>
#include <resnet_fast/device.h>
#include <resnet_fast/epilogue.h>
#include <resnet_fast/fragments.h>
#include <resnet_fast/multiply.h>

namespace resnet_fast {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kRows = 128;                      // pixels of a tile
constexpr int kStep = 64;                       // k of a step: a shared row
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

// The chunk of k that a thread copies: which tap, which channels of it.
struct Tap {
  int r, s, ci;

  RF_DEVICE void advance(const ConvParams& p, int by) {
    ci += by;
    while (ci >= p.ci) {
      ci -= p.ci;
      s += 1;
      if (s == p.s) {
        s = 0;
        r += 1;
      }
    }
  }
};

template <typename V>
RF_KERNEL(kThreads, 2)
conv_bn_act_kernel(const ConvParams p) {
  using T = typename V::T;
  const int lane = lane_index(), warp_m = warp_index() / V::kWarpsN, warp_n = warp_index() % V::kWarpsN;

  // The tile. Neighbouring blocks take the channels of the same pixels, whose x comes from L2 after the first.
  const int tiles_n = (p.co + V::kColumns - 1) / V::kColumns;
  const int first_row = block_index() / tiles_n * kRows, first_column = block_index() % tiles_n * V::kColumns;

  // What this thread copies: one chunk of 16 bytes in rows `copied`, `copied` + 32, ... of the windows and of w. A
  // window begins at pixel (h, w) of its image, number `corner` of all; one behind the last pixel so far above its
  // image that no tap is inside.
  constexpr int kFarAbove = INT32_MIN / 2;
  const int copied = thread_index() / kRowChunks, chunk = thread_index() % kRowChunks;
  const int gemm_m = p.gemm_m(), gemm_k = p.gemm_k();
  int corner[kRows / kCopied], h[kRows / kCopied], w[kRows / kCopied];
#pragma unroll
  for (int i = 0; i < kRows / kCopied; ++i) {
    const bool real = first_row + copied + i * kCopied < gemm_m;
    const int m = real ? first_row + copied + i * kCopied : 0;
    const int image = m / (p.ho * p.wo), down = m / p.wo % p.ho * p.stride_h - p.pad_h;
    w[i] = m % p.wo * p.stride_w - p.pad_w;
    h[i] = real ? down : kFarAbove;
    corner[i] = (image * p.h + down) * p.w + w[i];
  }
  Tap tap{0, 0, 0};
  tap.advance(p, chunk * 8);

  // Starts the copies of a step: kRows windows' chunks of x and behind them kColumns rows of w. Steps come in order.
  const auto issue = [&](int step) {
    const int k = step * kStep + chunk * 8;
    const bool real = k < gemm_k;
    const uint32_t slot = step % kSlots * V::kSlotBytes;
    const int down = real ? tap.r * p.dilation_h : 0, right = tap.s * p.dilation_w;
    const int shift = down * p.w + right;
#pragma unroll
    for (int i = 0; i < kRows / kCopied; ++i) {
      const bool inside = real && static_cast<uint32_t>(h[i] + down) < static_cast<uint32_t>(p.h) &&
                          static_cast<uint32_t>(w[i] + right) < static_cast<uint32_t>(p.w);
      const size_t from = inside ? static_cast<size_t>(corner[i] + shift) * p.ci + tap.ci : 0;
      cp_async16(slot + swizzled(copied + i * kCopied, chunk), static_cast<const char*>(p.x) + from * 2, inside);
    }
#pragma unroll
    for (int i = 0; i < V::kColumns / kCopied; ++i) {
      const int co = first_column + copied + i * kCopied;
      const bool inside = real && co < p.co;
      const size_t from = inside ? static_cast<size_t>(co) * gemm_k + k : 0;
      cp_async16(slot + kRows * kRowBytes + swizzled(copied + i * kCopied, chunk),
                 static_cast<const char*>(p.weight) + from * 2, inside);
    }
    tap.advance(p, kStep);
  };

  // Fill the ring but for one slot; one group a step, empty behind the end.
  const int steps = (gemm_k + kStep - 1) / kStep;
  for (int step = 0; step < kSlots - 1; ++step) {
    if (step < steps) issue(step);
    cp_async_commit();
  }

  // tile = sum over k of x[pixel(m, k), channel(k)] * w[co, k]
  float acc[V::kTall][kWide][4] = {};
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<kSlots - 2>();
    sync_block();
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

int tiles_of(const ConvParams& p, int columns) {
  return (p.gemm_m() + kRows - 1) / kRows * ((p.co + columns - 1) / columns);
}

template <typename V>
Status launch(const ConvParams& p, const Device& device) {
  const Grid grid{tiles_of(p, V::kColumns), kThreads, kSlots * V::kSlotBytes};
  return RF_LAUNCH(conv_bn_act_kernel<V>, grid, device, p);
}

// Wide tiles read x half as often; narrow ones where wide ones would leave an SM without any.
template <typename T>
Status launch_as(const ConvParams& p, const Device& device) {
  const bool wide = p.co > 64 && tiles_of(p, 128) >= device.sms;
  return wide ? launch<Variant<T, 128>>(p, device) : launch<Variant<T, 64>>(p, device);
}

}  // namespace

Status launch_conv_bn_act(const ConvParams& p, const Device& device) {
  return p.bfloat16 ? launch_as<Bfloat16>(p, device) : launch_as<Half>(p, device);
}

}  // namespace resnet_fast
