// The first layers of an ImageNet ResNet in one launch: conv 7x7/2 + BatchNorm + ReLU + max-pool 3x3/2.
//
//   c[n, p, q, co] = sum_rsc x[n, 2p - 3 + r, 2q - 3 + s, c] * w[co, r, s, c]  +  b[co]      7x7, stride 2, padding 3
//   y[n, i, j, co] = relu( max over p in 2i-1..2i+1, q in 2j-1..2j+1 of c[n, p, q, co] )     -inf outside c
//
//   x (N, H, W, 3)   w (64, 7, 7, 3), BatchNorm folded   b (64) fp32   y (N, Hp, Wp, 64)     NHWC, 16 bit
//
// Saved bytes, per image of 224 x 224 pixels of 16 bits: c (112 x 112 x 64, 1.61 MB) is neither written nor read back.
// x (0.30) and y (0.40) remain: 3.92 MB (convolution, then pooling) -> 0.70.
//
// GEMM. gemm_m = pixels of c, gemm_n = 64, gemm_k = 7 filter rows of 7 * 3 = 21 values that are adjacent in x. Each row
// is padded to 24 values: one zero before it and two after. 7 * 24 = 168, and 8 more give eleven steps of mma's 16.
//
//   values of image row 2p - 3 + r          . . |.|R G B R G B R G B R G B R G B R G B R G B|. .| . .
//   k of filter row r                            0 1 2 3 4 ...                           21 22 23
//   words of 4 bytes                            |  0|  1|  2|  3|  4|  5|  6|  7|  8|  9| 10| 11|
//   groups of a quad's four lanes               |       0       |       1       |       2       |
//
//   Reason: the window of q starts 6 values (12 bytes) after that of q - 1. ldmatrix cannot use such an address, but
//   4-byte loads can, because the zero in front makes the first index even. Eight neighbouring q and a quad read words
//   3g + t, which are among 25 consecutive words: no bank conflicts. Counts per 16 pixels, 32 channels and warp:
//
//      21 -> 32 (a step holds one filter row)   42 loads   42 wavefronts   56 mma
//      147 -> 160 (no padding inside)           40 loads   50 wavefronts   40 mma    quads cross filter rows
//      21 -> 24, 168 -> 176 (this)              42 loads   42 wavefronts   44 mma
//
//   The three padding values belong to neighbours in x. They are cleared after loading, because 0 * NaN is NaN.
//
// A tile is 7 x 14 pooled pixels of one image. Its patch of x, 35 rows of 200 values, is staged with 16-byte cp.async
// and double buffering. It starts at value 12 * (14 * k) - 16 of a row, which is 16-byte aligned if W is a multiple
// of 8. Other widths are staged with loads of 8, 4 or 2 bytes, whichever the alignment of W * 6 bytes allows.
//
//      columns of c:  0 1 2 ... 14 15     A warp computes 16 columns of one row of c at a time, 32 channels, and walks
//                    (-1)                 down the rows. 4 warps: 2 neighbours in q (14 columns apart, so the 15th and
//      pooled          0  1  ...  6       16th are computed twice) times 2 halves of the channels. All weights of its
//                                         half stay in 88 registers, loaded 16 bytes at a time in fragment order.
//
//      rows of c:  2i-1 \                 Row 2i + 1 serves pooled rows i and i + 1: it is computed once, and is the
//                  2i    > i              first of the three in i + 1. With the parts of c that two tiles compute:
//                  2i+1 / \               (15 / 14 rows) * (16 / 14 columns) = 1.22 times the products.
//
// Pooling happens in registers. Down the rows: packed 16-bit maxima, one instruction for two channels. Across the
// columns, once per pooled row: a lane holds columns g and 8 + g of c. Lanes with even g compute pooled column g / 2,
// lanes with odd g compute 4 + g / 2; three shuffles per word bring what other lanes hold. ReLU and 16-byte stores
// follow (epilogue.h).
//
// Numerics: fp32 accumulators, + b, rounded once, then maximum and ReLU. Rounding is monotonic, so this equals the
// rounded maximum. NaN passes through both, as in ATen.
//
// Limits: this filter, this pool, 3 input and 64 output channels (backends/cuda/stem.py). To test this file: python -m
// pytest tests/emulator -k stem.
//
// Tried and rejected, with counts per 16 pixels of c and 64 channels, where this kernel needs 84 wavefronts of loads
// and 16 of shuffles:
//   - c of a tile in shared memory, and pooling from there: 40 instead of the 16, and two barriers a tile;
//   - weights by ldmatrix: 176 for each set of row tiles that a warp computes at once, and 42 for the patch, which all
//     channels then share. Four row tiles would need as many as now, but 128 accumulators a lane;
//   - columns 2j - 1 and 2j in one lane, which saves a shuffle: words 6g + t conflict, two wavefronts a load.

#include <cmath>

#include <resnet_fast/device.h>
#include <resnet_fast/epilogue.h>
#include <resnet_fast/fragments.h>
#include <resnet_fast/stem_fwd.h>
#include <resnet_fast/tiles.h>

namespace resnet_fast {
namespace {

constexpr int kThreads = 128, kBlocks = 3;  // blocks that an SM's registers hold
constexpr int kWarpsN = kStemHalves;
constexpr int kStripW = 7, kStripColumns = 2 * kStripW;  // pooled columns of a warp; columns of c to the next warp
constexpr int kFilter = 7, kChannelsIn = 3;
constexpr int kRowGroups = 3, kGroups = kFilter * kRowGroups;  // groups of 8 k: of a filter row, in all
constexpr int kSteps = (kGroups + 1) / 2;                      // steps of 16 k
constexpr int kWide = kStemChannels / kStemHalves / 8;         // column tiles of 8 of a warp
constexpr int kChunkBytes = 16;
// Values from the window of a column of c to that of the next; then the patch, up to the last window with its padding.
constexpr int kWindowStep = 2 * kChannelsIn;
constexpr int kPatchRows = 4 * kStemTileH + kFilter;
constexpr int kPatchNumbers = 200, kPatchPitch = kPatchNumbers * 2, kPatchBytes = kPatchRows * kPatchPitch;
static_assert(kPatchNumbers >= kWindowStep * (kStripColumns + 15) + 8 * kRowGroups, "the last window fits");
static_assert(kStemTileW == 2 * kStripW && kStemUnits == 2 * kSteps && kPatchBytes % kChunkBytes == 0, "as explained");

// The position in x of a unit of kNumbers values of the patch. A unit is wholly inside a row of the image or outside.
template <int kNumbers>
struct Unit {
  bool inside;
  size_t from;

  RF_DEVICE Unit(const StemParams& p, const Tile& tile, int i) {
    constexpr int kAcross = kPatchNumbers / kNumbers;
    const int h = 4 * tile.h - 5 + i / kAcross;
    const int number = 12 * tile.w - 16 + i % kAcross * kNumbers;
    inside = h >= 0 && h < p.h && number >= 0 && number < p.w * kChannelsIn;
    from = inside ? (static_cast<size_t>(tile.n) * p.h + h) * p.w * kChannelsIn + number : 0;
  }
};

// Copies the patch through registers, for images whose rows are aligned only to V.
template <typename V>
RF_DEVICE void copy_patch(const StemParams& p, const Tile& tile, uint32_t at) {
  constexpr int kNumbers = sizeof(V) / 2;
  for (int i = thread_index(); i < kPatchRows * kPatchNumbers / kNumbers; i += kThreads) {
    const Unit<kNumbers> unit(p, tile, i);
    store_shared(at + i * sizeof(V), load_global<V>(static_cast<const char*>(p.x) + unit.from * 2, unit.inside));
  }
}

// Copies x of a tile to shared memory; zeros outside the image. The copy is asynchronous where 16-byte copies are
// possible; the caller commits it.
RF_DEVICE void issue_patch(const StemParams& p, const Tile& tile, uint32_t at) {
  if (p.w % 8 == 0) {
    for (int i = thread_index(); i < kPatchBytes / kChunkBytes; i += kThreads) {
      const Unit<8> unit(p, tile, i);
      cp_async16(at + i * kChunkBytes, static_cast<const char*>(p.x) + unit.from * 2, unit.inside);
    }
  } else if (p.w % 4 == 0) {
    copy_patch<uint64_t>(p, tile, at);
  } else if (p.w % 2 == 0) {
    copy_patch<uint32_t>(p, tile, at);
  } else {
    copy_patch<uint16_t>(p, tile, at);
  }
}

// The weights and biases of a half of the channels, as a lane keeps them.
struct Weights {
  uint32_t words[kSteps][kWide][2];
  Pair bias[kWide];
};

RF_DEVICE void load_weights(Weights& weights, const StemParams& p, int half) {
  const int lane = lane_index();
#pragma unroll
  for (int unit = 0; unit < kStemUnits; ++unit) {
    const char* from = static_cast<const char*>(p.weights);
    const Vec16 four = load_global<Vec16>(from + ((half * kStemUnits + unit) * kWarp + lane) * kChunkBytes);
#pragma unroll
    for (int i = 0; i < 4; ++i) weights.words[unit / 2][unit % 2 * 2 + i / 2][i % 2] = four.word[i];
  }
#pragma unroll
  for (int n = 0; n < kWide; ++n)
    weights.bias[n] = load_global<Pair>(p.bias + (half * kWide + n) * 8 + d_column(lane, 0));
}

// Computes one row of c, 16 columns and 32 channels, rounded. Word [half][n] holds column d_row(lane, 2 * half) and
// channels d_column of column tile n. `at`: the lane's first word of the first window row.
template <typename T>
RF_DEVICE void convolve_row(uint32_t (&c)[2][kWide], const Weights& weights, uint32_t at) {
  const int quad = lane_index() % 4;
  const uint32_t keep_first = quad == 0 ? 0xffff0000u : 0xffffffffu, keep_last = quad == 3 ? 0u : 0xffffffffu;
  float acc[kWide][4] = {};
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    uint32_t a[4] = {};
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      const int group = 2 * step + word / 2, part = group % kRowGroups;
      if (group == kGroups) break;
      const uint32_t shift = group / kRowGroups * kPatchPitch + part * 16 + word % 2 * 8 * kWindowStep * 2;
      const uint32_t numbers = load_shared<uint32_t>(at + shift);
      a[word] = part == 0 ? numbers & keep_first : part == kRowGroups - 1 ? numbers & keep_last : numbers;
    }
#pragma unroll
    for (int n = 0; n < kWide; ++n) mma_m16n8k16<T>(acc[n], a, weights.words[step][n]);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int n = 0; n < kWide; ++n)
      c[half][n] = pack2<T>(acc[n][2 * half] + weights.bias[n].first, acc[n][2 * half + 1] + weights.bias[n].second);
}

// Takes maxima over three columns of c: one pooled pixel per lane, column g / 2 of the strip for even g and 4 + g / 2
// for odd g (none for g = 7). Even g need columns g, g + 1, g + 2 of c; odd g need 8 + g - 1, 8 + g, 8 + g + 1.
template <typename T>
RF_DEVICE void pool_columns(uint32_t (&pooled)[kWide], const uint32_t (&c)[2][kWide]) {
  const int lane = lane_index(), group = lane / 4;
  const bool odd = group & 1;
  const int third = (group + (odd ? 1 : 2)) % 8 * 4 + lane % 4;
#pragma unroll
  for (int n = 0; n < kWide; ++n) {
    const uint32_t low = c[0][n], high = c[1][n];
    const uint32_t second = shuffle_xor(odd ? low : high, 4);
    // column 8, the third of g = 6, is held by g = 0 as its high column
    const uint32_t third_low = shuffle(group == 0 ? high : low, third), third_high = shuffle(high, third);
    const uint32_t two = larger2<T>(odd ? high : low, second);
    pooled[n] = larger2<T>(two, odd ? third_high : third_low);
  }
}

// y[n, i, j, :] = relu(pooled), where j is the lane's pooled column.
template <typename T>
RF_DEVICE void store_pooled(const StemParams& p, uint32_t (&pooled)[kWide], int n, int i, int j, int half) {
  const int lane = lane_index(), group = lane / 4, quad = lane % 4;
#pragma unroll
  for (int k = 0; k < kWide; ++k) pooled[k] = larger2<T>(pooled[k], 0u);
  const bool inside = group != 7 && j < p.wp();
  const size_t pixel = inside ? (static_cast<size_t>(n) * p.hp() + i) * p.wp() + j : 0;
  store_global(static_cast<char*>(p.y) + (pixel * kStemChannels + half * kWide * 8 + quad * 8) * 2,
               transposed_in_quad(pooled), inside);
}

template <typename T>
RF_KERNEL(kThreads, kBlocks)
stem_fwd_kernel(const StemParams p) {
  const int warp_n = warp_index() % kWarpsN, strip = warp_index() / kWarpsN;
  const int lane = lane_index(), group = lane / 4, quad = lane % 4;
  const int tiles = p.n * p.tiles_h() * p.tiles_w();
  const int ho = p.ho(), wo = p.wo(), hp = p.hp();
  issue_patch(p, tile_of<kStemTileH, kStemTileW>(p, block_index()), 0);
  cp_async_commit();

  Weights weights;
  load_weights(weights, p, warp_n);

  const uint32_t outside = pack2<T>(-INFINITY, -INFINITY);
  const int pooled_column = strip * kStripW + (group % 2 == 0 ? 0 : 4) + group / 2;
  int place = 0;
  for (int index = block_index(); index < tiles; index += block_count()) {
    cp_async_wait<0>();
    sync_block();
    if (index + block_count() < tiles)
      issue_patch(p, tile_of<kStemTileH, kStemTileW>(p, index + block_count()), (1 - place) * kPatchBytes);
    cp_async_commit();

    const Tile tile = tile_of<kStemTileH, kStemTileW>(p, index);
    const uint32_t patch = place * kPatchBytes + ((strip * kStripColumns + group) * kWindowStep + quad * 2) * 2;
    const int q = 2 * tile.w - 1 + strip * kStripColumns + group;  // and q + 8
    const bool exists[2] = {q >= 0 && q < wo, q + 8 < wo};
    const int rows = hp - tile.h < kStemTileH ? hp - tile.h : kStemTileH;
    uint32_t best[2][kWide];
#pragma unroll 1
    for (int row = 0; row <= 2 * rows; ++row) {
      // c = row of c, -inf outside of it
      uint32_t c[2][kWide];
      const int p_row = 2 * tile.h - 1 + row;
      const bool row_exists = p_row >= 0 && p_row < ho;
      if (row_exists) convolve_row<T>(c, weights, patch + 2 * row * kPatchPitch);
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int n = 0; n < kWide; ++n) {
          c[half][n] = row_exists && exists[half] ? c[half][n] : outside;
          best[half][n] = row == 0 ? c[half][n] : larger2<T>(best[half][n], c[half][n]);
        }
      if (row % 2 == 1 || row == 0) continue;

      // Rows 2i - 1, 2i and 2i + 1 are in: store pooled row i. Row 2i + 1 starts the next maximum.
      uint32_t pooled[kWide];
      pool_columns<T>(pooled, best);
      store_pooled<T>(p, pooled, tile.n, tile.h + row / 2 - 1, tile.w + pooled_column, warp_n);
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int n = 0; n < kWide; ++n) best[half][n] = c[half][n];
    }
    place = 1 - place;
  }
}

template <typename T>
Status launch_as(const StemParams& p, const Device& device) {
  const int tiles = p.n * p.tiles_h() * p.tiles_w(), most = kBlocks * device.sms;
  const Grid grid{tiles < most ? tiles : most, kThreads, 2 * kPatchBytes};
  return RF_LAUNCH(stem_fwd_kernel<T>, grid, device, p);
}

}  // namespace

Status launch_stem_fwd(const StemParams& p, const Device& device) {
  return p.bfloat16 ? launch_as<Bfloat16>(p, device) : launch_as<Half>(p, device);
}

}  // namespace resnet_fast
