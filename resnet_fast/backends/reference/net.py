"""``net`` in eager PyTorch: its parts, one after another."""

from __future__ import annotations

from torch import Tensor

from ...calls import BlockCall, NetCall, StemCall
from ...spec import NetSpec
from .bottleneck import bottleneck
from .conv_bn_act import conv_bn_act
from .stem import stem


def net(call: NetCall, spec: NetSpec | None = None, state: None = None) -> Tensor:
    """Stem and blocks."""
    x = call.x
    for part in call.parts:
        if isinstance(part, BlockCall):
            x = bottleneck(part._replace(x=x))
        elif isinstance(part, StemCall):
            x = stem(part._replace(x=x))
        else:
            x = conv_bn_act(part._replace(x=x))
    return x
