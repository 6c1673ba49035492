"""``conv_bn_act`` in eager PyTorch, and the two steps that the other reference ops use."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ...calls import Call, Conv, Norm
from ...spec import Spec


def conv2d(x: Tensor, c: Conv) -> Tensor:
    """(N, Ci, H, W) -> (N, Co, Ho, Wo). A float32 weight is rounded to a 16-bit input's dtype, as in autocast."""
    bias = None if c.bias is None else c.bias.to(x.dtype)
    return F.conv2d(x, c.weight.to(x.dtype), bias, c.stride, c.padding, c.dilation, c.groups)


def batch_norm(y: Tensor, n: Norm) -> Tensor:
    """BatchNorm over (N, H, W); only the affine part without statistics; ``y`` itself for an absent norm."""
    if n.batch_stats or n.mean is not None:
        return F.batch_norm(y, n.mean, n.var, n.weight, n.bias, n.batch_stats, n.momentum, n.eps)
    if n.weight is not None:
        y = y * n.weight.to(y.dtype)[:, None, None]
    return y if n.bias is None else y + n.bias.to(y.dtype)[:, None, None]


def run(call: Call, spec: Spec | None = None, state: None = None) -> Tensor:
    """act(bn(conv(x)) + residual), in place on the function's own tensors, as in torchvision's blocks."""
    y = batch_norm(conv2d(call.x, call.convs[0]), call.norms[0])
    if call.added is not None:
        y += call.added
    return F.relu_(y) if call.relu else y
