"""``stem`` in eager PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ...calls import Call
from ...spec import Spec
from .conv_bn_act import batch_norm, conv2d


def run(call: Call, spec: Spec | None = None, state: None = None) -> Tensor:
    """maxpool(relu(bn(conv(x))))."""
    assert call.pool is not None
    y = F.relu_(batch_norm(conv2d(call.x, call.convs[0]), call.norms[0]))
    return F.max_pool2d(y, *call.pool)
