// What bn_act.cu and bn_act_bwd.cu need to know of a call.
#pragma once

#include <cstddef>

#include <resnet_fast/launch.h>
#include <resnet_fast/rows.h>

namespace resnet_fast {

// Rows of `vectors` (kNormRows, C) fp32. VAR is unbiased, for the running statistics; M2 the sum of squares of
// distances from the mean.
struct NormRow {
  enum : int { kScale, kShift, kMean, kInvstd, kVar, kM2 };
};
constexpr int kNormRows = 6;
// Rows of `gradients` (branches, kGradRows, C) fp32: dx = A*g + B*x + C. Branch 0: x; branch 1: a projection.
struct GradRow {
  enum : int { kDgamma, kDbeta, kA, kB, kC };
};
constexpr int kGradRows = 5;

// How many blocks a pass is cut into at most: those that leave partial sums, and those that only map.
constexpr int kSumBlocks = 1024, kSumLeast = 4;
constexpr int kMapBlocks = 4096, kMapLeast = 1;

// Tensors are NHWC, dense, 16-byte aligned, all of one shape and of `dtype`; vectors fp32. `partials`: (2, splits,
// wide) per walk and channel of the matrix: mean, as a distance from the channel's first number in x, and M2.
struct BnActStatsParams {
  Rows rows;
  Dtype dtype;
  const void* x;
  float* partials;

  template <typename F>
  void tensors(F f) const {
    f("x", x, static_cast<size_t>(rows.numbers) * bytes_of(dtype), Access::kRead);
    f("partials", partials, size_t{2} * rows.splits * rows.wide() * 4, Access::kWrite);
  }
};

// gamma and beta (C) or nullptr, vectors (kNormRows, C).
struct BnActStatsMergeParams {
  Rows rows;
  Dtype dtype;
  const void* x;
  const float* partials;
  const float* gamma;
  const float* beta;
  float eps;
  float* vectors;

  template <typename F>
  void tensors(F f) const {
    const size_t vector = static_cast<size_t>(rows.channels) * 4;
    f("x", x, static_cast<size_t>(rows.numbers) * bytes_of(dtype), Access::kRead);
    f("partials", partials, size_t{2} * rows.splits * rows.wide() * 4, Access::kRead);
    f("gamma", gamma, vector, Access::kRead);
    f("beta", beta, vector, Access::kRead);
    f("vectors", vectors, kNormRows * vector, Access::kWrite);
  }
};

// affine and residual_affine (2, C): scale and shift; residual or both nullptr.
struct BnActFwdParams {
  Rows rows;
  Dtype dtype;
  const void* x;
  const float* affine;
  const void* residual;
  const float* residual_affine;
  void* y;
  bool relu;

  template <typename F>
  void tensors(F f) const {
    const size_t tensor = static_cast<size_t>(rows.numbers) * bytes_of(dtype);
    const size_t vectors = size_t{2} * rows.channels * 4;
    f("x", x, tensor, Access::kRead);
    f("affine", affine, vectors, Access::kRead);
    f("residual", residual, tensor, Access::kRead);
    f("residual_affine", residual_affine, vectors, Access::kRead);
    f("y", y, tensor, Access::kWrite);
  }
};

// g = dy where the ReLU let pass, which `y` says, or, where nothing was added before it, x itself (y nullptr). residual
// and residual_vectors: of a projection, else nullptr. `partials`: (2 or 3, splits, wide).
struct BnActBwdSumsParams {
  Rows rows;
  Dtype dtype;
  const void* dy;
  const void* y;
  const void* x;
  const float* vectors;
  const void* residual;
  const float* residual_vectors;
  bool relu;
  float* partials;

  RF_HOST_DEVICE int sums() const {
    return residual == nullptr ? 2 : 3;
  }

  template <typename F>
  void tensors(F f) const {
    const size_t tensor = static_cast<size_t>(rows.numbers) * bytes_of(dtype);
    const size_t norm = static_cast<size_t>(kNormRows) * rows.channels * 4;
    f("dy", dy, tensor, Access::kRead);
    f("y", y, tensor, Access::kRead);
    f("x", x, tensor, Access::kRead);
    f("vectors", vectors, norm, Access::kRead);
    f("residual", residual, tensor, Access::kRead);
    f("residual_vectors", residual_vectors, norm, Access::kRead);
    f("partials", partials, static_cast<size_t>(sums()) * rows.splits * rows.wide() * 4, Access::kWrite);
  }
};

// `batch`: the statistics are this batch's, and depend on x; else B = C = 0.
struct BnActBwdMergeParams {
  BnActBwdSumsParams of;  // of.partials are read here
  bool batch;
  float* gradients;

  template <typename F>
  void tensors(F f) const {
    of.tensors(
        [&](const char* name, const void* start, size_t bytes, Access) { f(name, start, bytes, Access::kRead); });
    f("gradients", gradients, static_cast<size_t>(of.sums() - 1) * kGradRows * of.rows.channels * 4, Access::kWrite);
  }
};

// x nullptr: B = 0 and the ReLU does not ask for it. dx, dresidual: nullptr where not wanted. residual: of a
// projection.
struct BnActBwdParams {
  Rows rows;
  Dtype dtype;
  const void* dy;
  const void* y;
  const void* x;
  const float* vectors;
  const float* gradients;
  const void* residual;
  bool relu;
  void* dx;
  void* dresidual;

  template <typename F>
  void tensors(F f) const {
    const size_t tensor = static_cast<size_t>(rows.numbers) * bytes_of(dtype);
    const size_t vector = static_cast<size_t>(rows.channels) * 4;
    f("dy", dy, tensor, Access::kRead);
    f("y", y, tensor, Access::kRead);
    f("x", x, tensor, Access::kRead);
    f("vectors", vectors, kNormRows * vector, Access::kRead);
    f("gradients", gradients, (residual == nullptr ? 1 : 2) * kGradRows * vector, Access::kRead);
    f("residual", residual, tensor, Access::kRead);
    f("dx", dx, tensor, Access::kWrite);
    f("dresidual", dresidual, tensor, Access::kWrite);
  }
};

// One launch each, at least one number. The caller has checked shapes; see ops/bn_act.cpp.
Status launch_bn_act_stats(const BnActStatsParams& params, const Device& device);
Status launch_bn_act_stats_merge(const BnActStatsMergeParams& params, const Device& device);
Status launch_bn_act_fwd(const BnActFwdParams& params, const Device& device);
Status launch_bn_act_bwd_sums(const BnActBwdSumsParams& params, const Device& device);
Status launch_bn_act_bwd_merge(const BnActBwdMergeParams& params, const Device& device);
Status launch_bn_act_bwd(const BnActBwdParams& params, const Device& device);

}  // namespace resnet_fast
