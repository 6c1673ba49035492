"""``bottleneck`` in eager PyTorch; a basic block is the same loop over two convolutions instead of three."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ...calls import Call
from ...spec import Spec
from .conv_bn_act import batch_norm, conv2d


def run(call: Call, spec: Spec | None = None, state: None = None) -> Tensor:
    """relu(bn(conv(... relu(bn(conv(x))))) + shortcut), convolution by convolution."""
    out = call.x
    *inner, last = call.main()
    for conv, norm in inner:
        out = F.relu_(batch_norm(conv2d(out, conv), norm))
    out = batch_norm(conv2d(out, last[0]), last[1])
    if call.projection:
        shortcut = batch_norm(conv2d(call.x, call.convs[-1]), call.norms[-1])
    else:
        shortcut = call.x if call.added is None else call.added
    out += shortcut
    return F.relu_(out)
