// Parts that both kernels of a whole bottleneck share: the tile of output pixels of a block, accumulators that start
// with a bias, and the store of a pixel.
#pragma once

#include <resnet_fast/bottleneck_fwd.h>
#include <resnet_fast/device.h>
#include <resnet_fast/epilogue.h>
#include <resnet_fast/fragments.h>
#include <resnet_fast/tiles.h>

namespace resnet_fast {

constexpr int kTile = kBottleneckTile, kHalo = kTile + 2;  // side in pixels, of y and of t1
constexpr int kPixels = kTile * kTile, kHaloPixels = kHalo * kHalo;
constexpr int kStep = kBottleneckStep, kStepChunks = kStep / 8, kStepMmas = kStep / 16;

RF_DEVICE Tile tile_of(const BottleneckParams& p, int index) {
  return tile_of<kTile, kTile>(p, index);
}

RF_DEVICE bool in_image(const BottleneckParams& p, int h, int w) {
  return h >= 0 && h < p.h && w >= 0 && w < p.w;
}
// Returns whether a pixel of the halo tile is inside the image.
RF_DEVICE bool in_image(const BottleneckParams& p, const Tile& tile, int pixel) {
  return in_image(p, tile.h - 1 + pixel / kHalo, tile.w - 1 + pixel % kHalo);
}

// The pixel of the halo tile at the centre of the window of output pixel `row`.
RF_HOST_DEVICE constexpr int centre(int row) {
  return (row / kTile + 1) * kHalo + row % kTile + 1;
}

// Copies the three biases to shared memory, one after another from `at` on. Called by all kThreads threads; a barrier
// must follow.
template <int kMid, int kCo, int kThreads>
RF_DEVICE void stage_biases(const BottleneckParams& p, uint32_t at) {
  for (int i = thread_index(); i < 2 * kMid + kCo; i += kThreads) {
    const float* from = i < kMid ? p.bias1 + i : i < 2 * kMid ? p.bias2 + i - kMid : p.bias3 + i - 2 * kMid;
    store_shared(at + i * 4, load_global<float>(from));
  }
}

// Initializes accumulators with the bias of their columns; the first bias is at `at` in shared memory. This takes one
// load for all rows, and no addition at the end.
template <int kN>
RF_DEVICE void begin_with(float (&acc)[kN][4], uint32_t at, int lane) {
#pragma unroll
  for (int n = 0; n < kN; ++n) {
    const Pair bias = load_shared<Pair>(at + (n * 8 + d_column(lane, 0)) * 4);
#pragma unroll
    for (int i = 0; i < 4; ++i) acc[n][i] = i % 2 == 0 ? bias.first : bias.second;
  }
}
template <int kM, int kN>
RF_DEVICE void begin_with(float (&acc)[kM][kN][4], uint32_t at, int lane) {
  begin_with(acc[0], at, lane);
#pragma unroll
  for (int m = 1; m < kM; ++m)
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[m][n][i] = acc[0][n][i];
}

// Stores y of pixel `row` of the tile, unless it is outside the image. A quad stores 32 channels, this lane the eight
// from `channel` on.
template <int kCo>
RF_DEVICE void store_pixel(const BottleneckParams& p, const Tile& tile, int row, int channel,
                           const uint32_t (&accumulators)[4]) {
  const Vec16 wide = transposed_in_quad(accumulators);
  const int h = tile.h + row / kTile, w = tile.w + row % kTile;
  const bool inside = h < p.h && w < p.w;
  const size_t pixel = inside ? (static_cast<size_t>(tile.n) * p.h + h) * p.w + w : 0;
  store_global(static_cast<char*>(p.y) + (pixel * kCo + channel) * 2, wide, inside);
}

}  // namespace resnet_fast
