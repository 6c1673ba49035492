// Parameters and launcher of conv_bn_act.cu.
#pragma once

#include <cstddef>

#include <resnet_fast/launch.h>

namespace resnet_fast {

// 16-bit tensors, NHWC and dense, 16-byte aligned: x (n, h, w, ci), residual and y (n, ho, wo, co), weight (co, r,
// s, ci). bias (co) fp32. residual may be nullptr.
struct ConvParams {
  const void* x;
  const void* weight;
  const float* bias;
  const void* residual;
  void* y;
  int n, h, w, ci, co, r, s, ho, wo;
  int stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  bool relu;
  bool bfloat16;  // else half

  RF_HOST_DEVICE int gemm_m() const {
    return n * ho * wo;
  }
  RF_HOST_DEVICE int gemm_k() const {
    return r * s * ci;
  }

  template <typename F>
  void tensors(F f) const {
    const size_t out = static_cast<size_t>(gemm_m()) * co * 2;
    f("x", x, static_cast<size_t>(n) * h * w * ci * 2, Access::kRead);
    f("weight", weight, static_cast<size_t>(co) * gemm_k() * 2, Access::kRead);
    f("bias", bias, static_cast<size_t>(co) * 4, Access::kRead);
    f("residual", residual, out, Access::kRead);
    f("y", y, out, Access::kWrite);
  }
};

// Launches the kernel for at least one pixel. The caller has checked shapes; see ops/conv_bn_act.cpp.
Status launch_conv_bn_act(const ConvParams& params, const Device& device);

}  // namespace resnet_fast
