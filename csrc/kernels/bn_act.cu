// BatchNorm, residual add and ReLU of a training step, forward: two launches for the statistics, one for the map.
//
//   mean[c] = sum_m x[m, c] / M         M2[c] = sum_m (x[m, c] - mean[c])^2           x, residual, y (N, C, H, W) NHWC,
//   invstd  = 1 / sqrt(M2 / M + eps)    scale = gamma * invstd                        rows m = (n, h, w) of C channels,
//   y[m, c] = relu( x * scale + shift + residual )   shift = beta - mean * scale      fp32, half or bfloat16
//
// where residual is nothing, a tensor r, or r * scale_r + shift_r: the raw output of a projection's convolution and its
// own norm. (Ioffe and Szegedy 2015, algorithm 1; Chan, Golub and LeVeque 1979 for M2; Welford 1962.)
//
// Saved bytes, in passes over a tensor of the size of x. Stock PyTorch: norm 2 + 1, add 3, ReLU 2, and 3 more for a
// projection's norm: 8 or 11. Here 1 + 3, and 1 more for the projection's statistics. For N 256, 56 x 56, C 256 in 16
// bit (411 MB a pass) with an identity: 3.3 GB -> 1.6 GB.
//
// Mapping: rows.h. A thread walks down one column of chunks of 16 bytes, whose channels' numbers stay in registers:
//
//        c ->                 stats: x - x[0, c], its mean and M2 over the thread's rows by Welford's update
//      [ t0  t1  ..  t15 ]           then a tree over the slots of the block (fold_slots), by Chan's formula
//    m [ t16 t17 ..  t31 ]           -> partials[0 | 1, split, channel]
//    | [ ..              ]    merge: 8 channels x 32 slots of a block; a slot takes every 32nd walk, then the same tree
//    v                        fwd:   scale and shift in registers, chunks in, chunks out
//
// In flight (Little): an H100 delivers 3 TB/s after about 700 ns, so 16 KB per SM must be on their way, and as much
// again so that a block that ends is not missed. stats: kUnroll = 4 chunks of 16 bytes per thread, three blocks on an
// SM (registers): 48 KB. fwd: 4 chunks of x, four blocks: 64 KB; and as many of a residual, two or three: 64 to 96 KB.
//
// Two launches, not one. The sums of all blocks meet somewhere. A cooperative launch would keep them inside one kernel
// at the price of a grid barrier (as long as a launch, 2 us, between two waves that may not overlap) and of at most as
// many blocks as fit at once; it could save bytes only by keeping x on chip until it is normalised, and x is 25 to 411
// MB where 33 MB of registers and 30 of shared memory are. What the second launch reads is `partials`: 8 bytes per walk
// and channel, 1 MB at C = 256 (0.3 % of x above), written and read once, from L2. The break between the launches is
// also where SyncBatchNorm belongs: merged per process, (count, mean, M2) of the processes merge by the same formula as
// walks do.
//
// Any C. Chunks may begin between channels (rows.h), so every access of the tensors is 16 bytes wide except to the last
// M * C % kN < 8 numbers. The map leaves them to the first block; the statistics to the merge, for which each is a walk
// of one row: mean = x, M2 = 0.
//
// Numerics. fp32. No square of a mean is ever formed, and no mean but the finished one: what Welford's update and
// Chan's merge see are distances from x[0, c], as large as the data are wide. Without that pivot a mean of 100 std is
// rounded to 2^-24 * 100 std at every row, and the error of M2 is that large, 20 times that of two passes; with it,
// |mean| >> std costs no digits. A first number that lies far from the others costs what no pivot would. Sums are taken
// in an order that only the shape decides (not the device, not time): the same bits every time. y is one fma, one add
// and one fma for a projection, then ReLU, rounded once; NaN stays NaN.
//
// Limits: M < 2^30 rows, C < 2^24. Alone: python -m pytest tests/emulator -k bn_act.
//
// Not taken: x - mean before the scale, which needs a third vector in registers and gains digits only where fp32 has
// more of them than the output; statistics by shifted sums, one instruction less of four, which lose digits if the
// pivot lies far from the data; the map's chunks without a column (flat), where every chunk loads its vectors anew.

#include <resnet_fast/bn_act.h>
#include <resnet_fast/chunks.h>

namespace resnet_fast {
namespace {

constexpr int kThreads = kRowsThreads;
constexpr int kUnroll = 4;
constexpr int kMergeChannels = 8, kMergeSlots = kThreads / kMergeChannels;  // 8 channels: a sector of partials

// How much of the union of two sets of numbers the other one is; 0 where both are empty.
RF_DEVICE float share_of(float count, float other_count) {
  return other_count > 0.0f ? other_count / (count + other_count) : 0.0f;
}
// Mean and M2 of that union, by Chan: `count` numbers here, of which the other set's are `share` of all.
RF_DEVICE void merge_moments(float count, float share, float& mean, float& m2, float other_mean, float other_m2) {
  const float distance = other_mean - mean;
  mean = multiply_add(distance, share, mean);
  m2 += multiply_add(distance * distance, count * share, other_m2);
}

template <typename T>
RF_KERNEL(kThreads)
bn_act_stats_kernel(const BnActStatsParams p) {
  constexpr int kN = kChunk<T>;
  const Rows& rows = p.rows;
  const Place at = place_of(rows);
  float pivot[kN], state[2 * kN + 1] = {};  // distances of the means from the pivot, M2, and the count last
  load_first_row<T>(pivot, p.x, rows, at.column, at.has_column);
  for (int base = at.row, step = 0; step < rows.walk; step += kUnroll * rows.tall, base += kUnroll * rows.tall) {
    Vec16 raw[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int row = base + u * rows.tall;
      raw[u] = load_global<Vec16>(chunk_of(p.x, rows, row, at.column), row < at.end);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (base + u * rows.tall >= at.end) break;
      float x[kN];
      unpack<T>(raw[u], x);
      state[2 * kN] += 1.0f;
      const float share = 1.0f / state[2 * kN];
#pragma unroll
      for (int i = 0; i < kN; ++i) {
        const float value = x[i] - pivot[i], distance = value - state[i];
        state[i] = multiply_add(distance, share, state[i]);
        state[kN + i] = multiply_add(distance, value - state[i], state[kN + i]);
      }
    }
  }
  fold_slots(state, rows.width, rows.tall, [](float (&mine)[2 * kN + 1], const float (&other)[2 * kN + 1]) {
    const float share = share_of(mine[2 * kN], other[2 * kN]);
#pragma unroll
    for (int i = 0; i < kN; ++i) merge_moments(mine[2 * kN], share, mine[i], mine[kN + i], other[i], other[kN + i]);
    mine[2 * kN] += other[2 * kN];
  });
  const bool writes = at.slot == 0 && at.has_column;
  float* to = p.partials + static_cast<size_t>(at.split) * rows.wide() + at.column * kN;
  store_floats<kN>(to, state, writes);
  store_floats<kN>(to + static_cast<size_t>(rows.splits) * rows.wide(), state + kN, writes);
}

template <typename T>
RF_KERNEL(kThreads)
bn_act_stats_merge_kernel(const BnActStatsMergeParams p) {
  const Rows& rows = p.rows;
  const int c = block_index() * kMergeChannels + thread_index() % kMergeChannels,
            slot = thread_index() / kMergeChannels;
  const int members = rows.splits * rows.copies;  // partials of a channel
  const size_t plane = static_cast<size_t>(rows.splits) * rows.wide();
  float state[3] = {};  // count, mean, M2
  const auto merge = [](float (&mine)[3], float count, float mean, float m2) {
    merge_moments(mine[0], share_of(mine[0], count), mine[1], mine[2], mean, m2);
    mine[0] += count;
  };
  for (int first = 0; first < members; first += kUnroll * kMergeSlots) {
    float mean[kUnroll], m2[kUnroll], count[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int member = first + u * kMergeSlots + slot;
      const int split = member / rows.copies, channel = member % rows.copies * rows.channels + c;
      const bool inside = member < members && c < rows.channels;
      const size_t from = static_cast<size_t>(split) * rows.wide() + channel;
      count[u] = inside ? static_cast<float>(rows.count(split, channel / rows.kn)) : 0.0f;
      mean[u] = load_global<float>(p.partials + from, inside);
      m2[u] = load_global<float>(p.partials + plane + from, inside);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) merge(state, count[u], mean[u], m2[u]);
  }
  fold_slots(state, kMergeChannels, kMergeSlots,
             [&](float (&mine)[3], const float (&other)[3]) { merge(mine, other[0], other[1], other[2]); });
  const bool mine = slot == 0 && c < rows.channels;
  const float pivot = load_number<T>(p.x, c, mine);
  for (int i = 0; i < rows.rest; ++i) {
    const bool here = mine && rows.channel_behind(i) == c;
    const float x = load_number<T>(p.x, rows.behind(i), here);
    if (here) merge(state, 1.0f, x - pivot, 0.0f);
  }
  const float gamma = p.gamma == nullptr ? 1.0f : load_global<float>(p.gamma + c, mine);
  const float beta = p.beta == nullptr ? 0.0f : load_global<float>(p.beta + c, mine);
  const float count = state[0], mean = pivot + state[1], m2 = state[2];
  const float invstd = 1.0f / square_root(m2 / count + p.eps);
  const float scale = gamma * invstd;
  const auto store = [&](int row, float value) {
    store_global(p.vectors + static_cast<size_t>(row) * rows.channels + c, value, mine);
  };
  store(NormRow::kScale, scale);
  store(NormRow::kShift, multiply_add(-mean, scale, beta));
  store(NormRow::kMean, mean);
  store(NormRow::kInvstd, invstd);
  store(NormRow::kVar, m2 / (count > 1.0f ? count - 1.0f : 1.0f));
  store(NormRow::kM2, m2);
}

// What is added before the ReLU.
enum class Residual { kNone, kTensor, kProjection };

template <typename T_, Residual kResidual_>
struct Fwd {
  using T = T_;
  static constexpr Residual kResidual = kResidual_;
};

template <Residual kResidual>
RF_DEVICE float mapped(float x, float scale, float shift, float r, float r_scale, float r_shift, bool with_relu) {
  float y = multiply_add(x, scale, shift);
  if constexpr (kResidual == Residual::kTensor) y += r;
  if constexpr (kResidual == Residual::kProjection) y += multiply_add(r, r_scale, r_shift);
  return with_relu ? relu(y) : y;
}

template <typename V>
RF_KERNEL(kThreads)
bn_act_fwd_kernel(const BnActFwdParams p) {
  using T = typename V::T;
  constexpr int kN = kChunk<T>;
  constexpr bool kReads = V::kResidual != Residual::kNone, kMaps = V::kResidual == Residual::kProjection;
  const Rows& rows = p.rows;
  const Place at = place_of(rows);
  float scale[kN], shift[kN], r_scale[kN] = {}, r_shift[kN] = {};
  load_channels(scale, p.affine, rows, at.column, at.has_column);
  load_channels(shift, p.affine + rows.channels, rows, at.column, at.has_column);
  if constexpr (kMaps) {
    load_channels(r_scale, p.residual_affine, rows, at.column, at.has_column);
    load_channels(r_shift, p.residual_affine + rows.channels, rows, at.column, at.has_column);
  }
  for (int base = at.row, step = 0; step < rows.walk; step += kUnroll * rows.tall, base += kUnroll * rows.tall) {
    Vec16 raw[kUnroll], given[kUnroll] = {};
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int row = base + u * rows.tall;
      raw[u] = load_global<Vec16>(chunk_of(p.x, rows, row, at.column), row < at.end);
      if constexpr (kReads) given[u] = load_global<Vec16>(chunk_of(p.residual, rows, row, at.column), row < at.end);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int row = base + u * rows.tall;
      float x[kN], r[kN] = {};
      unpack<T>(raw[u], x);
      if constexpr (kReads) unpack<T>(given[u], r);
#pragma unroll
      for (int i = 0; i < kN; ++i)
        x[i] = mapped<V::kResidual>(x[i], scale[i], shift[i], r[i], r_scale[i], r_shift[i], p.relu);
      store_global(chunk_of(p.y, rows, row, at.column), pack<T>(x), row < at.end);
    }
  }
  if (block_index() != 0 || rows.rest == 0) return;
  const bool here = thread_index() < rows.rest;
  const long long number = rows.behind(thread_index());
  const int c = rows.channel_behind(thread_index());
  const float x = load_number<T>(p.x, number, here);
  const float x_scale = load_global<float>(p.affine + c, here);
  const float x_shift = load_global<float>(p.affine + rows.channels + c, here);
  float r = 0.0f, scale_r = 0.0f, shift_r = 0.0f;
  if constexpr (kReads) r = load_number<T>(p.residual, number, here);
  if constexpr (kMaps) {
    scale_r = load_global<float>(p.residual_affine + c, here);
    shift_r = load_global<float>(p.residual_affine + rows.channels + c, here);
  }
  store_number<T>(p.y, number, mapped<V::kResidual>(x, x_scale, x_shift, r, scale_r, shift_r, p.relu), here);
}

template <typename V>
Status launch_fwd_of(const BnActFwdParams& p, const Device& device) {
  return RF_LAUNCH(bn_act_fwd_kernel<V>, (Grid{p.rows.blocks(), kThreads, 0}), device, p);
}

template <typename T>
Status launch_fwd(const BnActFwdParams& p, const Device& device) {
  if (p.residual == nullptr) return launch_fwd_of<Fwd<T, Residual::kNone>>(p, device);
  return p.residual_affine == nullptr ? launch_fwd_of<Fwd<T, Residual::kTensor>>(p, device)
                                      : launch_fwd_of<Fwd<T, Residual::kProjection>>(p, device);
}

template <typename T>
Status launch_stats(const BnActStatsParams& p, const Device& device) {
  const Grid grid{p.rows.blocks(), kThreads, kFoldBytes<2 * kChunk<T> + 1>};
  return RF_LAUNCH(bn_act_stats_kernel<T>, grid, device, p);
}

template <typename T>
Status launch_stats_merge(const BnActStatsMergeParams& p, const Device& device) {
  const Grid grid{(p.rows.channels + kMergeChannels - 1) / kMergeChannels, kThreads, kFoldBytes<3>};
  return RF_LAUNCH(bn_act_stats_merge_kernel<T>, grid, device, p);
}

}  // namespace

Status launch_bn_act_stats(const BnActStatsParams& p, const Device& device) {
  if (p.dtype == Dtype::kFloat32) return launch_stats<Float32>(p, device);
  return p.dtype == Dtype::kHalf ? launch_stats<Half>(p, device) : launch_stats<Bfloat16>(p, device);
}

Status launch_bn_act_stats_merge(const BnActStatsMergeParams& p, const Device& device) {
  if (p.dtype == Dtype::kFloat32) return launch_stats_merge<Float32>(p, device);
  return p.dtype == Dtype::kHalf ? launch_stats_merge<Half>(p, device) : launch_stats_merge<Bfloat16>(p, device);
}

Status launch_bn_act_fwd(const BnActFwdParams& p, const Device& device) {
  if (p.dtype == Dtype::kFloat32) return launch_fwd<Float32>(p, device);
  return p.dtype == Dtype::kHalf ? launch_fwd<Half>(p, device) : launch_fwd<Bfloat16>(p, device);
}

}  // namespace resnet_fast
