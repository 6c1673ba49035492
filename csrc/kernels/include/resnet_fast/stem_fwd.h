// Parameters and launcher of stem_fwd.cu.
#pragma once

#include <cstddef>

#include <resnet_fast/launch.h>

namespace resnet_fast {

// Output tiles are kStemTileH x kStemTileW pooled pixels. The weights are cut into units of 16 bytes a lane:
// kStemHalves halves of the 64 output channels, kStemUnits units each, see stem_fwd.cu.
constexpr int kStemTileH = 7;
constexpr int kStemTileW = 14;
constexpr int kStemChannels = 64;
constexpr int kStemHalves = 2;
constexpr int kStemUnits = 22;

// 16-bit tensors, dense, 16-byte aligned: x (n, h, w, 3), y (n, hp, wp, 64), weights (2, 22, 32 lanes, 8). bias
// (64) fp32.
struct StemParams {
  const void* x;
  const void* weights;
  const float* bias;
  void* y;
  int n, h, w;
  bool bfloat16;  // else half

  // Of the convolution's output, and of the pooled one.
  RF_HOST_DEVICE int ho() const {
    return (h - 1) / 2 + 1;
  }
  RF_HOST_DEVICE int wo() const {
    return (w - 1) / 2 + 1;
  }
  RF_HOST_DEVICE int hp() const {
    return (ho() - 1) / 2 + 1;
  }
  RF_HOST_DEVICE int wp() const {
    return (wo() - 1) / 2 + 1;
  }
  RF_HOST_DEVICE int tiles_h() const {
    return (hp() + kStemTileH - 1) / kStemTileH;
  }
  RF_HOST_DEVICE int tiles_w() const {
    return (wp() + kStemTileW - 1) / kStemTileW;
  }

  template <typename F>
  void tensors(F f) const {
    f("x", x, static_cast<size_t>(n) * h * w * 3 * 2, Access::kRead);
    f("weights", weights, static_cast<size_t>(kStemHalves) * kStemUnits * 32 * 16, Access::kRead);
    f("bias", bias, static_cast<size_t>(kStemChannels) * 4, Access::kRead);
    f("y", y, static_cast<size_t>(n) * hp() * wp() * kStemChannels * 2, Access::kWrite);
  }
};

// Launches the kernel for at least one pixel. The caller has checked shapes; see ops/stem_fwd.cpp.
Status launch_stem_fwd(const StemParams& params, const Device& device);

}  // namespace resnet_fast
