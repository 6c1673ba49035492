"""``stem``: the 7x7 convolution with bias and ReLU as one oneDNN primitive, then ATen's max-pool on a warm cache.

ReLU and max commute, so pooling could come first only if the primitive pooled too; oneDNN has no such post-op.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ...calls import Call
from ...spec import ConvSpec, Verdict
from . import bounds
from .conv_bn_act import PackedCall, compute_dtype, conv, like_reference, nhwc
from .conv_bn_act import prepare as prepare


def run(call: Call, spec: ConvSpec, state: PackedCall) -> Tensor | Verdict:
    """maxpool(relu(bn(conv(x))))."""
    assert call.pool is not None
    x = nhwc(call.x, compute_dtype(call.x.dtype))
    refusal = bounds.verdict((x,), state.reach)
    if refusal is not None:
        return refusal
    y = F.max_pool2d(conv(x, state.convs[0], relu=True), *call.pool)
    return like_reference(y, call.x.dtype, spec.layout)
