// Any convolution + BatchNorm + residual + ReLU as an implicit GEMM: conv_bn_act_1x1.cu with windows in place of
// pixels. What the two have in common (ring, products, epilogue) is explained there.
//
//   y[m, co] = act( sum_k x[pixel(m, k), channel(k)] * w[co, k]  +  b[co]  +  residual[m, co] )
//   k = (r * S + s) * Ci + ci
//   pixel(m, k) = (n, ho * stride - pad + r * dilation, wo * stride - pad + s * dilation)
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
#include <resnet_fast/ring_product.h>

namespace resnet_fast {
namespace {

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
RF_KERNEL(V::kThreads, 2)
conv_bn_act_kernel(const ConvParams p) {
  const TilePlace<V> tile(p.co);

  // What this thread copies: one chunk of 16 bytes in rows `copied`, `copied` + 32, ... of the windows and of w. A
  // window begins at pixel (h, w) of its image, number `corner` of all; one behind the last pixel so far above its
  // image that no tap is inside.
  constexpr int kFarAbove = INT32_MIN / 2;
  const int copied = thread_index() / kRowChunks, chunk = thread_index() % kRowChunks;
  const int gemm_m = p.gemm_m(), gemm_k = p.gemm_k();
  int corner[V::kRowsEach], h[V::kRowsEach], w[V::kRowsEach];
#pragma unroll
  for (int i = 0; i < V::kRowsEach; ++i) {
    const bool real = tile.row + copied + i * V::kCopied < gemm_m;
    const int m = real ? tile.row + copied + i * V::kCopied : 0;
    const int image = m / (p.ho * p.wo), down = m / p.wo % p.ho * p.stride_h - p.pad_h;
    w[i] = m % p.wo * p.stride_w - p.pad_w;
    h[i] = real ? down : kFarAbove;
    corner[i] = (image * p.h + down) * p.w + w[i];
  }
  Tap tap{0, 0, 0};
  tap.advance(p, chunk * 8);

  // Starts the copies of a step: kRows windows' chunks of x and behind them kColumns rows of w. Steps come in order.
  const auto issue = [&](int step, uint32_t slot) {
    const int k = step * V::kStep + chunk * 8;
    const bool real = k < gemm_k;
    const int down = real ? tap.r * p.dilation_h : 0, right = tap.s * p.dilation_w;
    const int shift = down * p.w + right;
#pragma unroll
    for (int i = 0; i < V::kRowsEach; ++i) {
      const bool inside = real && static_cast<uint32_t>(h[i] + down) < static_cast<uint32_t>(p.h) &&
                          static_cast<uint32_t>(w[i] + right) < static_cast<uint32_t>(p.w);
      const size_t from = inside ? static_cast<size_t>(corner[i] + shift) * p.ci + tap.ci : 0;
      cp_async16(slot + swizzled(copied + i * V::kCopied, chunk), static_cast<const char*>(p.x) + from * 2, inside);
    }
#pragma unroll
    for (int i = 0; i < V::kColumnsEach; ++i) {
      const int co = tile.column + copied + i * V::kCopied;
      const bool inside = real && co < p.co;
      const size_t from = inside ? static_cast<size_t>(co) * gemm_k + k : 0;
      cp_async16(slot + V::kRows * kRowBytes + swizzled(copied + i * V::kCopied, chunk),
                 static_cast<const char*>(p.weight) + from * 2, inside);
    }
    tap.advance(p, V::kStep);
  };

  ring_product(tile, gemm_k, Output{p.bias, p.residual, p.y, gemm_m, p.co, p.relu}, issue);
}

template <typename V>
Status launch(const ConvParams& p, const Device& device) {
  return RF_LAUNCH(conv_bn_act_kernel<V>, grid_of<V>(p), device, p);
}

template <typename T>
Status launch_as(const ConvParams& p, const Device& device) {
  return takes_wide_tiles(p, device) ? launch<ConvTile<T, 128>>(p, device) : launch<ConvTile<T, 64>>(p, device);
}

}  // namespace

Status launch_conv_bn_act(const ConvParams& p, const Device& device) {
  return p.bfloat16 ? launch_as<Bfloat16>(p, device) : launch_as<Half>(p, device);
}

}  // namespace resnet_fast
