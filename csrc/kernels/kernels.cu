// The table of kernels, see kernels.h.

#include <resnet_fast/device.h>
#include <resnet_fast/kernels.h>

namespace resnet_fast {

// Gets the device of the launchers: the current CUDA device, or the one that the emulator is configured to be.
Status current_device(Device* device);

const Kernels& kernels() {
  static const Kernels table{current_device,     bottleneck_fwd_shared,  launch_bottleneck_fwd,
                             launch_conv_bn_act, launch_conv_bn_act_1x1, launch_stem_fwd};
  return table;
}

}  // namespace resnet_fast
