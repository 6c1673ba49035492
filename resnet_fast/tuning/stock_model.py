"""Predict the time of a launch on PyTorch's own kernels, from what they reached on an H100.

ResNet-50 in bfloat16, BN folded, on cuDNN's fused convolutions in one CUDA graph was measured on an H100 SXM (torch
2.11, cuDNN 9.19) at batches 1 to 256: 2,575 to 25,700 images/s. With the floor of a launch (bytes over the copy
bandwidth or operations over the dense rate, whichever takes longer), the measurements fit to 2 %

    seconds = floor / REACHED + LAUNCH_S                    roofline/prediction.py: calibration(), MEASURED

Only whole nets were measured, so a single launch may be further off. The profile of a training step has stage 1's
forward 3x3 convolutions at 146 us each, where this says 133. On another GPU the floor is that GPU's: modelled, and on
the assumption that the kernels reach the same part of it. Torch-free.
"""

from __future__ import annotations

from ..devices import Device
from ..spec import LaunchSpec
from . import configs
from .configs import Config
from .routes import merged_groups

REACHED = 0.589
"""The part of their floors that the fused convolutions reached together."""

LAUNCH_S = 5.74e-6
"""Seconds of each launch besides, in a CUDA graph."""

MARGIN = 1.15
"""How much slower a kernel of ours must be in the model before PyTorch's takes its place: neither time was measured."""

FUSED = Config("cudnn_fused")

PLAIN = ("conv_bn_act_1x1", "conv_bn_act_3x3")
"""Launches that the measured net has many of. Its one stem has three channels, which cuDNN pads."""


def fastest(launch: LaunchSpec, device: Device) -> tuple[Config, float] | None:
    """Return PyTorch's fused kernel for a launch, with its predicted seconds; None where nothing is known.

    Separate kernels for convolution, bias, add and ReLU are left out: each reads and writes the output once more.

    Args:
        launch: a launch of inference.
        device: a GPU with known ceilings.
    """
    known = launch.kernel in PLAIN and merged_groups(launch.last) == 1 and configs.on_tensor_cores(launch)
    if not known or FUSED not in configs.stock_candidates(launch):
        return None
    floor = max(launch.min_bytes() / device.bandwidth.value, launch.flops() / device.rate(launch.dtype).value)
    return FUSED, floor / REACHED + LAUNCH_S
