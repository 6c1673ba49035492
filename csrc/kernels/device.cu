// Properties of the CUDA device on which the calling thread would launch.

#include <cuda_runtime_api.h>

#include <array>
#include <atomic>
#include <mutex>

#include <resnet_fast/launch.h>

namespace resnet_fast {
namespace {

// What the driver said about a device, which does not change while the process runs.
struct Known {
  std::atomic<bool> ready{false};
  Device device;
};

cudaError_t ask(int index, Device* device) {
  int major = 0, minor = 0;
  const auto attribute = [&](int* value, cudaDeviceAttr what) { return cudaDeviceGetAttribute(value, what, index); };
  cudaError_t failed = attribute(&major, cudaDevAttrComputeCapabilityMajor);
  if (failed == cudaSuccess) failed = attribute(&minor, cudaDevAttrComputeCapabilityMinor);
  if (failed == cudaSuccess) failed = attribute(&device->sms, cudaDevAttrMultiProcessorCount);
  if (failed == cudaSuccess) failed = attribute(&device->shared, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  device->arch = 10 * major + minor;
  device->index = index;
  return failed;
}

}  // namespace

Status current_device(Device* device) {
  static std::array<Known, kMaxDevices> known;
  static std::mutex asking;
  int index = 0;
  cudaError_t failed = cudaGetDevice(&index);
  if (failed != cudaSuccess) return cudaGetErrorString(failed);
  if (index < 0 || index >= kMaxDevices) return "the device's index is beyond those that this library knows";
  Known& found = known[index];
  if (!found.ready.load(std::memory_order_acquire)) {
    const std::lock_guard<std::mutex> one_at_a_time(asking);
    if (!found.ready.load(std::memory_order_relaxed)) failed = ask(index, &found.device);
    if (failed != cudaSuccess) return cudaGetErrorString(failed);
    found.ready.store(true, std::memory_order_release);
  }
  *device = found.device;
  return nullptr;
}

}  // namespace resnet_fast
