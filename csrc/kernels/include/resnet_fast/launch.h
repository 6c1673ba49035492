// Launching a kernel: the grid, the device, and the error. Does not include torch, and includes CUDA only under nvcc.
#pragma once

#include <cstddef>

// For a function that a kernel and its launcher both call.
#ifdef __CUDACC__
#define RF_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define RF_HOST_DEVICE inline
#endif

namespace resnet_fast {

// The device to run on. `arch`: 10 * compute capability; `shared`: bytes of shared memory that a block may ask for;
// `stream`: a cudaStream_t.
struct Device {
  int arch = 0;
  int sms = 0;
  int shared = 0;
  void* stream = nullptr;
};

struct Grid {
  int blocks = 0;
  int threads = 0;
  int shared = 0;
};

// nullptr for success, else the driver's error message.
using Status = const char*;

enum class Access { kRead, kWrite };

#ifdef __CUDACC__
#define RF_LAUNCH(kernel, grid, device, params) ::resnet_fast::launch(kernel, grid, device, params)

template <typename Params>
Status launch(void (*kernel)(Params), const Grid& grid, const Device& device, const Params& params) {
  constexpr int kWithoutAsking = 48 * 1024;
  if (grid.shared > kWithoutAsking) {
    const cudaError_t refused = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                     cudaFuncAttributeMaxDynamicSharedMemorySize, grid.shared);
    if (refused != cudaSuccess) return cudaGetErrorString(refused);
  }
  kernel<<<grid.blocks, grid.threads, grid.shared, static_cast<cudaStream_t>(device.stream)>>>(params);
  const cudaError_t failed = cudaGetLastError();
  return failed == cudaSuccess ? nullptr : cudaGetErrorString(failed);
}
#else
#define RF_LAUNCH(kernel, grid, device, params) (static_cast<void>(device), ::emulator::launch<kernel>(grid, params))
#endif

}  // namespace resnet_fast
