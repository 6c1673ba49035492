// The pipelined matrix product of conv_bn_act_1x1.cu and conv_bn_act.cu: a tile of pixels and channels, a ring of steps
// of both operands in shared memory, and the choice of the tile size. conv_bn_act_1x1.cu explains it.
#pragma once

#include <resnet_fast/device.h>
#include <resnet_fast/epilogue.h>
#include <resnet_fast/fragments.h>
#include <resnet_fast/multiply.h>

namespace resnet_fast {

// kRows pixels by kColumns channels (64 or 128), and the sizes derived from them.
template <typename T_, int kColumns_>
struct ConvTile {
  using T = T_;
  static constexpr int kThreads = 256, kWarps = kThreads / kWarp;
  static constexpr int kRows = 128, kColumns = kColumns_;
  static constexpr int kStep = kRowBytes / 2;            // k of a step: one shared row
  static constexpr int kSlots = 3;                       // steps in the ring
  static constexpr int kWide = 4;                        // column tiles of 8 of a warp
  static constexpr int kCopied = kThreads / kRowChunks;  // rows that the block copies at once
  static constexpr int kRowsEach = kRows / kCopied, kColumnsEach = kColumns / kCopied;  // copied by a thread
  static constexpr int kWarpsN = kColumns / (kWide * 8), kWarpsM = kWarps / kWarpsN;
  static constexpr int kTall = kRows / 16 / kWarpsM;  // row tiles of 16 of a warp
  static constexpr int kSlotBytes = (kRows + kColumns) * kRowBytes;
};

// The tile of this block. Neighbouring blocks take other channels of the same pixels, so all but the first find x in
// L2.
template <typename V>
struct TilePlace {
  int row, column;

  RF_DEVICE explicit TilePlace(int channels) {
    const int tiles_n = (channels + V::kColumns - 1) / V::kColumns;
    row = block_index() / tiles_n * V::kRows;
    column = block_index() % tiles_n * V::kColumns;
  }
};

// Computes act(a . b + bias + residual) for a tile of `out`. issue(step, slot) starts this thread's copies of a step of
// k to the slot of the ring at byte `slot`: V::kRows rows of a, followed by V::kColumns rows of b. It is called once
// for each step, in order.
template <typename V, typename Issue>
RF_DEVICE void ring_product(const TilePlace<V>& tile, int gemm_k, const Output& out, const Issue& issue) {
  const int lane = lane_index(), warp_m = warp_index() / V::kWarpsN, warp_n = warp_index() % V::kWarpsN;

  // Fill all slots of the ring but one. Every step commits one group, empty ones past the end, so that counting groups
  // counts steps.
  const int steps = (gemm_k + V::kStep - 1) / V::kStep;
  for (int step = 0; step < V::kSlots - 1; ++step) {
    if (step < steps) issue(step, step * V::kSlotBytes);
    cp_async_commit();
  }

  // tile = sum over k of a[row, k] * b[column, k]
  float acc[V::kTall][V::kWide][4] = {};
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<V::kSlots - 2>();  // this thread's part of the step has arrived
    sync_block();                    // so have the others', and every thread is done with the step before
    const int next = step + V::kSlots - 1;
    if (next < steps) issue(next, next % V::kSlots * V::kSlotBytes);
    cp_async_commit();

    const uint32_t a_at = step % V::kSlots * V::kSlotBytes, b_at = a_at + V::kRows * kRowBytes;
#pragma unroll
    for (int k = 0; k < V::kStep / 16; ++k) {
      uint32_t a[V::kTall][4];
#pragma unroll
      for (int m = 0; m < V::kTall; ++m) {
        const int row = (warp_m * V::kTall + m) * 16 + a_address_row(lane);
        ldmatrix_x4(a[m], a_at + swizzled(row, k * 2 + a_address_chunk(lane)));
      }
      multiply<typename V::T>(acc, a, b_at, warp_n * V::kWide * 8, k, lane);
    }
  }

  // y = act(tile + bias + residual)
  store_tile<typename V::T>(acc, out, tile.row + warp_m * V::kTall * 16, tile.column + warp_n * V::kWide * 8);
}

template <typename V, typename Params>
int tiles_of(const Params& p) {
  return (p.gemm_m() + V::kRows - 1) / V::kRows * ((p.co + V::kColumns - 1) / V::kColumns);
}

// Wide tiles read x half as often. Narrow tiles are better where wide ones would leave SMs idle.
template <typename Params>
bool takes_wide_tiles(const Params& p, const Device& device) {
  return p.co > 64 && tiles_of<ConvTile<Half, 128>>(p) >= device.sms;
}

template <typename V, typename Params>
Grid grid_of(const Params& p) {
  return {tiles_of<V>(p), V::kThreads, V::kSlots * V::kSlotBytes};
}

}  // namespace resnet_fast
