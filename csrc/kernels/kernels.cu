// The table of kernels, see kernels.h.

#include <resnet_fast/device.h>
#include <resnet_fast/kernels.h>

namespace resnet_fast {

// Where the launchers would run: the current CUDA device, or what the emulator was told to be.
Status current_device(Device* device);

const Kernels& kernels() {
  static const Kernels table{current_device,     bottleneck_fwd_shared,  launch_bottleneck_fwd,
                             launch_conv_bn_act, launch_conv_bn_act_1x1, launch_stem_fwd};
  return table;
}

}  // namespace resnet_fast
