// A whole bottleneck of stride 1 in one launch, as in bottleneck_fwd.cu, with Hopper's own instructions.
//
//   t1 = relu(conv1x1(x, w1) + b1)      (N, H, W, 64)            x (N, H, W, Ci), NHWC, 16 bit
//   t2 = relu(conv3x3(t1, w2) + b2)     (N, H, W, 64)            zero padding 1 of t1, not of x
//   y  = relu(conv1x1(t2, w3) + b3 + s) (N, H, W, 256)           s = x (Ci = 256), or conv1x1(x, wp) (Ci = 64)
//
// Saved bytes: see bottleneck_fwd.cu. Compared with it, this kernel also saves
//   - shared-memory time, which limits bottleneck_fwd.cu: 4,000 wavefronts of 128 bytes for a tile of 64 pixels instead
//     of 6,200, against 5,000 cycles of DRAM;
//   - instructions: 2,900 issue slots per tile and scheduler in total, where the main loops of bottleneck_fwd.cu alone
//     take 3,400.
//
// GEMM. A chain of three over one tile of 8 x 8 pixels. Two groups of four warps each issue their own wgmma:
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
//   conv1: both operands come from shared memory. The groups take rows 0-63 and 40-103 of the halo tile; both ranges
//   start at a multiple of the eight rows over which the swizzle repeats. Rows 40-63 are computed twice and stored
//   once; rows 100-103 are zeros.
//
//   conv2: operand a comes through registers, because a view of t1 shifted by one pixel starts in the middle of a
//   swizzle period, which a descriptor cannot express. The 16 rows of a warp are two rows of the image, so the four
//   halo rows that two ldmatrix_x4 load serve all three taps of a filter column.
//
//   conv3: both operands come from shared memory. The x of a projection comes through registers, because its centred
//   view does not start at a swizzle period either.
//
// x is read from memory once, by the copy engine, which fills in zeros outside the image. While conv1 multiplies, the
// threads load the centre of x into registers: the values of the shortcut in the layout of conv3's accumulators, or the
// operand of the projection. The buffer of x is then free, and the x of the next tile arrives during conv2 and conv3.
// All weights stay in shared memory.
//
// Two block barriers per tile: after the first, t1 is written and x is free; after the second, t2 is written. t1 and t2
// need no further barriers, because every group passes the other barrier between the last read of one tile and the
// first write of the next.
//
// Numerics: as in bottleneck_fwd.cu. Limits: bottleneck_fwd_sm90a_fits. To test this file: pytest tests/emulator -k
// "bottleneck and h100". Counts: docs/tables/. This kernel has not run on a GPU yet.
//
// Tried and rejected: operand a of conv2 from shared memory, with nine copies of t1 (104 KB); splitting conv1 by
// channels instead of rows, which reads x twice (1,536 wavefronts instead of 1,024).

#include <resnet_fast/bottleneck_tile.h>
#include <resnet_fast/hopper.h>

namespace resnet_fast {
namespace {

constexpr int kGroups = 2, kThreads = kGroups * kWarpgroup;
constexpr int kMid = 64, kCo = 256;
constexpr int kTaps = 9, kBlocks3 = kCo / kMid;  // steps of w2; steps of w3 for each 64 values of k
constexpr int kStepBytes = kMid * kRowBytes;     // of the weights
constexpr int kXRows = 104, kXBoxBytes = kXRows * kRowBytes;
constexpr int kSecondRow = 40;  // the first of conv1's rows that the second group computes
constexpr int kColumns2 = kMid / kGroups, kColumns3 = kCo / kGroups;
constexpr int kOperandBytes = 32;  // bytes of a row that one wgmma reads

// Input channels: 256, which are also the shortcut, or 64 with a projection.
template <typename T_, int kCi_>
struct Variant {
  using T = T_;
  static constexpr int kCi = kCi_, kBoxes = kCi / kStep;
  static constexpr bool kProjection = kCi != kCo;
  static constexpr int kParts3 = 1 + (kProjection ? kBoxes : 0);  // parts of 64 of conv3's k: t2, then x
  static constexpr int kSteps = kBoxes + kTaps + kBlocks3 * kParts3;
  // Groups of 16 channels of x's centre that a thread keeps: its group's share of the shortcut, or the operand of the
  // projection.
  static constexpr int kKept = (kProjection ? kCi : kColumns3) / 16;

  // Byte offsets in shared memory. Operands of wgmma start at a swizzle period.
  static constexpr uint32_t kW1 = 0, kW2 = kW1 + kBoxes * kStepBytes, kW3 = kW2 + kTaps * kStepBytes;
  static constexpr uint32_t kX = kSteps * kStepBytes, kT1 = kX + kBoxes * kXBoxBytes;
  static constexpr uint32_t kT2 = kT1 + kXBoxBytes, kBias = kT2 + kPixels * kRowBytes;
  static constexpr uint32_t kXReady = kBias + (2 * kMid + kCo) * 4, kWeightsReady = kXReady + kBarrierBytes;
  static constexpr uint32_t kEnd = kWeightsReady + kBarrierBytes;
  static_assert(kXBoxBytes % kSwizzleBytes == 0 && kSecondRow % kSwizzleRows == 0, "operands start at a period");
};

struct Params {
  BottleneckParams p;
  TensorMap x, weights;

  template <typename F>
  void tensors(F f) const {
    p.tensors(f);
  }
};

// The position of a thread: its group of four warps; its index, warp and lane in the group; its lane in the quad.
struct Place {
  int group, thread, warp, lane, quad;
};

RF_DEVICE Place place() {
  constexpr int kWarps = kWarpgroup / kWarp;
  const int warp = warp_index(), lane = lane_index();
  return {warp / kWarps, thread_index() % kWarpgroup, warp % kWarps, lane, lane % 4};
}

// Copies x of a tile with its halo to shared memory. Called by one thread.
template <typename V>
RF_DEVICE void load_x(const Params& all, const Tile& tile) {
  mbarrier_expect(V::kXReady, V::kBoxes * kHaloPixels * kRowBytes);
#pragma unroll
  for (int i = 0; i < V::kBoxes; ++i)
    tensor_load(V::kX + i * kXBoxBytes, all.x, i * kStep, tile.w - 1, tile.h - 1, tile.n, V::kXReady);
}

// Copies all weights to shared memory. Called by one thread. In global memory the parts of k of one block of 64 output
// channels of conv3 are adjacent; here the blocks of one part are adjacent, so that one operand spans them.
template <typename V>
RF_DEVICE void load_weights(const Params& all) {
  mbarrier_expect(V::kWeightsReady, V::kSteps * kStepBytes);
  for (int step = 0; step < V::kSteps; ++step) {
    const int last = step - V::kBoxes - kTaps;
    const int place = last < 0 ? step : V::kBoxes + kTaps + last % V::kParts3 * kBlocks3 + last / V::kParts3;
    tensor_load(V::kW1 + place * kStepBytes, all.weights, 0, step * kMid, 0, 0, V::kWeightsReady);
  }
}

// Before the first tile: starts the copies of its x and of the weights, zeroes the rows of x that no pixel fills, and
// stages the biases.
template <typename V>
RF_DEVICE void prepare(const Params& all, int thread) {
  if (thread == 0) {
    mbarrier_init(V::kXReady, 1);
    mbarrier_init(V::kWeightsReady, 1);
    mbarrier_init_fence();
    load_x<V>(all, tile_of(all.p, block_index()));
    load_weights<V>(all);
  }
  constexpr int kZeroChunks = (kXRows - kHaloPixels) * kRowChunks;
  for (int i = thread; i < V::kBoxes * kZeroChunks; i += kThreads)
    store_shared(V::kX + i / kZeroChunks * kXBoxBytes + kHaloPixels * kRowBytes + i % kZeroChunks * 16, Vec16{});
  stage_biases<kMid, kCo, kThreads>(all.p, V::kBias);
  fence_async();
  sync_block();
  mbarrier_wait(V::kWeightsReady, 0);
}

// Loads the centre of x into registers, 16 channels at a time. The layout of operand a is also that of two accumulator
// tiles.
template <typename V>
RF_DEVICE void keep_centre(uint32_t (&kept)[V::kKept][4], const Place& at) {
  const int pixel = centre(at.warp * 16 + a_address_row(at.lane));
#pragma unroll
  for (int i = 0; i < V::kKept; ++i) {
    const int box = i / kStepMmas + (V::kProjection ? 0 : at.group * V::kKept / kStepMmas);
    ldmatrix_x4(kept[i], V::kX + box * kXBoxBytes + swizzled128(pixel, i % kStepMmas * 2 + a_address_chunk(at.lane)));
  }
}

// t1 = relu(x . w1 + b1) on the halo tile; 0 outside the image. Loads the centre of x into `kept` at the same time.
template <typename V>
RF_DEVICE void conv1(const Params& all, const Tile& tile, const Place& at, int round, uint32_t (&kept)[V::kKept][4]) {
  float acc[kMid / 8][4];
  begin_with(acc, V::kBias, at.lane);
  mbarrier_wait(V::kXReady, round % 2);
  wgmma_fence(acc);
#pragma unroll
  for (int s = 0; s < V::kBoxes; ++s)
#pragma unroll
    for (int k = 0; k < kStepMmas; ++k)
      wgmma<typename V::T>(
          acc, wgmma_operand(V::kX + s * kXBoxBytes + at.group * kSecondRow * kRowBytes + k * kOperandBytes),
          wgmma_operand(V::kW1 + s * kStepBytes + k * kOperandBytes), true);
  wgmma_commit();
  keep_centre<V>(kept, at);
  wgmma_wait<0>(acc);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = at.group * kSecondRow + wgmma_row(at.thread, 2 * half);
    const bool mine = row >= at.group * kPixels && row < kHaloPixels, inside = in_image(all.p, tile, row);
#pragma unroll
    for (int n = 0; n < kMid / 8; ++n) {
      const uint32_t t = relu2<typename V::T>(acc[n][2 * half], acc[n][2 * half + 1]);
      store_shared(V::kT1 + swizzled128(row, n) + at.quad * 4, inside ? t : 0u, mine);
    }
  }
}

// Loads 16 channels of four halo rows of t1: the two image rows that this warp computes, and the two below. They serve
// the three taps of filter column `s`.
template <typename V>
RF_DEVICE void load_rows(uint32_t (&rows)[2][4], const Place& at, int s, int k) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = a_address_row(at.lane);
    const int pixel = (2 * (at.warp + i) + row / kTile) * kHalo + row % kTile + s;
    ldmatrix_x4(rows[i], V::kT1 + swizzled128(pixel, k * 2 + a_address_chunk(at.lane)));
  }
}

// t2 = relu(conv3x3(t1, w2) + b2)
template <typename V>
RF_DEVICE void conv2(const Place& at) {
  using T = typename V::T;
  float acc[kColumns2 / 8][4];
  begin_with(acc, V::kBias + (kMid + at.group * kColumns2) * 4, at.lane);
  uint32_t rows[2][2][4], between[2][4];  // both are in use until their products are waited for
  load_rows<V>(rows[0], at, 0, 0);
#pragma unroll
  for (int i = 0; i < 3 * kStepMmas; ++i) {
    const int s = i / kStepMmas, k = i % kStepMmas;
    const auto& now = rows[i % 2];
    auto& middle = between[i % 2];
    middle[0] = now[0][1];
    middle[1] = now[1][0];
    middle[2] = now[0][3];
    middle[3] = now[1][2];
    const auto weights = [&](int r) {
      return wgmma_operand(V::kW2 + (r * 3 + s) * kStepBytes + at.group * kColumns2 * kRowBytes + k * kOperandBytes);
    };
    wgmma_fence(acc);
    wgmma<T>(acc, now[0], weights(0), true);
    wgmma<T>(acc, middle, weights(1), true);
    wgmma<T>(acc, now[1], weights(2), true);
    wgmma_commit();
    if (i + 1 < 3 * kStepMmas) {
      wgmma_wait<1>();  // the products that read the registers loaded next
      load_rows<V>(rows[(i + 1) % 2], at, (i + 1) / kStepMmas, (i + 1) % kStepMmas);
    }
  }
  wgmma_wait<0>(acc);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = wgmma_row(at.thread, 2 * half);
#pragma unroll
    for (int n = 0; n < kColumns2 / 8; ++n) {
      const uint32_t t = relu2<T>(acc[n][2 * half], acc[n][2 * half + 1]);
      store_shared(V::kT2 + swizzled128(row, at.group * kColumns2 / 8 + n) + at.quad * 4, t);
    }
  }
}

// y = relu(t2 . w3 + b3 + shortcut). `kept` holds the shortcut, or the operand of the projection.
template <typename V>
RF_DEVICE void conv3(const Params& all, const Tile& tile, const Place& at, const uint32_t (&kept)[V::kKept][4]) {
  using T = typename V::T;
  float acc[kColumns3 / 8][4];
  begin_with(acc, V::kBias + (2 * kMid + at.group * kColumns3) * 4, at.lane);
  const uint32_t w3 = V::kW3 + at.group * kColumns3 * kRowBytes;
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
      store_pixel<kCo>(all.p, tile, wgmma_row(at.thread, 2 * half), at.group * kColumns3 + n * 8 + at.quad * 8, out);
    }
}

template <typename V>
RF_DEVICE void run(const Params& all) {
  const BottleneckParams& p = all.p;
  const int thread = thread_index(), tiles = p.n * p.tiles_h() * p.tiles_w();
  const Place at = place();
  prepare<V>(all, thread);

  int round = 0;
  for (int index = block_index(); index < tiles; index += block_count(), ++round) {
    const Tile tile = tile_of(p, index);
    uint32_t kept[V::kKept][4];
    conv1<V>(all, tile, at, round, kept);
    fence_async();  // orders this thread's reads of x before the copy that takes its place
    sync_block();
    if (thread == 0 && index + block_count() < tiles) load_x<V>(all, tile_of(p, index + block_count()));
    conv2<V>(at);
    fence_async();
    sync_block();
    conv3<V>(all, tile, at, kept);
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
  if (const Status failed = tensor_map(&all.x, x)) return failed;
  if (const Status failed = tensor_map(&all.weights, weights)) return failed;
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
  static_assert(Variant<Half, kMid>::kEnd <= kShared, "the projection needs less");
  return kHopperBuilt && device.arch == 90 && device.shared >= kShared && p.cmid == kMid && p.co == kCo &&
         p.ci == (p.projection ? kMid : kCo);
}

Status launch_bottleneck_fwd_sm90a(const BottleneckParams& p, const Device& device) {
  return p.bfloat16 ? launch_as<Bfloat16>(p, device) : launch_as<Half>(p, device);
}

}  // namespace resnet_fast
