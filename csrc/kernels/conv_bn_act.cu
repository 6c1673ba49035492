// Any convolution + BatchNorm + residual + ReLU as an implicit GEMM: conv_bn_act_1x1.cu with windows instead of pixels.
// That file explains what the two have in common (ring, products, epilogue).
//
//   y[m, co] = act( sum_k x[pixel(m, k), channel(k)] * w[co, k]  +  b[co]  +  residual[m, co] )
//   k = (r * S + s) * Ci + ci
//   pixel(m, k) = (n, ho * stride - pad + r * dilation, wo * stride - pad + s * dilation)
//
//   x (N, H, W, Ci)   w (Co, R, S, Ci), BatchNorm folded   b (Co) fp32   residual, y (N, Ho, Wo, Co)      NHWC, 16 bit
//
// Saved bytes. No matrix of windows is stored: im2col of a 3x3 convolution writes and reads nine times x. Here the
// pixels of a window are copied from x itself, once from memory and eight times from L2. As in the 1x1, y is written
// once.
//
// GEMM. gemm_m = N * Ho * Wo, gemm_n = Co, gemm_k = R * S * Ci as ONE axis, in steps of 64 and chunks of 8 channels (16
// bytes). A chunk never crosses a tap; a step may:
//
//     Ci = 64    step 0 = tap 0            step 1 = tap 1            ...        all chunks of a step have one shift
//     Ci = 24    step 0 = |tap 0|tap 1|ta  step 1 = p 2|tap 3|tap 4| ...        each chunk has its own (r, s, ci)
//
//   A thread copies chunk `thread % 8` of four pixels in every step, so it has ONE (r, s, ci) per step. It updates this
//   from step to step by additions, without divisions. The corner of each pixel's window is computed once. What remains
//   per step is one shift for all four pixels, and for each of them two comparisons: is the tap inside the image?
//
//          x, one image               window of pixel m, 3x3: corner (h, w) may lie outside
//       +---------------+               +---+---+---+
//       |  . . .        |               |0,0|0,1|0,2|      pixel(m, k) = corner(m)       [once per tile]
//       |  . m .        |               +---+---+---+                  + r * dilation * W + s * dilation
//       |  . . .        |               |1,0|1,1| ...                                   [once per thread and step]
//       +---------------+
//
// Zero padding: chunks outside the image, and chunks past the last k, pixel or channel, are requested with inside =
// false and arrive as zeros.
//
// Numerics, bank conflicts: as in conv_bn_act_1x1.cu. Limits: groups 1, Ci and Co multiples of 8; pixels, including
// padding, are counted in 32 bits (ops/conv_bn_act.cpp). To test this file: python -m pytest tests/emulator -k
// conv_bn_act.
//
// Tried and rejected: x of a tile with its halo in shared memory and nine shifted views of it, as in bottleneck_fwd.cu
// (x comes from L2 once instead of nine times, but every filter and stride needs its own kernel).

#include <resnet_fast/conv_bn_act.h>
#include <resnet_fast/ring_product.h>

namespace resnet_fast {
namespace {

// The chunk of k that a thread copies: its tap, and the first of its channels.
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

  // This thread copies one chunk of 16 bytes in rows `copied`, `copied` + 32, ... of the windows and of w. A window
  // starts at pixel (h, w) of its image, which is number `corner` of all pixels. Windows past the last pixel start so
  // far above their image that no tap is inside.
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

  // Starts the copies of a step: the chunks of kRows windows of x, followed by kColumns rows of w. Called in the order
  // of steps.
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
