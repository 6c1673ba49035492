"""``bn_act`` as one pass over memory: a 1x1 depthwise convolution whose weight is BN's scale and whose bias its shift.

    y = relu(scale * x + shift + residual)

ATen has no fused elementwise primitive, and BatchNorm, add and ReLU apart cost three reads and writes of x.
"""

from __future__ import annotations

import torch

from ...calls import BnActCall, Conv
from ...spec import PointwiseSpec
from . import bounds
from .conv_bn_act import Folded, compute_dtype, pack_one
from .conv_bn_act import conv_bn_act as bn_act

__all__ = ["bn_act", "prepare"]


def prepare(call: BnActCall, spec: PointwiseSpec, earlier: list[Folded]) -> Folded:
    """The norm folded into a depthwise convolution by one."""
    identity = torch.ones(spec.c, 1, 1, 1, device=call.x.device)
    conv = Conv(identity, None, (1, 1), (0, 0), (1, 1), spec.c)
    packed = pack_one(conv, call.norm, (spec.n, spec.c, spec.h, spec.w), compute_dtype(call.x.dtype))
    found = bounds.UNCHANGED.then(packed.bounds)
    return Folded.of([packed], found if call.residual is None else found.plus(bounds.UNCHANGED))
