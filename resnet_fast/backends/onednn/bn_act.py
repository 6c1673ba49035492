"""``bn_act`` as one pass over memory: a 1x1 depthwise convolution whose weight is BN's scale and whose bias its shift.

    y = relu(scale * x + shift + residual)

ATen has no fused elementwise primitive, and BatchNorm, add and ReLU apart cost three reads and writes of x.
"""

from __future__ import annotations

import torch

from ... import derived
from ...calls import BnActCall, Conv, Norm
from ...spec import PointwiseSpec
from .conv_bn_act import Packed, compute_dtype, conv, conv_add, like_reference, nhwc, pack_one


def bn_act(call: BnActCall, spec: PointwiseSpec) -> torch.Tensor:
    """act(bn(x) + residual)."""
    dtype = compute_dtype(call.x.dtype)
    x = nhwc(call.x, dtype)
    p = _packed(x, call.norm)
    if call.residual is None:
        y = conv(x, p, call.relu)
    else:
        other = nhwc(call.residual, dtype)
        y = conv_add(x, p, other, call.relu, overwrite=other is not call.residual)
    return like_reference(y, call.x.dtype, spec.layout)


def _packed(x: torch.Tensor, norm: Norm) -> Packed:
    channels = x.shape[1]

    def make() -> Packed:
        identity = torch.ones(channels, 1, 1, 1, device=x.device)
        return pack_one(Conv(identity, None, (1, 1), (0, 0), (1, 1), channels), norm, tuple(x.shape), x.dtype)

    sources = tuple(t for t in (norm.mean, norm.var, norm.weight, norm.bias) if t is not None)
    if not sources:
        return make()
    which = tuple(t is not None for t in norm.tensors())
    return derived.get(sources, (tuple(x.shape), x.dtype, norm.eps, which), lambda kept: make())
