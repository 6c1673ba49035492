"""Turn BatchNorm into (scale, shift) in fp32, and fold it into a convolution.

Only this file, and the kernel that takes the root of a batch's variance (backends/triton/training/batch_norm.py),
compute with eps.

    bn(y) = gamma * (y - mean) / sqrt(var + eps) + beta = scale * y + shift
    scale = gamma / sqrt(var + eps)          shift = beta - mean * scale

(Ioffe and Szegedy 2015, algorithm 1 with the running statistics.) A convolution's bias enters as ``scale * bias``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .calls import Conv, Norm


def scale_shift(norm: Norm, channels: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return scale and shift of a norm with constant statistics, fp32, each of shape (channels,).

    They are computed in fp64 and rounded once: a variance near zero makes ``1/sqrt(var + eps)`` large, and with it the
    error of a computation in fp32.
    """
    one = torch.ones(channels, dtype=torch.float64, device=device)
    gamma = one if norm.weight is None else norm.weight.detach().double()
    beta = torch.zeros_like(one) if norm.bias is None else norm.bias.detach().double()
    if norm.mean is None or norm.var is None:
        return gamma.float(), beta.float()
    scale = gamma * torch.rsqrt(norm.var.detach().double() + norm.eps)
    return scale.float(), (beta - norm.mean.detach().double() * scale).float()


def fold(conv: Conv, norm: Norm) -> tuple[Tensor, Tensor]:
    """Return the fp32 weight (Co, Ci/groups, R, S) and bias (Co,) of the convolution that equals ``bn(conv(x))``."""
    scale, shift = scale_shift(norm, conv.weight.shape[0], conv.weight.device)
    weight = conv.weight.detach().float() * scale[:, None, None, None]
    return weight, shift if conv.bias is None else torch.addcmul(shift, conv.bias.detach().float(), scale)
