// Launching a kernel: the grid, the device, and the error. Does not include torch, and includes CUDA only under nvcc.
#pragma once

#include <cstddef>

#ifdef __CUDACC__
#include <atomic>
#include <mutex>
#endif

// For a function that a kernel and its launcher both call.
#ifdef __CUDACC__
#define RF_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define RF_HOST_DEVICE inline
#endif

namespace resnet_fast {

// What a process may see of them. Facts about a device are kept by its index.
constexpr int kMaxDevices = 64;

// The device to run on. `arch`: 10 * compute capability; `shared`: bytes of shared memory that a block may ask for;
// `index`: CUDA's number of it, below kMaxDevices; `stream`: a cudaStream_t.
struct Device {
  int arch = 0;
  int sms = 0;
  int shared = 0;
  int index = 0;
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
#define RF_LAUNCH(kernel, grid, device, params) ::resnet_fast::launch<kernel>(grid, device, params)

// Lets blocks of the kernel use this many bytes of shared memory. The driver is asked once per kernel and device, or
// again for more.
template <auto kKernel>
cudaError_t allow_shared(int bytes, const Device& device) {
  static std::atomic<int> allowed[kMaxDevices];
  static std::mutex asking;
  std::atomic<int>& here = allowed[device.index];
  if (bytes <= here.load(std::memory_order_acquire)) return cudaSuccess;
  const std::lock_guard<std::mutex> one_at_a_time(asking);
  if (bytes <= here.load(std::memory_order_relaxed)) return cudaSuccess;
  const cudaError_t failed =
      cudaFuncSetAttribute(reinterpret_cast<const void*>(kKernel), cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (failed == cudaSuccess) here.store(bytes, std::memory_order_release);
  return failed;
}

template <auto kKernel, typename Params>
Status launch(const Grid& grid, const Device& device, const Params& params) {
  constexpr int kWithoutAsking = 48 * 1024;
  if (grid.shared > kWithoutAsking) {
    const cudaError_t refused = allow_shared<kKernel>(grid.shared, device);
    if (refused != cudaSuccess) return cudaGetErrorString(refused);
  }
  kKernel<<<grid.blocks, grid.threads, grid.shared, static_cast<cudaStream_t>(device.stream)>>>(params);
  const cudaError_t failed = cudaGetLastError();
  return failed == cudaSuccess ? nullptr : cudaGetErrorString(failed);
}
#else
#define RF_LAUNCH(kernel, grid, device, params) (static_cast<void>(device), ::emulator::launch<kernel>(grid, params))
#endif

}  // namespace resnet_fast
