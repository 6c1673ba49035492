"""``stem``: y = maxpool(relu(bn(conv(x)))), the first layers of an ImageNet ResNet (He et al. 2015, Table 1)."""

from __future__ import annotations

from typing import Any

from ..calls import Norm, Pool, StemCall
from .conv_bn_act import conv_flops
from .register import CONV_SCHEMA, NORM_SCHEMA, bind_conv, register


def _bind(x: Any, *args: Any) -> StemCall:
    return StemCall(x, bind_conv(args[:6]), Norm(*args[6:13]), Pool(*args[13]))


def _flops(x: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, *rest: Any, **kwargs: Any) -> int:
    return conv_flops(x, weight, stride, padding, dilation)[0]


register("stem", f"Tensor x, {CONV_SCHEMA}, {NORM_SCHEMA}, int[3] pool", _bind, _flops)
