// Every kernel of the library in a table of functions. kernels.cu fills one table when compiled for GPUs and another
// when compiled for the emulator, so the same ops serve both.
#pragma once

#include <resnet_fast/bottleneck_fwd.h>
#include <resnet_fast/conv_bn_act.h>
#include <resnet_fast/conv_bn_act_1x1.h>
#include <resnet_fast/launch.h>
#include <resnet_fast/stem_fwd.h>

namespace resnet_fast {

struct Kernels {
  // Gets the device on which the calling thread would launch; leaves the stream unset.
  Status (*device)(Device* device);
  int (*bottleneck_fwd_shared)(const BottleneckParams& params);
  Status (*bottleneck_fwd)(const BottleneckParams& params, const Device& device);
  Status (*conv_bn_act)(const ConvParams& params, const Device& device);
  Status (*conv_bn_act_1x1)(const Conv1x1Params& params, const Device& device);
  Status (*stem_fwd)(const StemParams& params, const Device& device);
};

const Kernels& kernels();

}  // namespace resnet_fast
