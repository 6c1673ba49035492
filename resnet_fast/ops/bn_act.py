"""``bn_act``: y = act(bn(x) + residual), all of shape (N, C, H, W)."""

from __future__ import annotations

from typing import Any

from ..calls import BnActCall, Norm
from .register import NORM_SCHEMA, register


def _bind(x: Any, *args: Any) -> BnActCall:
    return BnActCall(x, Norm(*args[:7]), args[8], args[7])


def _flops(*args: Any, **kwargs: Any) -> int:
    # torch.utils.flop_counter counts matrix products and convolutions only, and so does this op for comparability
    return 0


register("bn_act", f"Tensor x, {NORM_SCHEMA}, bool relu, Tensor? residual=None", _bind, _flops)
