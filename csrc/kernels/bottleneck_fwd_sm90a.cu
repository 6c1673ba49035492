// A whole bottleneck of stride 1 in one launch, as bottleneck_fwd.cu computes it, on Hopper's own instructions.
//
//   t1 = relu(conv1x1(x, w1) + b1)      (N, H, W, 64)            x (N, H, W, Ci), NHWC, 16 bit
//   t2 = relu(conv3x3(t1, w2) + b2)     (N, H, W, 64)            zero padding 1 of t1, not of x
//   y  = relu(conv1x1(t2, w3) + b3 + s) (N, H, W, 256)           s = x (Ci = 256), or conv1x1(x, wp) (Ci = 64)
//
// Saved bytes: bottleneck_fwd.cu. What this one saves beside them is shared memory's time, which bounds that one: 4,000
// wavefronts of 128 bytes for a tile of 64 pixels instead of 6,200, against 5,000 cycles of DRAM; and instructions:
// 2,900 issue slots a tile and scheduler, all told, where that one's main loops alone take 3,400.
//
// GEMM. Three in a chain over one tile of 8 x 8 pixels; two groups of four warps, each with its own wgmma:
//
//      10 x 10 pixels with halo             8 x 8 pixels
//     +----------------+            +------------+              +------------+
//     | x     Ci wide  |  w1        | t1      64 |  w2          | t2      64 |  w3             y: registers -> 16 bytes
//     | 104 rows       | ---------> | 100 rows   | -----------> | 64 rows    | ------------>   a lane, 64 a quad,
//     | shared memory  |  m64n64    | shared     |  m64n32      | shared     |  m64n128        global
//     +----------------+  by rows   +------------+  by channels +------------+  by channels
//       TMA, once         0 .. 63     zero outside  a: ldmatrix   a: shared     + x . wp, or
//                        40 .. 103    of the image     of t1                    + x (registers)
//
//   conv1: both operands from shared memory. The groups take rows 0-63 and 40-103 of the halo tile, both beginning
//   where the swizzle's pattern of eight rows does; rows 40-63 are computed twice and stored once, rows 100-103 are
//   zeros. conv2: a view of t1 shifted by a pixel begins in the middle of the pattern, and a descriptor cannot say
//   that: operand a comes through registers. A warp's 16 rows are two rows of the image, so for one column of taps the
//   four halo rows that two ldmatrix_x4 bring serve all three taps of the column. conv3: both from shared memory; a
//   projection's x comes through registers, as its centred view does not begin with the pattern either.
//
// x is read from memory once, by the copy engine, which fills in zeros outside of the image. While conv1 multiplies,
// the threads take x's centre into registers: the shortcut's numbers in the layout of conv3's accumulators, or the
// projection's operand. Then x's place is free, and the next tile's x arrives during conv2 and conv3. All weights stay.
//
// Two barriers of the block a tile: t1 is written and x is free; t2 is written. t1 and t2 need no third and fourth, as
// every group has passed the other barrier between the last read of one tile and the first write of the next.
//
// Numerics: as bottleneck_fwd.cu. Limits: bottleneck_fwd_sm90a_fits. Alone: pytest tests/emulator -k "bottleneck and
// h100". Counted: docs/tables/. None of it has run on a GPU.
//
// Not taken: conv2's operand a from shared memory in nine copies of t1 (104 KB); splitting conv1 by channels instead of
// rows, which reads x twice (1,536 wavefronts for 1,024).

#include <resnet_fast/bottleneck_tile.h>
#include <resnet_fast/hopper.h>

namespace resnet_fast {
namespace {

constexpr int kGroups = 2, kThreads = kGroups * kWarpgroup;
constexpr int kMid = 64, kCo = 256;
constexpr int kTaps = 9, kBlocks3 = kCo / kMid;  // steps of w2; of w3 for each 64 numbers of k
constexpr int kStepBytes = kMid * kRowBytes;     // of the weights
constexpr int kXRows = 104, kXBoxBytes = kXRows * kRowBytes;
constexpr int kSecondRow = 40;  // of conv1's rows, where the second group's begin
constexpr int kColumns2 = kMid / kGroups, kColumns3 = kCo / kGroups;
constexpr int kOperandBytes = 32;  // of a row, for one wgmma

// Input channels: 256 that are the shortcut too, or 64 and a projection.
template <typename T_, int kCi_>
struct Variant {
  using T = T_;
  static constexpr int kCi = kCi_, kBoxes = kCi / kStep;
  static constexpr bool kProjection = kCi != kCo;
  static constexpr int kParts3 = 1 + (kProjection ? kBoxes : 0);  // of conv3's k, 64 each: t2, then x
  static constexpr int kSteps = kBoxes + kTaps + kBlocks3 * kParts3;
  // 16 channels each of x's centre that a thread keeps: a group's share of the shortcut, or the projection's operand.
  static constexpr int kKept = (kProjection ? kCi : kColumns3) / 16;

  // Byte offsets in shared memory. What wgmma reads begins with the swizzle's pattern.
  static constexpr uint32_t kW1 = 0, kW2 = kW1 + kBoxes * kStepBytes, kW3 = kW2 + kTaps * kStepBytes;
  static constexpr uint32_t kX = kSteps * kStepBytes, kT1 = kX + kBoxes * kXBoxBytes;
  static constexpr uint32_t kT2 = kT1 + kXBoxBytes, kBias = kT2 + kPixels * kRowBytes;
  static constexpr uint32_t kXReady = kBias + (2 * kMid + kCo) * 4, kWeightsReady = kXReady + kBarrierBytes;
  static constexpr uint32_t kEnd = kWeightsReady + kBarrierBytes;
  static_assert(kXBoxBytes % kSwizzleBytes == 0 && kSecondRow % kSwizzleRows == 0, "operands begin with the pattern");
};

struct Params {
  BottleneckParams p;
  TensorMap x, weights;

  template <typename F>
  void tensors(F f) const {
    p.tensors(f);
  }
};

// x of a tile with its halo -> shared memory; one thread.
template <typename V>
RF_DEVICE void load_x(const Params& all, const Tile& tile) {
  mbarrier_expect(V::kXReady, V::kBoxes * kHaloPixels * kRowBytes);
#pragma unroll
  for (int i = 0; i < V::kBoxes; ++i)
    tensor_load(V::kX + i * kXBoxBytes, all.x, i * kStep, tile.w - 1, tile.h - 1, tile.n, V::kXReady);
}

// All weights -> shared memory; one thread. In memory a block of 64 output channels of conv3 has its parts of k side by
// side; here a part has its blocks side by side, so that one operand spans them.
template <typename V>
RF_DEVICE void load_weights(const Params& all) {
  mbarrier_expect(V::kWeightsReady, V::kSteps * kStepBytes);
  for (int step = 0; step < V::kSteps; ++step) {
    const int last = step - V::kBoxes - kTaps;
    const int place = last < 0 ? step : V::kBoxes + kTaps + last % V::kParts3 * kBlocks3 + last / V::kParts3;
    tensor_load(V::kW1 + place * kStepBytes, all.weights, 0, step * kMid, 0, 0, V::kWeightsReady);
  }
}

template <typename V>
RF_DEVICE void run(const Params& all) {
  using T = typename V::T;
  const BottleneckParams& p = all.p;
  const int thread = thread_index(), warp = warp_index();
  const int group = warp / (kWarpgroup / kWarp), warp_of_group = warp % (kWarpgroup / kWarp);
  const int lane = lane_index(), quad = lane % 4;
  const int tiles = p.n * p.tiles_h() * p.tiles_w();

  if (thread == 0) {
    mbarrier_init(V::kXReady, 1);
    mbarrier_init(V::kWeightsReady, 1);
    mbarrier_init_fence();
    load_x<V>(all, tile_of(p, block_index()));
    load_weights<V>(all);
  }
  // the rows of x that no pixel fills, and the biases
  constexpr int kZeroChunks = (kXRows - kHaloPixels) * kRowChunks;
  for (int i = thread; i < V::kBoxes * kZeroChunks; i += kThreads)
    store_shared(V::kX + i / kZeroChunks * kXBoxBytes + kHaloPixels * kRowBytes + i % kZeroChunks * 16, Vec16{});
  stage_biases<kMid, kCo, kThreads>(p, V::kBias);
  fence_async();
  sync_block();
  mbarrier_wait(V::kWeightsReady, 0);

  int round = 0;
  for (int index = block_index(); index < tiles; index += block_count(), ++round) {
    const Tile tile = tile_of(p, index);

    // t1 = relu(x . w1 + b1) on the halo tile; 0 outside of the image
    uint32_t kept[V::kKept][4];
    {
      float acc[kMid / 8][4];
      begin_with(acc, V::kBias, lane);
      mbarrier_wait(V::kXReady, round % 2);
      wgmma_fence(acc);
#pragma unroll
      for (int s = 0; s < V::kBoxes; ++s)
#pragma unroll
        for (int k = 0; k < kStepMmas; ++k)
          wgmma<T>(acc, wgmma_operand(V::kX + s * kXBoxBytes + group * kSecondRow * kRowBytes + k * kOperandBytes),
                   wgmma_operand(V::kW1 + s * kStepBytes + k * kOperandBytes), true);
      wgmma_commit();
      // Meanwhile x's centre, 16 channels at a time: as operand a, or, which is the same, as two tiles of accumulators.
      const int pixel = centre(warp_of_group * 16 + a_address_row(lane));
#pragma unroll
      for (int i = 0; i < V::kKept; ++i) {
        const int box = i / kStepMmas + (V::kProjection ? 0 : group * V::kKept / kStepMmas);
        ldmatrix_x4(kept[i], V::kX + box * kXBoxBytes + swizzled128(pixel, i % kStepMmas * 2 + a_address_chunk(lane)));
      }
      wgmma_wait<0>(acc);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = group * kSecondRow + wgmma_row(thread % kWarpgroup, 2 * half);
        const bool mine = row >= group * kPixels && row < kHaloPixels, inside = in_image(p, tile, row);
#pragma unroll
        for (int n = 0; n < kMid / 8; ++n) {
          const uint32_t t = relu2<T>(acc[n][2 * half], acc[n][2 * half + 1]);
          store_shared(V::kT1 + swizzled128(row, n) + quad * 4, inside ? t : 0u, mine);
        }
      }
    }
    sync_block();
    if (thread == 0 && index + block_count() < tiles) load_x<V>(all, tile_of(p, index + block_count()));

    // t2 = relu(conv3x3(t1, w2) + b2)
    {
      float acc[kColumns2 / 8][4];
      begin_with(acc, V::kBias + (kMid + group * kColumns2) * 4, lane);
      // Two halo rows of 16 channels, twice: of the two image rows that this warp computes, and of the two below.
      uint32_t rows[2][2][4];
      const auto load = [&](uint32_t (&to)[2][4], int s, int k) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int row = a_address_row(lane);
          const int pixel = (2 * (warp_of_group + i) + row / kTile) * kHalo + row % kTile + s;
          ldmatrix_x4(to[i], V::kT1 + swizzled128(pixel, k * 2 + a_address_chunk(lane)));
        }
      };
      load(rows[0], 0, 0);
#pragma unroll
      for (int i = 0; i < 3 * kStepMmas; ++i) {
        const int s = i / kStepMmas, k = i % kStepMmas;
        const auto& now = rows[i % 2];
        const uint32_t between[4] = {now[0][1], now[1][0], now[0][3], now[1][2]};
        const auto weights = [&](int r) {
          return wgmma_operand(V::kW2 + (r * 3 + s) * kStepBytes + group * kColumns2 * kRowBytes + k * kOperandBytes);
        };
        wgmma_fence(acc);
        wgmma<T>(acc, now[0], weights(0), true);
        wgmma<T>(acc, between, weights(1), true);
        wgmma<T>(acc, now[1], weights(2), true);
        wgmma_commit();
        if (i + 1 < 3 * kStepMmas) {
          wgmma_wait<1>();  // of the registers that come next
          load(rows[(i + 1) % 2], (i + 1) / kStepMmas, (i + 1) % kStepMmas);
        }
      }
      wgmma_wait<0>(acc);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = wgmma_row(thread % kWarpgroup, 2 * half);
#pragma unroll
        for (int n = 0; n < kColumns2 / 8; ++n) {
          const uint32_t t = relu2<T>(acc[n][2 * half], acc[n][2 * half + 1]);
          store_shared(V::kT2 + swizzled128(row, group * kColumns2 / 8 + n) + quad * 4, t);
        }
      }
    }
    fence_async();
    sync_block();

    // y = relu(t2 . w3 + b3 + shortcut)
    {
      float acc[kColumns3 / 8][4];
      begin_with(acc, V::kBias + (2 * kMid + group * kColumns3) * 4, lane);
      const uint32_t w3 = V::kW3 + group * kColumns3 * kRowBytes;
      wgmma_fence(acc);
#pragma unroll
      for (int k = 0; k < kStepMmas; ++k)
        wgmma<T>(acc, wgmma_operand(V::kT2 + k * kOperandBytes), wgmma_operand(w3 + k * kOperandBytes), true);
      if constexpr (V::kProjection) {
#pragma unroll
        for (int i = 0; i < V::kKept; ++i) {
          const uint32_t part = w3 + (1 + i / kStepMmas) * kBlocks3 * kStepBytes;
          wgmma<T>(acc, kept[i], wgmma_operand(part + i % kStepMmas * kOperandBytes), true);
        }
      }
      wgmma_commit();
      wgmma_wait<0>(acc);
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int n = 0; n < kColumns3 / 8; n += 4) {
          uint32_t out[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            Pair s{};
            if constexpr (!V::kProjection) unpack2<T>(kept[(n + i) / 2][(n + i) % 2 * 2 + half], s.first, s.second);
            out[i] = relu2<T>(acc[n + i][2 * half] + s.first, acc[n + i][2 * half + 1] + s.second);
          }
          store_pixel<kCo>(p, tile, wgmma_row(thread % kWarpgroup, 2 * half), group * kColumns3 + n * 8 + quad * 8,
                           out);
        }
    }
  }
}

template <typename V>
RF_KERNEL(kThreads)
bottleneck_fwd_sm90a_kernel(const RF_GRID_CONSTANT Params all) {
  if constexpr (kHopper) run<V>(all);
}

template <typename V>
Status launch(const BottleneckParams& p, const Device& device) {
  Params all{p, {}, {}};
  const uint64_t w = static_cast<uint64_t>(p.w), h = static_cast<uint64_t>(p.h), pixel = V::kCi * 2;
  const TensorBox x{p.x,
                    {V::kCi, w, h, static_cast<uint64_t>(p.n)},
                    {2, pixel, w * pixel, h * w * pixel},
                    {kStep, kHalo, kHalo, 1},
                    true};
  constexpr uint64_t kRows = V::kSteps * kMid, kBytes = kRows * kRowBytes;
  const TensorBox weights{p.weights, {kStep, kRows, 1, 1}, {2, kRowBytes, kBytes, kBytes}, {kStep, kMid, 1, 1}, true};
  if (const Status failed = encode(&all.x, x)) return failed;
  if (const Status failed = encode(&all.weights, weights)) return failed;
  const int tiles = p.n * p.tiles_h() * p.tiles_w();
  const Grid grid{tiles < device.sms ? tiles : device.sms, kThreads, static_cast<int>(V::kEnd)};
  return RF_LAUNCH(bottleneck_fwd_sm90a_kernel<V>, grid, device, all);
}

template <typename T>
Status launch_as(const BottleneckParams& p, const Device& device) {
  return p.projection ? launch<Variant<T, kMid>>(p, device) : launch<Variant<T, kCo>>(p, device);
}

}  // namespace

bool bottleneck_fwd_sm90a_fits(const BottleneckParams& p, const Device& device) {
  constexpr int kShared = static_cast<int>(Variant<Half, kCo>::kEnd);
  static_assert(Variant<Half, kMid>::kEnd <= kShared, "the projection's is the smaller one");
  return kHopperBuilt && device.arch == 90 && device.shared >= kShared && p.cmid == kMid && p.co == kCo &&
         p.ci == (p.projection ? kMid : kCo);
}

Status launch_bottleneck_fwd_sm90a(const BottleneckParams& p, const Device& device) {
  return p.bfloat16 ? launch_as<Bfloat16>(p, device) : launch_as<Half>(p, device);
}

}  // namespace resnet_fast
