// Facts about the device code of this library, from the CUDA compiler. Includes neither torch nor CUDA headers.
#pragma once

namespace resnet_fast {

struct DeviceBuild {
  int toolkit;       // CUDART_VERSION: 1000 * major + 10 * minor
  const int* archs;  // 10 * compute capability, ascending: 800 is sm_80
  int num_archs;
};

DeviceBuild device_build();

}  // namespace resnet_fast
