// stem_fwd(x, weights, bias) -> y: see kernels/stem_fwd.cu.

#include "engine.h"

namespace resnet_fast::ops {
namespace {

Tensor stem_fwd(const Tensor& x, const Tensor& weights, const Tensor& bias) {
  const Call call("stem_fwd", x);
  StemParams p{};
  p.bfloat16 = call.is_bfloat16(x);
  call.expect_nhwc(x, "x");
  call.expect(x.size(1) == 3, "images of 3 channels", "use another backend", Shape{x});
  call.expect(x.size(2) > 0 && x.size(3) > 0, "images with pixels", "use larger ones", Shape{x});
  // Numbers of a row, and tiles of the batch, are counted in 32 bits.
  constexpr int64_t kLimit = int64_t{1} << 29;
  call.expect(x.size(0) < kLimit && x.size(2) < kLimit && x.size(3) < kLimit, "sizes below 2^29", "split the batch",
              Shape{x});
  p.n = static_cast<int>(x.size(0)), p.h = static_cast<int>(x.size(2)), p.w = static_cast<int>(x.size(3));
  const int64_t tiles = static_cast<int64_t>(p.tiles_h()) * p.tiles_w();
  call.expect(tiles < kLimit && tiles * p.n < kLimit, "fewer than 2^29 tiles", "split the batch", Shape{x});
  call.expect_dense(weights, "weights", x.scalar_type(), {kStemHalves, kStemUnits, 32, 8});
  call.expect_dense(bias, "bias", ScalarType::Float, {kStemChannels});
  Tensor y = empty_nhwc(x, p.n, kStemChannels, p.hp(), p.wp());
  if (y.numel() == 0) return y;
  p.x = x.const_data_ptr();
  p.weights = weights.const_data_ptr();
  p.bias = static_cast<const float*>(bias.const_data_ptr());
  p.y = y.mutable_data_ptr();
  call.check(call.kernels().stem_fwd(p, call.device()), Shape{x});
  return y;
}

}  // namespace
}  // namespace resnet_fast::ops

STABLE_TORCH_LIBRARY_IMPL(resnet_fast_native, CUDA, m) {
  m.impl("stem_fwd", TORCH_BOX(&resnet_fast::ops::stem_fwd));
}
STABLE_TORCH_LIBRARY_IMPL(resnet_fast_native, CPU, m) {
  m.impl("stem_fwd", TORCH_BOX(&resnet_fast::ops::stem_fwd));
}
