// bottleneck_fwd(x, weights, bias1, bias2, bias3, projection) -> y: see kernels/bottleneck_fwd.cu.

#include "engine.h"

namespace resnet_fast::ops {
namespace {

Tensor bottleneck_fwd(const Tensor& x, const Tensor& weights, const Tensor& bias1, const Tensor& bias2,
                      const Tensor& bias3, bool projection) {
  const Call call("bottleneck_fwd", x);
  BottleneckParams p{};
  p.bfloat16 = call.is_bfloat16(x);
  call.expect_nhwc(x, "x");
  p.n = static_cast<int>(x.size(0)), p.ci = static_cast<int>(x.size(1));
  p.h = static_cast<int>(x.size(2)), p.w = static_cast<int>(x.size(3));
  p.cmid = static_cast<int>(bias1.numel()), p.co = static_cast<int>(bias3.numel());
  p.projection = projection;
  const bool known = (p.cmid == 64 && p.co == 256) || (p.cmid == 128 && (p.co == 256 || p.co == 512));
  call.expect(known, "64 inner and 256 output channels, or 128 inner and 256 or 512 output channels",
              "use a kernel per convolution", p.cmid, " and ", p.co);
  call.expect(p.ci % kBottleneckStep == 0 && p.ci > 0 && (projection || p.ci == p.co),
              "as many input as output channels, or a projection and a multiple of 64", "use a kernel per convolution",
              p.ci);
  call.expect_dense(weights, "weights", x.scalar_type(), {p.steps(), p.cmid, kBottleneckStep});
  call.expect_dense(bias1, "bias1", ScalarType::Float, {p.cmid});
  call.expect_dense(bias2, "bias2", ScalarType::Float, {p.cmid});
  call.expect_dense(bias3, "bias3", ScalarType::Float, {p.co});
  // Tiles are counted in 32 bits, and so are rows within an image.
  const int64_t tiles = static_cast<int64_t>(p.n) * p.tiles_h() * p.tiles_w();
  call.expect(tiles < (int64_t{1} << 31) - 1024, "fewer than 2^31 tiles", "split the batch", tiles);
  Tensor y = empty_nhwc(x, p.n, p.co, p.h, p.w);
  if (y.numel() == 0) return y;
  p.x = x.const_data_ptr();
  p.weights = weights.const_data_ptr();
  p.bias1 = static_cast<const float*>(bias1.const_data_ptr());
  p.bias2 = static_cast<const float*>(bias2.const_data_ptr());
  p.bias3 = static_cast<const float*>(bias3.const_data_ptr());
  p.y = y.mutable_data_ptr();
  call.check(call.kernels().bottleneck_fwd(p, call.device()), Shape{x}, projection ? " with a projection" : "");
  return y;
}

int64_t bottleneck_fwd_shared(int64_t ci, int64_t cmid, int64_t co, bool projection) {
  BottleneckParams p{};
  p.ci = static_cast<int>(ci), p.cmid = static_cast<int>(cmid), p.co = static_cast<int>(co);
  p.projection = projection;
  return any_kernels("bottleneck_fwd_shared").bottleneck_fwd_shared(p);
}

}  // namespace
}  // namespace resnet_fast::ops

STABLE_TORCH_LIBRARY_IMPL(resnet_fast_native, CompositeExplicitAutograd, m) {
  m.impl("bottleneck_fwd_shared", TORCH_BOX(&resnet_fast::ops::bottleneck_fwd_shared));
}
STABLE_TORCH_LIBRARY_IMPL(resnet_fast_native, CUDA, m) {
  m.impl("bottleneck_fwd", TORCH_BOX(&resnet_fast::ops::bottleneck_fwd));
}
STABLE_TORCH_LIBRARY_IMPL(resnet_fast_native, CPU, m) {
  m.impl("bottleneck_fwd", TORCH_BOX(&resnet_fast::ops::bottleneck_fwd));
}
