// Checks that the ops of single convolutions share.
#pragma once

#include "engine.h"

namespace resnet_fast::ops {

// Checks x, residual and bias of a convolution with output size (ho, wo), puts them into its params, and returns y. The
// params already have co. Blocks and rows of the GEMM, up to the end of the last tile, and chunks of 8 values are
// counted in 32 bits.
template <typename Params>
Tensor convolution_operands(const Call& call, Params& p, const Tensor& x, const Tensor& bias,
                            const std::optional<Tensor>& residual, int64_t ho, int64_t wo) {
  constexpr int64_t kLimit = (int64_t{1} << 31) - 1024;
  call.expect(p.ci % 8 == 0 && p.ci > 0 && p.co % 8 == 0 && p.co > 0,
              "input and output channels that are multiples of 8", "use another backend", p.ci, " and ", p.co);
  call.expect_dense(bias, "bias", ScalarType::Float, {p.co});
  call.expect(static_cast<int64_t>(p.n) * ho * wo * ((p.co + 63) / 64) < kLimit, "fewer than 2^31 output pixels",
              "split the batch", static_cast<int64_t>(p.n) * ho * wo);
  call.expect(x.numel() / 8 < kLimit && static_cast<int64_t>(p.co) * p.ci / 8 < kLimit,
              "tensors of fewer than 2^34 values", "split the batch", Shape{x});
  if (residual) {
    call.expect(residual->scalar_type() == x.scalar_type(), "residual in the dtype of x", "convert it",
                Shape{*residual});
    call.expect_nhwc(*residual, "residual");
    call.expect(
        residual->size(0) == p.n && residual->size(1) == p.co && residual->size(2) == ho && residual->size(3) == wo,
        "residual of the output's shape", "add it outside of the op", Shape{*residual});
    p.residual = residual->const_data_ptr();
  }
  Tensor y = empty_nhwc(x, p.n, p.co, ho, wo);
  p.x = x.const_data_ptr();
  p.bias = static_cast<const float*>(bias.const_data_ptr());
  p.y = y.mutable_data_ptr();
  return y;
}

// Checks x and puts its sizes into the params.
template <typename Params>
void convolution_input(const Call& call, Params& p, const Tensor& x) {
  p.bfloat16 = call.is_bfloat16(x);
  call.expect_nhwc(x, "x");
  call.expect(x.size(2) > 0 && x.size(3) > 0, "images with pixels", "use larger ones", Shape{x});
  p.n = static_cast<int>(x.size(0)), p.ci = static_cast<int>(x.size(1));
  p.h = static_cast<int>(x.size(2)), p.w = static_cast<int>(x.size(3));
}

}  // namespace resnet_fast::ops
