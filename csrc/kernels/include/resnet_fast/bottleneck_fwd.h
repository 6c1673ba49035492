// Parameters and launcher of bottleneck_fwd.cu.
#pragma once

#include <cstddef>

#include <resnet_fast/launch.h>

namespace resnet_fast {

// Output tiles are kBottleneckTile x kBottleneckTile pixels; the weights are cut into steps of kBottleneckStep input
// channels, see bottleneck_fwd.cu.
constexpr int kBottleneckTile = 8;
constexpr int kBottleneckStep = 64;

// 16-bit tensors, NHWC and dense, 16-byte aligned: x (n, h, w, ci), y (n, h, w, co). `weights`: those of all
// convolutions as (steps, cmid, 64), in the order that backends/cuda/bottleneck.py packs them. fp32 biases: bias1 and
// bias2 (cmid), bias3 (co), which includes the bias of the projection.
struct BottleneckParams {
  const void* x;
  const void* weights;
  const float* bias1;
  const float* bias2;
  const float* bias3;
  void* y;
  int n, h, w, ci, cmid, co;
  bool projection;  // the shortcut is a 1x1 convolution of x, not x
  bool bfloat16;    // else half

  RF_HOST_DEVICE int tiles_h() const {
    return (h + kBottleneckTile - 1) / kBottleneckTile;
  }
  RF_HOST_DEVICE int tiles_w() const {
    return (w + kBottleneckTile - 1) / kBottleneckTile;
  }
  RF_HOST_DEVICE int steps1() const {
    return ci / kBottleneckStep;
  }
  RF_HOST_DEVICE int steps2() const {
    return 9 * cmid / kBottleneckStep;
  }
  // Per cmid channels of y.
  RF_HOST_DEVICE int steps3() const {
    return (cmid + (projection ? ci : 0)) / kBottleneckStep;
  }
  RF_HOST_DEVICE int steps() const {
    return steps1() + steps2() + co / cmid * steps3();
  }

  template <typename F>
  void tensors(F f) const {
    const size_t pixels = static_cast<size_t>(n) * h * w;
    f("x", x, pixels * ci * 2, Access::kRead);
    f("weights", weights, static_cast<size_t>(steps()) * cmid * kBottleneckStep * 2, Access::kRead);
    f("bias1", bias1, static_cast<size_t>(cmid) * 4, Access::kRead);
    f("bias2", bias2, static_cast<size_t>(cmid) * 4, Access::kRead);
    f("bias3", bias3, static_cast<size_t>(co) * 4, Access::kRead);
    f("y", y, pixels * co * 2, Access::kWrite);
  }
};

// Returns the bytes of shared memory that the smallest variant for these channels needs.
int bottleneck_fwd_shared(const BottleneckParams& params);

// Launches the kernel for at least one pixel. The caller has checked shapes; see ops/bottleneck_fwd.cpp.
Status launch_bottleneck_fwd(const BottleneckParams& params, const Device& device);

// bottleneck_fwd_sm90a.cu, with Hopper's own instructions. launch_bottleneck_fwd uses it where it fits: compiled for
// sm_90a and running there, 64 inner and 256 output channels, with the identity or a projection of 64 channels.
bool bottleneck_fwd_sm90a_fits(const BottleneckParams& params, const Device& device);
Status launch_bottleneck_fwd_sm90a(const BottleneckParams& params, const Device& device);

}  // namespace resnet_fast
