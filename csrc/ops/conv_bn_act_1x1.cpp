// conv_bn_act_1x1(x, weight, bias, residual, stride_h, stride_w, relu) -> y: see kernels/conv_bn_act_1x1.cu.

#include "conv.h"

namespace resnet_fast::ops {
namespace {

Tensor conv_bn_act_1x1(const Tensor& x, const Tensor& weight, const Tensor& bias, std::optional<Tensor> residual,
                       int64_t stride_h, int64_t stride_w, bool relu) {
  const Call call("conv_bn_act_1x1", x);
  Conv1x1Params p{};
  convolution_input(call, p, x);
  call.expect(stride_h > 0 && stride_w > 0, "strides of 1 or more", "use positive ones", stride_h, " and ", stride_w);
  p.stride_h = static_cast<int>(stride_h), p.stride_w = static_cast<int>(stride_w);
  p.co = static_cast<int>(bias.numel());
  p.relu = relu;
  call.expect_dense(weight, "weight", x.scalar_type(), {p.co, p.ci});
  p.weight = weight.const_data_ptr();
  Tensor y = convolution_operands(call, p, x, bias, residual, p.ho(), p.wo());
  if (y.numel() == 0) return y;
  call.check(call.kernels().conv_bn_act_1x1(p, call.device()), Shape{x}, " to ", Shape{y});
  return y;
}

}  // namespace
}  // namespace resnet_fast::ops

STABLE_TORCH_LIBRARY_IMPL(resnet_fast_native, CUDA, m) {
  m.impl("conv_bn_act_1x1", TORCH_BOX(&resnet_fast::ops::conv_bn_act_1x1));
}
STABLE_TORCH_LIBRARY_IMPL(resnet_fast_native, CPU, m) {
  m.impl("conv_bn_act_1x1", TORCH_BOX(&resnet_fast::ops::conv_bn_act_1x1));
}
