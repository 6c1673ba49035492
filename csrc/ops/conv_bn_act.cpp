// conv_bn_act(x, weight, bias, residual, stride_h, ..., dilation_w, relu) -> y: see kernels/conv_bn_act.cu.

#include "conv.h"

namespace resnet_fast::ops {
namespace {

int64_t out_size(int64_t size, int64_t filter, int64_t stride, int64_t pad, int64_t dilation) {
  const int64_t room = size + 2 * pad - dilation * (filter - 1) - 1;
  return room < 0 ? 0 : room / stride + 1;
}

Tensor conv_bn_act(const Tensor& x, const Tensor& weight, const Tensor& bias, std::optional<Tensor> residual,
                   int64_t stride_h, int64_t stride_w, int64_t pad_h, int64_t pad_w, int64_t dilation_h,
                   int64_t dilation_w, bool relu) {
  const Call call("conv_bn_act", x);
  ConvParams p{};
  convolution_input(call, p, x);
  call.expect(weight.dim() == 4, "weight of shape (Co, R, S, Ci)", "pack the parameters for this problem",
              Shape{weight});
  p.co = static_cast<int>(bias.numel());
  p.r = static_cast<int>(weight.size(1)), p.s = static_cast<int>(weight.size(2));
  call.expect_dense(weight, "weight", x.scalar_type(), {p.co, p.r, p.s, p.ci});
  call.expect(p.r > 0 && p.s > 0 && stride_h > 0 && stride_w > 0 && dilation_h > 0 && dilation_w > 0 && pad_h >= 0 &&
                  pad_w >= 0,
              "a filter, strides and dilations of 1 or more, and padding of 0 or more", "change these numbers", p.r,
              "x", p.s, " stride ", stride_h, ", ", stride_w, " padding ", pad_h, ", ", pad_w, " dilation ", dilation_h,
              ", ", dilation_w);
  const int64_t ho = out_size(p.h, p.r, stride_h, pad_h, dilation_h);
  const int64_t wo = out_size(p.w, p.s, stride_w, pad_w, dilation_w);
  call.expect(ho > 0 && wo > 0, "a filter that fits into the padded image", "use larger images", Shape{x});
  // Pixels are counted in 32 bits, including those where windows start outside their images.
  constexpr int64_t kFar = int64_t{1} << 30;
  const int64_t high = p.h + 2 * pad_h, across = p.w + 2 * pad_w;
  const bool near = pad_h < kFar && pad_w < kFar && stride_h < kFar && stride_w < kFar && dilation_h < kFar &&
                    dilation_w < kFar && high < kFar && across < kFar;
  call.expect(near && high * across < kFar / (p.n + 1) && int64_t{p.r} * p.s * p.ci < kFar,
              "fewer than 2^30 pixels including padding, and fewer than 2^30 products per output", "split the batch",
              Shape{x});
  p.ho = static_cast<int>(ho), p.wo = static_cast<int>(wo);
  p.stride_h = static_cast<int>(stride_h), p.stride_w = static_cast<int>(stride_w);
  p.pad_h = static_cast<int>(pad_h), p.pad_w = static_cast<int>(pad_w);
  p.dilation_h = static_cast<int>(dilation_h), p.dilation_w = static_cast<int>(dilation_w);
  p.relu = relu;
  p.weight = weight.const_data_ptr();
  Tensor y = convolution_operands(call, p, x, bias, residual, ho, wo);
  if (y.numel() == 0) return y;
  call.check(call.kernels().conv_bn_act(p, call.device()), Shape{x}, " with filters ", Shape{weight}, " to ", Shape{y});
  return y;
}

}  // namespace
}  // namespace resnet_fast::ops

STABLE_TORCH_LIBRARY_IMPL(resnet_fast_native, CUDA, m) {
  m.impl("conv_bn_act", TORCH_BOX(&resnet_fast::ops::conv_bn_act));
}
STABLE_TORCH_LIBRARY_IMPL(resnet_fast_native, CPU, m) {
  m.impl("conv_bn_act", TORCH_BOX(&resnet_fast::ops::conv_bn_act));
}
