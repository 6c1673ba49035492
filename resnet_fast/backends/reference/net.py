"""``net`` in eager PyTorch: its parts, one after another, in the layout of the weights.

The net around such a call hands its input over in channels_last, for the sake of other backends. A stock net whose
weights are not in channels_last would have been given the user's NCHW, and rounds otherwise there.
"""

from __future__ import annotations

from torch import Tensor

from ...calls import BlockCall, NetCall, StemCall, convs_of
from ...spec import NetSpec
from .bottleneck import bottleneck
from .conv_bn_act import conv_bn_act
from .stem import stem


def net(call: NetCall, spec: NetSpec | None = None, state: None = None) -> Tensor:
    """Stem and blocks."""
    x = call.x
    if all(conv.weight.is_contiguous() for part in call.parts for conv in convs_of(part)):
        x = x.contiguous()
    for part in call.parts:
        if isinstance(part, BlockCall):
            x = bottleneck(part._replace(x=x))
        elif isinstance(part, StemCall):
            x = stem(part._replace(x=x))
        else:
            x = conv_bn_act(part._replace(x=x))
    return x
