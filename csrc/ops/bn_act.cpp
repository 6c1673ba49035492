// BatchNorm + add + ReLU of a training step: see kernels/bn_act.cu and kernels/bn_act_bwd.cu.
//
//   bn_act_stats(x, gamma, beta, eps) -> vectors (6, C)                          rows: NormRow in kernels/…/bn_act.h
//   bn_act_fwd(x, affine, residual, residual_affine, relu) -> y                  affine (2, C): scale and shift
//   bn_act_bwd_sums(dy, y, x, vectors, residual, residual_vectors, relu, batch) -> gradients (1 or 2, 5, C): GradRow
//   bn_act_bwd(dy, y, x, vectors, gradients, residual, relu, wants_dx, wants_dresidual) -> (dx, dresidual)
//
// The first two rows of `vectors` are an affine map. `y` may be left out where nothing was added before the ReLU. The
// residual of the last two is a projection's raw output; a plain residual is not read. What is not wanted has no
// elements. Without rows the sums are 0, and so are all vectors.

#include <tuple>

#include "engine.h"

namespace resnet_fast::ops {
namespace {

using Maybe = std::optional<Tensor>;

Dtype dtype_of(const Call& call, const Tensor& x) {
  if (x.scalar_type() == ScalarType::Float) return Dtype::kFloat32;
  call.expect(x.scalar_type() == ScalarType::Half || x.scalar_type() == ScalarType::BFloat16,
              "float32, float16 or bfloat16", "convert the model", shape_text(x));
  return x.scalar_type() == ScalarType::Half ? Dtype::kHalf : Dtype::kBfloat16;
}

// The tensor that decides shape and dtype. No plan for one without elements.
Rows checked(const Call& call, const Tensor& x, const char* what, Dtype dtype, int blocks, int least) {
  call.expect_nhwc(x, what);
  const int64_t c = x.size(1), m = x.size(0) * x.size(2) * x.size(3);
  call.expect(m < (int64_t{1} << 30) && c < (1 << 24), "fewer than 2^30 pixels and 2^24 channels", "split the batch",
              shape_text(x));
  return m * c == 0 ? Rows{} : rows_of(m, static_cast<int>(c), dtype, blocks, least);
}

const void* like(const Call& call, const Tensor& t, const char* what, const Tensor& x) {
  call.expect_nhwc(t, what);
  bool same = t.scalar_type() == x.scalar_type();
  for (int i = 0; i < 4; ++i) same = same && t.size(i) == x.size(i);
  call.expect(same, (std::string(what) + " of shape and dtype " + shape_text(x)).c_str(), "pass tensors of one problem",
              shape_text(t));
  return t.const_data_ptr();
}

const void* like(const Call& call, const Maybe& t, const char* what, const Tensor& x) {
  return t ? like(call, *t, what, x) : nullptr;
}

const float* vector(const Call& call, const Tensor& t, const char* what, std::initializer_list<int64_t> sizes) {
  call.expect_dense(t, what, ScalarType::Float, sizes);
  return static_cast<const float*>(t.const_data_ptr());
}

const float* vector(const Call& call, const Maybe& t, const char* what, std::initializer_list<int64_t> sizes) {
  return t ? vector(call, *t, what, sizes) : nullptr;
}

Tensor floats(const Tensor& x, std::initializer_list<int64_t> sizes, bool zeros = false) {
  const torch::headeronly::IntHeaderOnlyArrayRef shape(sizes.begin(), sizes.size());
  return zeros ? torch::stable::new_zeros(x, shape, ScalarType::Float)
               : torch::stable::new_empty(x, shape, ScalarType::Float);
}

float* floats_of(Tensor& t) {
  return static_cast<float*>(t.mutable_data_ptr());
}

Tensor like_x(const Tensor& x) {
  return empty_nhwc(x, x.size(0), x.size(1), x.size(2), x.size(3));
}

Tensor bn_act_stats(const Tensor& x, const Maybe& gamma, const Maybe& beta, double eps) {
  const Call call("bn_act_stats", x);
  BnActStatsMergeParams p{};
  p.dtype = dtype_of(call, x);
  p.rows = checked(call, x, "x", p.dtype, kSumBlocks, kSumLeast);
  const int64_t c = x.size(1);
  p.gamma = vector(call, gamma, "gamma", {c});
  p.beta = vector(call, beta, "beta", {c});
  Tensor vectors = floats(x, {kNormRows, c}, x.numel() == 0);
  if (x.numel() == 0) return vectors;
  Tensor partials = floats(x, {2, p.rows.splits, p.rows.wide()});
  p.x = x.const_data_ptr();
  p.partials = floats_of(partials);
  p.eps = static_cast<float>(eps);
  p.vectors = floats_of(vectors);
  call.check(call.kernels().bn_act_stats({p.rows, p.dtype, p.x, floats_of(partials)}, call.device()), shape_text(x));
  call.check(call.kernels().bn_act_stats_merge(p, call.device()), shape_text(x));
  return vectors;
}

Tensor bn_act_fwd(const Tensor& x, const Tensor& affine, const Maybe& residual, const Maybe& residual_affine,
                  bool relu) {
  const Call call("bn_act_fwd", x);
  BnActFwdParams p{};
  p.dtype = dtype_of(call, x);
  p.rows = checked(call, x, "x", p.dtype, kMapBlocks, kMapLeast);
  const int64_t c = x.size(1);
  p.affine = vector(call, affine, "affine", {2, c});
  p.residual = like(call, residual, "residual", x);
  p.residual_affine = vector(call, residual_affine, "residual_affine", {2, c});
  call.expect(residual.has_value() || !residual_affine.has_value(), "a residual with residual_affine", "pass both",
              "the map alone");
  Tensor y = like_x(x);
  if (x.numel() == 0) return y;
  p.x = x.const_data_ptr();
  p.y = y.mutable_data_ptr();
  p.relu = relu;
  call.check(call.kernels().bn_act_fwd(p, call.device()), shape_text(x));
  return y;
}

Tensor bn_act_bwd_sums(const Tensor& dy, const Maybe& y, const Tensor& x, const Tensor& vectors, const Maybe& residual,
                       const Maybe& residual_vectors, bool relu, bool batch) {
  const Call call("bn_act_bwd_sums", x);
  BnActBwdMergeParams merge{};
  BnActBwdSumsParams& p = merge.of;
  p.dtype = dtype_of(call, x);
  p.rows = checked(call, x, "x", p.dtype, kSumBlocks, kSumLeast);
  const int64_t c = x.size(1);
  p.dy = like(call, dy, "dy", x);
  p.y = like(call, y, "y", x);
  p.vectors = vector(call, vectors, "vectors", {kNormRows, c});
  p.residual = like(call, residual, "residual", x);
  p.residual_vectors = vector(call, residual_vectors, "residual_vectors", {kNormRows, c});
  call.expect(residual.has_value() == residual_vectors.has_value(), "a projection's residual and its vectors",
              "pass both or none", "one of them");
  call.expect(!relu || y.has_value() || !residual.has_value(), "y where a residual was added before the ReLU",
              "pass the forward's output", "none");
  Tensor gradients = floats(x, {residual.has_value() ? 2 : 1, kGradRows, c}, x.numel() == 0);
  if (x.numel() == 0) return gradients;
  Tensor partials = floats(x, {p.sums(), p.rows.splits, p.rows.wide()});
  p.x = x.const_data_ptr();
  p.relu = relu;
  p.partials = floats_of(partials);
  merge.batch = batch;
  merge.gradients = floats_of(gradients);
  call.check(call.kernels().bn_act_bwd_sums(p, call.device()), shape_text(x));
  call.check(call.kernels().bn_act_bwd_merge(merge, call.device()), shape_text(x));
  return gradients;
}

std::tuple<Tensor, Tensor> bn_act_bwd(const Tensor& dy, const Maybe& y, const Maybe& x, const Maybe& vectors,
                                      const Tensor& gradients, const Maybe& residual, bool relu, bool wants_dx,
                                      bool wants_dresidual) {
  const Call call("bn_act_bwd", dy);
  BnActBwdParams p{};
  p.dtype = dtype_of(call, dy);
  p.rows = checked(call, dy, "dy", p.dtype, kMapBlocks, kMapLeast);
  const int64_t c = dy.size(1);
  p.y = like(call, y, "y", dy);
  p.x = like(call, x, "x", dy);
  p.vectors = vector(call, vectors, "vectors", {kNormRows, c});
  p.gradients = vector(call, gradients, "gradients", {residual.has_value() ? 2 : 1, kGradRows, c});
  p.residual = like(call, residual, "residual", dy);
  call.expect(!relu || y.has_value() || (x.has_value() && vectors.has_value() && !residual.has_value()),
              "y, or x and vectors where nothing was added before the ReLU", "pass what tells where it let pass",
              "neither");
  call.expect(wants_dx || wants_dresidual, "a gradient that is wanted", "do not call it", "none");
  Tensor dx = wants_dx ? like_x(dy) : empty_nhwc(dy, 0, c, 1, 1);
  Tensor dresidual = wants_dresidual ? like_x(dy) : empty_nhwc(dy, 0, c, 1, 1);
  if (dy.numel() == 0) return {dx, dresidual};
  p.dy = dy.const_data_ptr();
  p.relu = relu;
  p.dx = wants_dx ? dx.mutable_data_ptr() : nullptr;
  p.dresidual = wants_dresidual ? dresidual.mutable_data_ptr() : nullptr;
  call.check(call.kernels().bn_act_bwd(p, call.device()), shape_text(dy));
  return {dx, dresidual};
}

}  // namespace
}  // namespace resnet_fast::ops

STABLE_TORCH_LIBRARY_IMPL(resnet_fast_native, CUDA, m) {
  m.impl("bn_act_stats", TORCH_BOX(&resnet_fast::ops::bn_act_stats));
  m.impl("bn_act_fwd", TORCH_BOX(&resnet_fast::ops::bn_act_fwd));
  m.impl("bn_act_bwd_sums", TORCH_BOX(&resnet_fast::ops::bn_act_bwd_sums));
  m.impl("bn_act_bwd", TORCH_BOX(&resnet_fast::ops::bn_act_bwd));
}
STABLE_TORCH_LIBRARY_IMPL(resnet_fast_native, CPU, m) {
  m.impl("bn_act_stats", TORCH_BOX(&resnet_fast::ops::bn_act_stats));
  m.impl("bn_act_fwd", TORCH_BOX(&resnet_fast::ops::bn_act_fwd));
  m.impl("bn_act_bwd_sums", TORCH_BOX(&resnet_fast::ops::bn_act_bwd_sums));
  m.impl("bn_act_bwd", TORCH_BOX(&resnet_fast::ops::bn_act_bwd));
}
