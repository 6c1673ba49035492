// What bottleneck_fwd.cu needs to know of a call.
#pragma once

#include <cstddef>

#include <resnet_fast/launch.h>

namespace resnet_fast {

// Output tiles are kBottleneckTile x kBottleneckTile pixels; the weights are cut into steps of kBottleneckStep input
// channels, see bottleneck_fwd.cu.
constexpr int kBottleneckTile = 8;
constexpr int kBottleneckStep = 64;

// Tensors of 16 bits, NHWC and dense, 16-byte aligned: x (n, h, w, ci), y (n, h, w, co). `weights`: all convolutions'
// as (steps, cmid, 64), in the order of bottleneck_steps. Biases fp32: bias1 and bias2 (cmid), bias3 (co), into which
// the projection's was added.
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

// Bytes of shared memory that the smallest variant for these channels needs.
int bottleneck_fwd_shared(const BottleneckParams& params);

// One launch, at least one pixel. The caller has checked shapes; see ops/bottleneck_fwd.cpp.
Status launch_bottleneck_fwd(const BottleneckParams& params, const Device& device);

// The launch on Hopper's own instructions, bottleneck_fwd_sm90a.cu, which launch_bottleneck_fwd takes where it fits: 64
// channels between, 256 out, the identity or a projection of 64; compiled for sm_90a and run there.
bool bottleneck_fwd_sm90a_fits(const BottleneckParams& params, const Device& device);
Status launch_bottleneck_fwd_sm90a(const BottleneckParams& params, const Device& device);

}  // namespace resnet_fast
