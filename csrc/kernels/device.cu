// Properties of the CUDA device on which the calling thread would launch.

#include <cuda_runtime_api.h>

#include <resnet_fast/launch.h>

namespace resnet_fast {

Status current_device(Device* device) {
  int index = 0, major = 0, minor = 0;
  const auto ask = [&](int* value, cudaDeviceAttr what) { return cudaDeviceGetAttribute(value, what, index); };
  cudaError_t failed = cudaGetDevice(&index);
  if (failed == cudaSuccess) failed = ask(&major, cudaDevAttrComputeCapabilityMajor);
  if (failed == cudaSuccess) failed = ask(&minor, cudaDevAttrComputeCapabilityMinor);
  if (failed == cudaSuccess) failed = ask(&device->sms, cudaDevAttrMultiProcessorCount);
  if (failed == cudaSuccess) failed = ask(&device->shared, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  device->arch = 10 * major + minor;
  return failed == cudaSuccess ? nullptr : cudaGetErrorString(failed);
}

}  // namespace resnet_fast
