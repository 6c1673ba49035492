// A whole bottleneck of stride 1 in one launch, BatchNorm folded (He et al. 2015, figure 5, right).
//
//   t1 = relu(conv1x1(x, w1) + b1)      (N, H, W, Cmid)          x (N, H, W, Ci), NHWC, 16 bit
//   t2 = relu(conv3x3(t1, w2) + b2)     (N, H, W, Cmid)          zero padding 1 of t1, not of x
//   y  = relu(conv1x1(t2, w3) + b3 + s) (N, H, W, Co)            s = x, or conv1x1(x, wp) of a projection
//
// Saved bytes. With one kernel per convolution, t1 and t2 are each written and read, and x is read a second time for
// the shortcut: (Ci + Cmid) + 2 Cmid + (Cmid + 2 Co) values per pixel. Here it is Ci + Co. With Ci = Co = 256, Cmid =
// 64 and 56 x 56 pixels of 16 bits: 6.42 MB per image -> 3.21 MB.
//
// GEMM. A chain of three over one tile of 8 x 8 pixels, with gemm_k in steps of 64 (one shared row of 128 bytes):
//
//      10 x 10 pixels with halo             8 x 8 pixels
//     +----------------+            +------------+              +------------+
//     | x     Ci wide  |  w1 (Cmid, | t1    Cmid |  w2 (Cmid,   | t2   Cmid  |  w3 (Co, Cmid)      y: registers -> 16
//     | 100 rows       | ---- Ci)-> | 100 rows   | --9*Cmid)--> | 64 rows    | -----------------> bytes a lane, 64 a
//     | shared memory  |            | shared     | nine shifted | shared     |   + x . wp, or      quad, global
//     +----------------+            +------------+    views     +------------+   + x (registers)
//       cp.async, once                zero outside of the image
//
//   256 threads form 8 warps.
//   conv1: 112 rows (7 tiles of 16; rows from 100 on repeat row 99 and are dropped), 4 x 2 warps. It computes
//   (10 * 10) / (8 * 8) = 1.56 times the pixels, which is 13 % more multiply-adds over the block.
//   conv2: 64 rows, 32 x 32 for every warp. With Cmid 64 these are 2 x 2 warps; the other four warps take the second
//   half of gemm_k, and each pair of warps adds up through shared memory.
//   conv3: passes of kPass channels, 32 for every warp.
//
// x is read from memory once. After conv1 the threads load the shortcut into registers, in the layout of conv3's
// accumulators. The buffer of x is then free, and the x of the next tile arrives during conv2 and conv3. With a
// projection x is needed until the end of the tile, so it has two buffers.
//
// Weights. Resident (Cmid 64 and 227 KB of shared memory): loaded once, while the block walks over the tiles. Streamed
// (Cmid 128, or 163 KB): a ring of steps, each (Cmid, 64), which cp.async fills while earlier steps are multiplied;
// every tile reads the weights again, from L2.
//
// Shared-memory rows are swizzled (fragments.h), so no access below has a bank conflict. With a tile width of 8, the
// eight rows of each ldmatrix are neighbours in the halo tile, so the nine shifted views have no conflicts either.
//
// Numerics: fp32 accumulators; t1, t2 and y are rounded once each, as if they had been stored. Bias, then shortcut,
// then ReLU. Halo pixels outside the image are zero AFTER conv1's ReLU: relu(0 . w1 + b1) is not zero.
//
// On Hopper with 64 inner channels, bottleneck_fwd_sm90a.cu runs instead.
//
// Limits: backends/cuda/bottleneck.py. To test this file: python -m pytest tests/emulator -k bottleneck. Counts:
// docs/tables/.
//
// Tried and rejected: tiles of 8 x 14, which leave no row of conv1 idle at 56 x 56 (1.43 times the pixels) but need 243
// KB; splitting gemm_k in conv1 as in conv2 (its partial sums take 28 KB, for which the weights leave no room).

#include <resnet_fast/bottleneck_fwd.h>
#include <resnet_fast/bottleneck_tile.h>
#include <resnet_fast/device.h>
#include <resnet_fast/epilogue.h>
#include <resnet_fast/fragments.h>
#include <resnet_fast/multiply.h>

namespace resnet_fast {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kTiles1 = (kHaloPixels + 15) / 16, kTiles2 = kPixels / 16;  // tiles of 16 rows
constexpr int kWide = 32 / 8;                                             // n tiles of a warp in conv2 and conv3
constexpr int kChunkBytes = 16;

// Inner channels, output channels, and the number of steps in the ring of streamed weights; 0 keeps all weights in
// shared memory.
template <typename T_, int kMid_, int kCo_, int kSlots_>
struct Variant {
  using T = T_;
  static constexpr int kMid = kMid_, kCo = kCo_, kSlots = kSlots_;
  static constexpr bool kResident = kSlots == 0;
  static constexpr int kPass = kResident ? kCo : kMid;  // channels of y at a time
  static constexpr int kPasses = kCo / kPass;
  static constexpr int kWarpsN1 = 2, kWide1 = kMid / kWarpsN1 / 8;
  static constexpr int kWarpsN2 = kMid / 32, kWarpsM2 = 2, kWarpsK2 = kWarps / kWarpsM2 / kWarpsN2;
  static constexpr int kTall2 = kTiles2 / kWarpsM2;
  static constexpr int kWarpsN3 = kPass / 32, kWarpsM3 = kWarps / kWarpsN3, kTall3 = kTiles2 / kWarpsM3;
  static constexpr int kStepBytes = kMid * kRowBytes;
  static constexpr int kMidSteps = kMid / kStep;
  static_assert(kWarpsN2 * kWarpsM2 * kWarpsK2 == kWarps && kWarpsK2 <= 2 && kWarpsN3 * kWarpsM3 == kWarps, "8 warps");
};

// Byte offsets in shared memory.
struct Layout {
  uint32_t bias, weights, x, t1, sums, t2, end;
  uint32_t x_bytes;  // of one buffer for x
  int x_places;      // buffers for x
};

template <typename V>
RF_HOST_DEVICE Layout layout_of(const BottleneckParams& p) {
  Layout at{};
  at.x_places = p.projection ? 2 : 1;
  at.x_bytes = static_cast<uint32_t>(p.steps1() * kHaloPixels * kRowBytes);
  at.bias = 0;
  at.weights = (2 * V::kMid + V::kCo) * 4;
  at.x = at.weights + static_cast<uint32_t>((V::kResident ? p.steps() : V::kSlots) * V::kStepBytes);
  at.t1 = at.x + static_cast<uint32_t>(at.x_places) * at.x_bytes;
  at.sums = at.t1 + V::kMidSteps * kHaloPixels * kRowBytes;
  // Where no pairs of warps add up, t2 overwrites t1.
  at.t2 = V::kWarpsK2 > 1 ? at.sums + kPixels * V::kMid * 4 : at.t1;
  at.end = (V::kWarpsK2 > 1 ? at.t2 + V::kMidSteps * kPixels * kRowBytes : at.sums);
  return at;
}

// Starts the copy of x of a tile with its halo to shared memory; zeros outside the image. The caller commits it.
RF_DEVICE void issue_x(const BottleneckParams& p, const Tile& tile, uint32_t at) {
  const int chunks = p.ci / 8;
  for (int i = thread_index(); i < (kHaloPixels * chunks + kThreads - 1) / kThreads * kThreads; i += kThreads) {
    if (i >= kHaloPixels * chunks) break;
    const int pixel = i / chunks, chunk = i % chunks;
    const int h = tile.h - 1 + pixel / kHalo, w = tile.w - 1 + pixel % kHalo;
    const bool inside = in_image(p, h, w);
    const size_t row = inside ? (static_cast<size_t>(tile.n) * p.h + h) * p.w + w : 0;
    const uint32_t to = at + chunk / kStepChunks * kHaloPixels * kRowBytes + swizzled(pixel, chunk % kStepChunks);
    cp_async16(to, static_cast<const char*>(p.x) + (row * p.ci + chunk * 8) * 2, inside);
  }
}

// Starts the copy of one step of the weights, (kMid, 64), to shared memory.
template <typename V>
RF_DEVICE void issue_weights(const BottleneckParams& p, int step, uint32_t at) {
  constexpr int kChunks = V::kMid * kStepChunks;
  static_assert(kChunks % kThreads == 0, "all threads copy");
  const char* from = static_cast<const char*>(p.weights) + static_cast<size_t>(step) * V::kStepBytes;
#pragma unroll
  for (int i = thread_index(); i < kChunks; i += kThreads)
    cp_async16(at + swizzled(i / kStepChunks, i % kStepChunks), from + i * kChunkBytes);
}

// The steps of the weights in shared memory, and the ring that loads them where they are streamed.
template <typename V>
struct Weights {
  const BottleneckParams& p;
  uint32_t at;
  int steps;      // of a tile
  int remaining;  // steps that this block still has to load
  int loaded = 0, used = 0;

  // Starts the first steps of the ring, one cp.async group each. The first group includes the copies issued before it
  // (x).
  RF_DEVICE void start() {
    for (int i = 0; i < (V::kResident ? steps : V::kSlots - 1); ++i) {
      load();
      cp_async_commit();
    }
  }
  RF_DEVICE void load() {
    if (remaining <= 0) return;
    const int slot = V::kResident ? loaded : loaded % V::kSlots;
    issue_weights<V>(p, loaded % steps, at + static_cast<uint32_t>(slot) * V::kStepBytes);
    loaded += 1;
    remaining -= 1;
  }
  // Returns the address of the next step, after waiting for its arrival, and refills the slot of the step before it.
  // Every thread of the block calls this.
  RF_DEVICE uint32_t next() {
    const int step = used++;
    if constexpr (V::kResident) {
      return at + static_cast<uint32_t>(step % steps) * V::kStepBytes;
    } else {
      cp_async_wait<V::kSlots - 2>();
      sync_block();
      load();
      cp_async_commit();
      return at + static_cast<uint32_t>(step % V::kSlots) * V::kStepBytes;
    }
  }
};

// t1 = relu(x . w1 + b1) on the halo tile; 0 outside the image.
template <typename V>
RF_DEVICE void conv1(const BottleneckParams& p, const Layout& at, const Tile& tile, uint32_t x_at, int warp,
                     Weights<V>& weights) {
  using T = typename V::T;
  const int lane = fresh(lane_index()), quad = lane % 4;
  const int warp_m = warp / V::kWarpsN1, warp_n = warp % V::kWarpsN1;
  constexpr int kWarpsM1 = kWarps / V::kWarpsN1, kTall1 = (kTiles1 + kWarpsM1 - 1) / kWarpsM1;
  const int used = (kTiles1 - warp_m + kWarpsM1 - 1) / kWarpsM1;
  float acc[kTall1][V::kWide1][4];
  begin_with(acc, at.bias + warp_n * V::kWide1 * 8 * 4, lane);
#pragma unroll 1
  for (int s = 0; s < p.steps1(); ++s) {
    const uint32_t step = weights.next();
#pragma unroll
    for (int k = 0; k < kStepMmas; ++k) {
      uint32_t a[kTall1][4];
#pragma unroll
      for (int m = 0; m < kTall1; ++m) {
        const int row = (warp_m + m * kWarpsM1) * 16 + a_address_row(lane);
        const int pixel = row < kHaloPixels ? row : kHaloPixels - 1;
        if (m < used)
          ldmatrix_x4(a[m], x_at + s * kHaloPixels * kRowBytes + swizzled(pixel, k * 2 + a_address_chunk(lane)));
      }
      multiply<T>(acc, a, step, warp_n * V::kWide1 * 8, k, lane, used);
    }
  }
#pragma unroll
  for (int m = 0; m < kTall1; ++m) {
    if (m >= used) break;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int pixel = (warp_m + m * kWarpsM1) * 16 + d_row(lane, 2 * half);
      const bool inside = in_image(p, tile, pixel);
#pragma unroll
      for (int n = 0; n < V::kWide1; ++n) {
        const int chunk = warp_n * V::kWide1 + n;
        const uint32_t t = relu2<T>(acc[m][n][2 * half], acc[m][n][2 * half + 1]);
        const uint32_t to =
            at.t1 + chunk / kStepChunks * kHaloPixels * kRowBytes + swizzled(pixel, chunk % kStepChunks) + quad * 4;
        store_shared(to, inside ? t : 0u, pixel < kHaloPixels);
      }
    }
  }
}

// The part of the shortcut that a thread adds: one word of two channels for every two of its accumulators in conv3.
template <typename V>
using Shortcut = uint32_t[V::kPasses][V::kTall3][kWide][2];

// Loads the centre of x into registers.
template <typename V>
RF_DEVICE void take_shortcut(Shortcut<V>& shortcut, uint32_t x_at, int warp) {
  const int lane = fresh(lane_index()), quad = lane % 4;
#pragma unroll
  for (int pass = 0; pass < V::kPasses; ++pass)
#pragma unroll
    for (int m = 0; m < V::kTall3; ++m)
#pragma unroll
      for (int n = 0; n < kWide; ++n)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = (warp / V::kWarpsN3 * V::kTall3 + m) * 16 + d_row(lane, 2 * half);
          const int chunk = pass * V::kPass / 8 + warp % V::kWarpsN3 * kWide + n;
          shortcut[pass][m][n][half] = load_shared<uint32_t>(x_at + chunk / kStepChunks * kHaloPixels * kRowBytes +
                                                             swizzled(centre(row), chunk % kStepChunks) + quad * 4);
        }
}

// Adds the partial sums of a pair of warps, each of which took half of gemm_k. Each warp keeps one of the two row
// tiles, in acc[0].
template <typename V>
RF_DEVICE void add_halves(float (&acc)[V::kTall2][kWide][4], const Layout& at, int warp_k, int pair, int lane) {
  static_assert(V::kTall2 == 2, "one row tile for each warp of a pair");
  const auto place = [&](int of_k, int n) {
    return at.sums +
           static_cast<uint32_t>((((of_k * V::kWarpsM2 * V::kWarpsN2 + pair) * kWide + n) * kWarp + lane) * 16);
  };
#pragma unroll
  for (int n = 0; n < kWide; ++n) {
    Vec16 sent;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float value = warp_k == 0 ? acc[1][n][i] : acc[0][n][i];
      __builtin_memcpy(&sent.word[i], &value, 4);
    }
    store_shared(place(warp_k, n), sent);
  }
  sync_block();
#pragma unroll
  for (int n = 0; n < kWide; ++n) {
    const Vec16 got = load_shared<Vec16>(place(1 - warp_k, n));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float value;
      __builtin_memcpy(&value, &got.word[i], 4);
      acc[0][n][i] = (warp_k == 0 ? acc[0][n][i] : acc[1][n][i]) + value;
    }
  }
}

// t2 = relu(conv3x3(t1, w2) + b2)
template <typename V>
RF_DEVICE void conv2(const BottleneckParams& p, const Layout& at, int warp, Weights<V>& weights) {
  using T = typename V::T;
  const int lane = fresh(lane_index()), quad = lane % 4;
  const int warp_k = warp / (V::kWarpsM2 * V::kWarpsN2), rest = warp % (V::kWarpsM2 * V::kWarpsN2);
  const int warp_m = rest / V::kWarpsN2, warp_n = rest % V::kWarpsN2;
  constexpr int kMmas = kStepMmas / V::kWarpsK2;
  float acc[V::kTall2][kWide][4] = {};
  if (warp_k == 0) begin_with(acc, at.bias + (V::kMid + warp_n * kWide * 8) * 4, lane);
#pragma unroll 1
  for (int s = 0; s < p.steps2(); ++s) {
    const uint32_t step = weights.next();
    const int tap = s / V::kMidSteps, part = s % V::kMidSteps;
    const int shift = tap / 3 * kHalo + tap % 3;
#pragma unroll
    for (int k = 0; k < kMmas; ++k) {
      uint32_t a[V::kTall2][4];
#pragma unroll
      for (int m = 0; m < V::kTall2; ++m) {
        const int row = (warp_m * V::kTall2 + m) * 16 + a_address_row(lane);
        const int pixel = row / kTile * kHalo + row % kTile + shift;
        ldmatrix_x4(a[m], at.t1 + part * kHaloPixels * kRowBytes +
                              swizzled(pixel, (warp_k * kMmas + k) * 2 + a_address_chunk(lane)));
      }
      multiply<T>(acc, a, step, warp_n * kWide * 8, warp_k * kMmas + k, lane);
    }
  }
  if constexpr (V::kWarpsK2 > 1)
    add_halves<V>(acc, at, warp_k, rest, lane);
  else
    sync_block();  // every warp has read t1
#pragma unroll
  for (int m = 0; m < V::kTall2 / V::kWarpsK2; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = (warp_m * V::kTall2 + m + (V::kWarpsK2 > 1 ? warp_k : 0)) * 16 + d_row(lane, 2 * half);
#pragma unroll
      for (int n = 0; n < kWide; ++n) {
        const int chunk = warp_n * kWide + n;
        const uint32_t t = relu2<T>(acc[m][n][2 * half], acc[m][n][2 * half + 1]);
        store_shared(at.t2 + chunk / kStepChunks * kPixels * kRowBytes + swizzled(row, chunk % kStepChunks) + quad * 4,
                     t);
      }
    }
}

// y = relu(t2 . w3 + b3 + shortcut)
template <typename V>
RF_DEVICE void conv3(const BottleneckParams& p, const Layout& at, const Tile& tile, uint32_t x_at, int warp,
                     Weights<V>& weights, const Shortcut<V>& shortcut) {
  using T = typename V::T;
  const int warp_m = warp / V::kWarpsN3, warp_n = warp % V::kWarpsN3;
#pragma unroll
  for (int pass = 0; pass < V::kPasses; ++pass) {
    const int lane = fresh(lane_index()), group = lane / 4, quad = lane % 4;
    // Streamed: a step holds the channels of the pass. Resident: a step holds Cmid channels.
    const int channel = warp_n * kWide * 8;
    float acc[V::kTall3][kWide][4];
    begin_with(acc, at.bias + (2 * V::kMid + pass * V::kPass + channel) * 4, lane);
#pragma unroll 1
    for (int s = 0; s < p.steps3(); ++s) {
      uint32_t step = weights.next();
      if (V::kResident) step += static_cast<uint32_t>(channel / V::kMid * p.steps3()) * V::kStepBytes;
      const bool from_x = s >= V::kMidSteps;
      const int part = from_x ? s - V::kMidSteps : s;
// Unrolled by two where the shortcut takes 64 registers: unrolling fully would spill one.
#pragma unroll(V::kCo == 512 ? 2 : kStepMmas)
      for (int k = 0; k < kStepMmas; ++k) {
        uint32_t a[V::kTall3][4];
#pragma unroll
        for (int m = 0; m < V::kTall3; ++m) {
          const int row = (warp_m * V::kTall3 + m) * 16 + a_address_row(lane);
          const int chunk = k * 2 + a_address_chunk(lane);
          ldmatrix_x4(a[m], from_x ? x_at + part * kHaloPixels * kRowBytes + swizzled(centre(row), chunk)
                                   : at.t2 + part * kPixels * kRowBytes + swizzled(row, chunk));
        }
        multiply<T>(acc, a, step, channel % V::kMid, k, lane);
      }
    }
    if (V::kResident) weights.used += (V::kCo / V::kMid - 1) * p.steps3();
#pragma unroll
    for (int m = 0; m < V::kTall3; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t out[kWide];
#pragma unroll
        for (int n = 0; n < kWide; ++n) {
          Pair s;
          unpack2<T>(shortcut[pass][m][n][half], s.first, s.second);
          out[n] = relu2<T>(acc[m][n][2 * half] + s.first, acc[m][n][2 * half + 1] + s.second);
        }
        const int row = (warp_m * V::kTall3 + m) * 16 + group + 8 * half;
        store_pixel<V::kCo>(p, tile, row, pass * V::kPass + channel + quad * 8, out);
      }
  }
}

template <typename V>
RF_KERNEL(kThreads)
bottleneck_fwd_kernel(const BottleneckParams p) {
  const Layout at = layout_of<V>(p);
  const int warp = warp_index();
  const int tiles = p.n * p.tiles_h() * p.tiles_w();
  const int mine = (tiles - block_index() + block_count() - 1) / block_count();
  const auto tile_at = [&](int round) { return tile_of(p, block_index() + round * block_count()); };
  const auto x_of = [&](int round) { return at.x + static_cast<uint32_t>(round % at.x_places) * at.x_bytes; };
  Weights<V> weights{p, at.weights, p.steps(), V::kResident ? p.steps() : mine * p.steps()};

  // x of the first tile, the weights, the biases
  issue_x(p, tile_at(0), at.x);
  weights.start();
  stage_biases<V::kMid, V::kCo, kThreads>(p, at.bias);
  sync_block();  // accumulators start with the biases, before the first step of a ring waits

  for (int round = 0; round < mine; ++round) {
    const Tile tile = tile_at(round);
    const uint32_t x_at = x_of(round);
    if (V::kResident) {
      cp_async_wait<0>();
      sync_block();
    }
    conv1<V>(p, at, tile, x_at, warp, weights);
    Shortcut<V> shortcut = {};
    if (!p.projection) take_shortcut<V>(shortcut, x_at, warp);
    sync_block();
    if (round + 1 < mine) issue_x(p, tile_at(round + 1), x_of(round + 1));
    if (V::kResident) cp_async_commit();
    conv2<V>(p, at, warp, weights);
    sync_block();
    conv3<V>(p, at, tile, x_at, warp, weights, shortcut);
  }
}

template <typename V>
Status launch(const BottleneckParams& p, const Device& device) {
  const int tiles = p.n * p.tiles_h() * p.tiles_w();
  const Grid grid{tiles < device.sms ? tiles : device.sms, kThreads, static_cast<int>(layout_of<V>(p).end)};
  return RF_LAUNCH(bottleneck_fwd_kernel<V>, grid, device, p);
}

// The variants by channels, from most to least bytes on chip. Where only bytes count, `Half` is used for both types.
template <typename T>
struct Variants {
  using Stays64 = Variant<T, 64, 256, 0>;
  using Ring64 = Variant<T, 64, 256, 4>;
  using Ring128 = Variant<T, 128, 256, 4>;
  using Deep512 = Variant<T, 128, 512, 4>;
  using Shallow512 = Variant<T, 128, 512, 2>;
};

template <typename V>
bool fits(const BottleneckParams& p, const Device& device) {
  return static_cast<int>(layout_of<V>(p).end) <= device.shared;
}

// Launches the first variant that fits. If none fits, the launch of the last one returns the reason.
template <typename T>
Status launch_as(const BottleneckParams& p, const Device& device) {
  using All = Variants<T>;
  if (p.cmid == 64) {
    const bool stays = fits<typename All::Stays64>(p, device);
    return stays ? launch<typename All::Stays64>(p, device) : launch<typename All::Ring64>(p, device);
  }
  if (p.co == 256) return launch<typename All::Ring128>(p, device);
  const bool deep = fits<typename All::Deep512>(p, device);
  return deep ? launch<typename All::Deep512>(p, device) : launch<typename All::Shallow512>(p, device);
}

}  // namespace

int bottleneck_fwd_shared(const BottleneckParams& p) {
  using All = Variants<Half>;
  const Layout at = p.cmid == 64  ? layout_of<All::Ring64>(p)
                    : p.co == 256 ? layout_of<All::Ring128>(p)
                                  : layout_of<All::Shallow512>(p);
  return static_cast<int>(at.end);
}

Status launch_bottleneck_fwd(const BottleneckParams& p, const Device& device) {
  if (bottleneck_fwd_sm90a_fits(p, device)) return launch_bottleneck_fwd_sm90a(p, device);
  return p.bfloat16 ? launch_as<Bfloat16>(p, device) : launch_as<Half>(p, device);
}

}  // namespace resnet_fast
