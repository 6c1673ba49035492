// The gradient of bn_act.cu: two launches for the sums over a channel, one for the map.
//
//   g[m, c] = dy where the ReLU let pass, else 0                          xhat = (x - mean) * invstd
//   s1[c] = sum_m g          s2[c] = sum_m g * xhat                       dgamma = s2         dbeta = s1
//   dx = A*g + B*x + C       A = scale    B = -A * invstd * s2 / M        C = A * (invstd * s2 * mean - s1) / M
//
// and, of a projection whose raw output r was added with its own norm, s2 of r (its s1 is the same) and dr = A_r*g +
// B_r*r + C_r; a plain residual's gradient is g. On constant statistics B = C = 0. (Ioffe and Szegedy 2015, section 3.)
//
// Saved bytes, in passes over a tensor of the size of x. Stock PyTorch: 3 for the ReLU's gradient, 2 for the sums and 3
// for dx, and for a projection's norm 5 more. Here the gradient of the ReLU is taken on the way:
//
//                              stock    sums                 map                          here
//      norm + ReLU               8      dy  x                dy  x    -> dx                 5
//      + residual                8      dy  y  x             dy  y  x -> dx dr              8
//      + projection             13      dy  y  x  r          dy  y  x  r -> dx dr          10
//
// The first row reads no y: nothing was added between the norm and the ReLU, so y > 0 can be told from x by the same
// fma and the same rounding as in the forward, bit for bit.
//
// Mapping: rows.h, as in bn_act.cu. Chunks down a column, per channel sums in registers, a tree over the block:
//
//        [ dy ] [ y ] [ x ] [ r ]   ->  g   sum g   sum g * (x - mean)   sum g * (r - mean_r)
//        [ dy ] [ y ] [ x ] [ r ]           + in registers, row by row
//                                           = over the slots, as a tree -> partials[0 | 1 | 2, split, channel]
//
//   merge: 8 channels x 32 slots of a block add up the walks, and write dgamma, dbeta, A, B and C.
//
// In flight: 4 chunks of each of two tensors per thread, or 2 of each of three or four; two blocks and more on an SM
// make 48 to 96 KB, of 16 that an H100 needs (bn_act.cu). The partial sums are 8 or 12 bytes per walk and channel.
//
// Numerics. fp32, sums in an order that only the shape decides. Sums of g * (x - mean), never of g * x: nothing cancels
// when |mean| >> std. invstd is multiplied to the finished sum. The ReLU lets pass what is not <= 0, NaN too, as ATen.
// The map is two fmas, rounded once.
//
// Limits as in bn_act.cu. Alone: python -m pytest tests/emulator -k bn_act.
//
// Not taken: to write g in the first pass, which would save reading y again (7 passes, not 8, with a residual) where a
// residual's gradient is wanted, but costs one pass more where it is not; the map can tell what is wanted, the sums
// come before. One pass over a group of channels kept on chip: see bn_act.cu.

#include <resnet_fast/bn_act.h>
#include <resnet_fast/chunks.h>

namespace resnet_fast {
namespace {

constexpr int kThreads = kRowsThreads;
constexpr int kMergeChannels = 8, kMergeSlots = kThreads / kMergeChannels, kMergeUnroll = 4;

// Who says where the ReLU let pass: nobody (there was none), its output, or its input, computed anew from x.
enum class Mask { kNone, kOutput, kInput };

template <typename T_, Mask kMask_, bool kProjection_>
struct Variant {
  using T = T_;
  static constexpr Mask kMask = kMask_;
  static constexpr bool kProjection = kProjection_;
  static constexpr int kN = kChunk<T>;
  static constexpr int kTensors = 2 + (kMask == Mask::kOutput) + kProjection;
  static constexpr int kUnroll = kTensors == 2 ? 4 : 2;
  static constexpr int kSums = kProjection ? 3 : 2;
};

template <typename V>
RF_DEVICE float masked(float dy, float y, float x, float scale, float shift) {
  if constexpr (V::kMask == Mask::kNone) return dy;
  if constexpr (V::kMask == Mask::kInput) y = rounded<typename V::T>(multiply_add(x, scale, shift));
  return y <= 0.0f ? 0.0f : dy;
}

template <typename V>
RF_KERNEL(kThreads)
bn_act_bwd_sums_kernel(const BnActBwdSumsParams p) {
  using T = typename V::T;
  constexpr int kN = V::kN, kUnroll = V::kUnroll;
  const Rows& rows = p.rows;
  const Place at = place_of(rows);
  const auto row_of = [&](const float* vectors, int row) { return vectors + static_cast<size_t>(row) * rows.channels; };
  float mean[kN], mean_r[kN] = {}, scale[kN] = {}, shift[kN] = {};
  load_channels(mean, row_of(p.vectors, NormRow::kMean), rows, at.column, at.has_column);
  if constexpr (V::kMask == Mask::kInput) {
    load_channels(scale, row_of(p.vectors, NormRow::kScale), rows, at.column, at.has_column);
    load_channels(shift, row_of(p.vectors, NormRow::kShift), rows, at.column, at.has_column);
  }
  if constexpr (V::kProjection)
    load_channels(mean_r, row_of(p.residual_vectors, NormRow::kMean), rows, at.column, at.has_column);
  float sums[V::kSums * kN] = {};
  for (int base = at.row, step = 0; step < rows.walk; step += kUnroll * rows.tall, base += kUnroll * rows.tall) {
    Vec16 raw_dy[kUnroll], raw_y[kUnroll] = {}, raw_x[kUnroll], raw_r[kUnroll] = {};
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int row = base + u * rows.tall;
      const bool inside = row < at.end;
      raw_dy[u] = load_global<Vec16>(chunk_of(p.dy, rows, row, at.column), inside);
      raw_x[u] = load_global<Vec16>(chunk_of(p.x, rows, row, at.column), inside);
      if constexpr (V::kMask == Mask::kOutput)
        raw_y[u] = load_global<Vec16>(chunk_of(p.y, rows, row, at.column), inside);
      if constexpr (V::kProjection) raw_r[u] = load_global<Vec16>(chunk_of(p.residual, rows, row, at.column), inside);
    }
    // Outside dy is 0, and with it all that is added.
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      float dy[kN], y[kN], x[kN], r[kN];
      unpack<T>(raw_dy[u], dy);
      unpack<T>(raw_x[u], x);
      unpack<T>(raw_y[u], y);
      unpack<T>(raw_r[u], r);
#pragma unroll
      for (int i = 0; i < kN; ++i) {
        const float g = masked<V>(dy[i], y[i], x[i], scale[i], shift[i]);
        sums[i] += g;
        sums[kN + i] = multiply_add(g, x[i] - mean[i], sums[kN + i]);
        if constexpr (V::kProjection) sums[2 * kN + i] = multiply_add(g, r[i] - mean_r[i], sums[2 * kN + i]);
      }
    }
  }
  constexpr int kFloats = V::kSums * kN;
  fold_slots(sums, rows.width, rows.tall, [](float (&mine)[kFloats], const float (&other)[kFloats]) {
#pragma unroll
    for (int i = 0; i < kFloats; ++i) mine[i] += other[i];
  });
  float* to = p.partials + static_cast<size_t>(at.split) * rows.wide() + at.column * kN;
#pragma unroll
  for (int s = 0; s < V::kSums; ++s)
    store_floats<kN>(to + static_cast<size_t>(s) * rows.splits * rows.wide(), sums + s * kN,
                     at.slot == 0 && at.has_column);
}

template <typename V>
RF_KERNEL(kThreads)
bn_act_bwd_merge_kernel(const BnActBwdMergeParams params) {
  using T = typename V::T;
  constexpr int kSums = V::kSums;
  const BnActBwdSumsParams& p = params.of;
  const Rows& rows = p.rows;
  const int c = block_index() * kMergeChannels + thread_index() % kMergeChannels,
            slot = thread_index() / kMergeChannels;
  const int members = rows.splits * rows.copies;  // partials of a channel
  const size_t plane = static_cast<size_t>(rows.splits) * rows.wide();
  float sums[kSums] = {};
  for (int first = 0; first < members; first += kMergeUnroll * kMergeSlots) {
    float part[kMergeUnroll][kSums];
#pragma unroll
    for (int u = 0; u < kMergeUnroll; ++u) {
      const int member = first + u * kMergeSlots + slot;
      const size_t from = static_cast<size_t>(member / rows.copies) * rows.wide() +
                          static_cast<size_t>(member % rows.copies) * rows.channels + c;
#pragma unroll
      for (int s = 0; s < kSums; ++s)
        part[u][s] = load_global<float>(p.partials + s * plane + from, member < members && c < rows.channels);
    }
#pragma unroll
    for (int u = 0; u < kMergeUnroll; ++u)
#pragma unroll
      for (int s = 0; s < kSums; ++s) sums[s] += part[u][s];
  }
  fold_slots(sums, kMergeChannels, kMergeSlots, [](float (&mine)[kSums], const float (&other)[kSums]) {
#pragma unroll
    for (int s = 0; s < kSums; ++s) mine[s] += other[s];
  });
  const bool mine = slot == 0 && c < rows.channels;
  const auto of_norm = [&](const float* vectors, int row) {
    return load_global<float>(vectors + static_cast<size_t>(row) * rows.channels + c, mine);
  };
  const float mean = of_norm(p.vectors, NormRow::kMean), invstd = of_norm(p.vectors, NormRow::kInvstd);
  const float scale = of_norm(p.vectors, NormRow::kScale), shift = of_norm(p.vectors, NormRow::kShift);
  float mean_r = 0.0f;
  if constexpr (V::kProjection) mean_r = of_norm(p.residual_vectors, NormRow::kMean);
  for (int i = 0; i < rows.rest; ++i) {
    const long long number = rows.behind(i);
    const bool here = mine && rows.channel_behind(i) == c;
    const float dy = load_number<T>(p.dy, number, here), x = load_number<T>(p.x, number, here);
    float y = 0.0f;
    if constexpr (V::kMask == Mask::kOutput) y = load_number<T>(p.y, number, here);
    const float g = masked<V>(dy, y, x, scale, shift);
    sums[0] += g;
    sums[1] = multiply_add(g, x - mean, sums[1]);
    if constexpr (V::kProjection) {
      const float r = load_number<T>(p.residual, number, here);
      sums[2] = multiply_add(g, r - mean_r, sums[2]);
    }
  }
  const float share = params.batch ? static_cast<float>(rows.channels) / static_cast<float>(rows.numbers) : 0.0f;
  const auto store = [&](int branch, float branch_mean, float branch_invstd, float a) {
    const float dgamma = branch_invstd * sums[1 + branch];
    const float slope = branch_invstd * dgamma * share;
    const auto put = [&](int row, float value) {
      store_global(params.gradients + static_cast<size_t>(branch * kGradRows + row) * rows.channels + c, value, mine);
    };
    put(GradRow::kDgamma, dgamma);
    put(GradRow::kDbeta, sums[0]);
    put(GradRow::kA, a);
    put(GradRow::kB, -a * slope);
    put(GradRow::kC, a * multiply_add(slope, branch_mean, -sums[0] * share));
  };
  store(0, mean, invstd, scale);
  if constexpr (V::kProjection)
    store(1, mean_r, of_norm(p.residual_vectors, NormRow::kInvstd), of_norm(p.residual_vectors, NormRow::kScale));
}

template <typename V>
RF_KERNEL(kThreads)
bn_act_bwd_kernel(const BnActBwdParams p) {
  using T = typename V::T;
  constexpr int kN = V::kN, kUnroll = V::kUnroll;
  const Rows& rows = p.rows;
  const Place at = place_of(rows);
  const bool reads_x = p.x != nullptr, writes_dx = p.dx != nullptr, writes_dr = p.dresidual != nullptr;
  const auto row_of = [&](const float* from, int row) { return from + static_cast<size_t>(row) * rows.channels; };
  float a[kN], b[kN], k[kN], scale[kN] = {}, shift[kN] = {}, a_r[kN] = {}, b_r[kN] = {}, k_r[kN] = {};
  const auto load = [&](float (&to)[kN], const float* from) {
    load_channels(to, from, rows, at.column, at.has_column);
  };
  load(a, row_of(p.gradients, GradRow::kA));
  load(b, row_of(p.gradients, GradRow::kB));
  load(k, row_of(p.gradients, GradRow::kC));
  if constexpr (V::kMask == Mask::kInput) {
    load(scale, row_of(p.vectors, NormRow::kScale));
    load(shift, row_of(p.vectors, NormRow::kShift));
  }
  if constexpr (V::kProjection) {
    load(a_r, row_of(p.gradients, kGradRows + GradRow::kA));
    load(b_r, row_of(p.gradients, kGradRows + GradRow::kB));
    load(k_r, row_of(p.gradients, kGradRows + GradRow::kC));
  }
  for (int base = at.row, step = 0; step < rows.walk; step += kUnroll * rows.tall, base += kUnroll * rows.tall) {
    Vec16 raw_dy[kUnroll], raw_y[kUnroll] = {}, raw_x[kUnroll], raw_r[kUnroll] = {};
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int row = base + u * rows.tall;
      const bool inside = row < at.end;
      raw_dy[u] = load_global<Vec16>(chunk_of(p.dy, rows, row, at.column), inside);
      raw_x[u] = load_global<Vec16>(chunk_of(p.x, rows, row, at.column), inside && reads_x);
      if constexpr (V::kMask == Mask::kOutput)
        raw_y[u] = load_global<Vec16>(chunk_of(p.y, rows, row, at.column), inside);
      if constexpr (V::kProjection) raw_r[u] = load_global<Vec16>(chunk_of(p.residual, rows, row, at.column), inside);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int row = base + u * rows.tall;
      const bool inside = row < at.end;
      float g[kN], y[kN], x[kN], r[kN];
      unpack<T>(raw_dy[u], g);
      unpack<T>(raw_x[u], x);
      unpack<T>(raw_y[u], y);
      unpack<T>(raw_r[u], r);
#pragma unroll
      for (int i = 0; i < kN; ++i) {
        g[i] = masked<V>(g[i], y[i], x[i], scale[i], shift[i]);
        x[i] = multiply_add(a[i], g[i], multiply_add(b[i], x[i], k[i]));
        if constexpr (V::kProjection) g[i] = multiply_add(a_r[i], g[i], multiply_add(b_r[i], r[i], k_r[i]));
      }
      store_global(chunk_of(p.dx, rows, row, at.column), pack<T>(x), inside && writes_dx);
      store_global(chunk_of(p.dresidual, rows, row, at.column), pack<T>(g), inside && writes_dr);
    }
  }
  if (block_index() != 0 || rows.rest == 0) return;
  const bool here = thread_index() < rows.rest;
  const long long number = rows.behind(thread_index());
  const int c = rows.channel_behind(thread_index());
  const auto of = [&](const float* from, int row) { return load_global<float>(row_of(from, row) + c, here); };
  const float dy = load_number<T>(p.dy, number, here), x = load_number<T>(p.x, number, here && reads_x);
  float y = 0.0f, x_scale = 0.0f, x_shift = 0.0f;
  if constexpr (V::kMask == Mask::kOutput) y = load_number<T>(p.y, number, here);
  if constexpr (V::kMask == Mask::kInput)
    x_scale = of(p.vectors, NormRow::kScale), x_shift = of(p.vectors, NormRow::kShift);
  float g = masked<V>(dy, y, x, x_scale, x_shift);
  const auto mapped = [&](int branch, float value) {
    const int first = branch * kGradRows;
    const float slope = of(p.gradients, first + GradRow::kB), constant = of(p.gradients, first + GradRow::kC);
    return multiply_add(of(p.gradients, first + GradRow::kA), g, multiply_add(slope, value, constant));
  };
  store_number<T>(p.dx, number, mapped(0, x), here && writes_dx);
  if constexpr (V::kProjection) g = mapped(1, load_number<T>(p.residual, number, here));
  store_number<T>(p.dresidual, number, g, here && writes_dr);
}

struct Sums {
  using Params = BnActBwdSumsParams;
  template <typename V>
  static Status launch(const Params& p, const Device& device) {
    const Grid grid{p.rows.blocks(), kThreads, kFoldBytes<V::kSums * V::kN>};
    return RF_LAUNCH(bn_act_bwd_sums_kernel<V>, grid, device, p);
  }
};

struct Merge {
  using Params = BnActBwdMergeParams;
  template <typename V>
  static Status launch(const Params& p, const Device& device) {
    const Grid grid{(p.of.rows.channels + kMergeChannels - 1) / kMergeChannels, kThreads, kFoldBytes<V::kSums>};
    return RF_LAUNCH(bn_act_bwd_merge_kernel<V>, grid, device, p);
  }
};

struct Map {
  using Params = BnActBwdParams;
  template <typename V>
  static Status launch(const Params& p, const Device& device) {
    const Grid grid{p.rows.blocks(), kThreads, 0};
    return RF_LAUNCH(bn_act_bwd_kernel<V>, grid, device, p);
  }
};

template <typename Kernel, typename T>
Status launch_as(Mask mask, bool projection, const typename Kernel::Params& p, const Device& device) {
  if (projection)
    return mask == Mask::kNone ? Kernel::template launch<Variant<T, Mask::kNone, true>>(p, device)
                               : Kernel::template launch<Variant<T, Mask::kOutput, true>>(p, device);
  if (mask == Mask::kNone) return Kernel::template launch<Variant<T, Mask::kNone, false>>(p, device);
  return mask == Mask::kOutput ? Kernel::template launch<Variant<T, Mask::kOutput, false>>(p, device)
                               : Kernel::template launch<Variant<T, Mask::kInput, false>>(p, device);
}

template <typename Kernel, typename Call>
Status launch(const Call& call, const typename Kernel::Params& p, const Device& device) {
  const Mask mask = !call.relu ? Mask::kNone : call.y != nullptr ? Mask::kOutput : Mask::kInput;
  const bool projection = call.residual != nullptr;
  if (call.dtype == Dtype::kFloat32) return launch_as<Kernel, Float32>(mask, projection, p, device);
  return call.dtype == Dtype::kHalf ? launch_as<Kernel, Half>(mask, projection, p, device)
                                    : launch_as<Kernel, Bfloat16>(mask, projection, p, device);
}

}  // namespace

Status launch_bn_act_bwd_sums(const BnActBwdSumsParams& p, const Device& device) {
  return launch<Sums>(p, p, device);
}

Status launch_bn_act_bwd_merge(const BnActBwdMergeParams& p, const Device& device) {
  return launch<Merge>(p.of, p, device);
}

Status launch_bn_act_bwd(const BnActBwdParams& p, const Device& device) {
  return launch<Map>(p, p, device);
}

}  // namespace resnet_fast
