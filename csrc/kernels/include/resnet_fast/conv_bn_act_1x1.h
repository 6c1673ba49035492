// Parameters and launcher of conv_bn_act_1x1.cu.
#pragma once

#include <cstddef>

#include <resnet_fast/launch.h>

namespace resnet_fast {

// 16-bit tensors, NHWC and dense, 16-byte aligned: x (n, h, w, ci), residual and y (n, ho, wo, co), weight (co,
// ci). bias (co) fp32. residual may be nullptr.
struct Conv1x1Params {
  const void* x;
  const void* weight;
  const float* bias;
  const void* residual;
  void* y;
  int n, h, w, ci, co;
  int stride_h, stride_w;
  bool relu;
  bool bfloat16;  // else half

  RF_HOST_DEVICE int ho() const {
    return (h - 1) / stride_h + 1;
  }
  RF_HOST_DEVICE int wo() const {
    return (w - 1) / stride_w + 1;
  }
  RF_HOST_DEVICE int gemm_m() const {
    return n * ho() * wo();
  }

  template <typename F>
  void tensors(F f) const {
    const size_t out = static_cast<size_t>(gemm_m()) * co * 2;
    f("x", x, static_cast<size_t>(n) * h * w * ci * 2, Access::kRead);
    f("weight", weight, static_cast<size_t>(co) * ci * 2, Access::kRead);
    f("bias", bias, static_cast<size_t>(co) * 4, Access::kRead);
    f("residual", residual, out, Access::kRead);
    f("y", y, out, Access::kWrite);
  }
};

// Launches the kernel for at least one pixel. The caller has checked shapes; see ops/conv_bn_act_1x1.cpp.
Status launch_conv_bn_act_1x1(const Conv1x1Params& params, const Device& device);

}  // namespace resnet_fast
