"""``conv_bn_act``: y = act(bn(conv(x, weight) + bias) + residual).

x (N, Ci, H, W)   weight (Co, Ci/groups, R, S)   residual, y (N, Co, Ho, Wo)
"""

from __future__ import annotations

from typing import Any

from ..calls import ConvBnActCall, Norm
from .register import CONV_SCHEMA, NORM_SCHEMA, bind_conv, register


def _bind(x: Any, *args: Any) -> ConvBnActCall:
    relu, residual = args[13], args[14]
    return ConvBnActCall(x, bind_conv(args[:6]), Norm(*args[6:13]), residual, relu)


def conv_flops(x: Any, weight: Any, stride: Any, padding: Any, dilation: Any) -> tuple[int, tuple[int, int, int, int]]:
    """FLOPs and output shape of one convolution, from shapes (which may be symbolic: no Spec is built)."""
    n, _, h, w = x
    co, cig, r, s = weight
    ho = (h + 2 * padding[0] - dilation[0] * (r - 1) - 1) // stride[0] + 1
    wo = (w + 2 * padding[1] - dilation[1] * (s - 1) - 1) // stride[1] + 1
    return 2 * n * ho * wo * co * cig * r * s, (n, co, ho, wo)


def _flops(x: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, *rest: Any, **kwargs: Any) -> int:
    return conv_flops(x, weight, stride, padding, dilation)[0]


register("conv_bn_act", f"Tensor x, {CONV_SCHEMA}, {NORM_SCHEMA}, bool relu, Tensor? residual=None", _bind, _flops)
