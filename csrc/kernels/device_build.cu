// Facts about the device compilation. This is a .cu file because only nvcc defines __CUDA_ARCH_LIST__, the
// architectures for which the kernels are actually compiled, whatever the build script asked for.

#include <cuda_runtime_api.h>

#include <resnet_fast/device_build.h>

namespace resnet_fast {

DeviceBuild device_build() {
  static constexpr int kArchs[] = {__CUDA_ARCH_LIST__};
  return {CUDART_VERSION, kArchs, static_cast<int>(sizeof(kArchs) / sizeof(kArchs[0]))};
}

}  // namespace resnet_fast
