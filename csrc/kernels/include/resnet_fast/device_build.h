// What the CUDA compiler says about the device code in this library. No torch, no CUDA header.
#pragma once

namespace resnet_fast {

struct DeviceBuild {
  int toolkit;       // CUDART_VERSION: 1000 * major + 10 * minor
  const int* archs;  // 10 * compute capability, ascending: 800 is sm_80
  int num_archs;
};

DeviceBuild device_build();

}  // namespace resnet_fast
