"""Run a launch on PyTorch's own kernels, where the tuner measured them faster than ours.

- ``cudnn``: convolution, then bias, add and ReLU as separate kernels.
- ``cudnn_fused``: cuDNN's convolution with bias, add and ReLU as its epilogue (ATen's ``cudnn_convolution_relu`` and
  ``cudnn_convolution_add_relu``).

PyTorch's max-pool follows a stem.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...spec import LaunchSpec
from ...tuning.configs import Config
from ...tuning.routes import merged_groups
from .launch import FoldedWeights, nhwc


def stock(
    spec: LaunchSpec, config: Config, packed: FoldedWeights, x: Tensor, res: Tensor | None, xp: Tensor | None
) -> Tensor:
    """Launch the kernel.

    Args:
        spec: the launch.
        config: its tiles.
        packed: its weights.
        x: (N, C, H, W), fastest in NHWC.
        res: the residual (N, C, H, W), fastest in NHWC, or None.
        xp: unused; every launcher has the same signature.

    Returns:
        y in NHWC.
    """
    conv = spec.last
    weight = packed.weight.permute(0, 3, 1, 2)  # (Co, R, S, C) dense is channels_last
    geometry = (conv.stride, conv.padding, conv.dilation, merged_groups(conv))
    x = nhwc(x)
    if config.kernel == "cudnn_fused":
        if res is None:
            y = torch.cudnn_convolution_relu(x, weight, packed.bias, *geometry)
        else:
            y = torch.cudnn_convolution_add_relu(x, weight, res, 1.0, packed.bias, *geometry)
    else:
        y = F.conv2d(x, weight, packed.bias, *geometry)
        if res is not None:
            y += res
        if conv.epilogue.relu:
            y = F.relu_(y)
    return y if conv.epilogue.pool is None else F.max_pool2d(y, *conv.epilogue.pool)
