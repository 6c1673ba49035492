"""``stem`` in eager PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ...calls import StemCall
from ...spec import Spec
from .conv_bn_act import batch_norm, conv2d


def stem(call: StemCall, spec: Spec | None = None, state: None = None) -> Tensor:
    """maxpool(relu(bn(conv(x))))."""
    y = F.relu_(batch_norm(conv2d(call.x, call.conv), call.norm))
    return F.max_pool2d(y, *call.pool)
