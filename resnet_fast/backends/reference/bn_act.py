"""``bn_act`` in eager PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ...calls import BnActCall
from ...spec import Spec
from .conv_bn_act import batch_norm


def bn_act(call: BnActCall, spec: Spec | None = None, state: None = None) -> Tensor:
    """act(bn(x) + residual). Out of place where the norm is absent: x belongs to the caller."""
    y = batch_norm(call.x, call.norm)
    if call.residual is not None:
        y = y + call.residual
    if call.relu:
        return F.relu(y)
    return y.clone() if y is call.x else y
