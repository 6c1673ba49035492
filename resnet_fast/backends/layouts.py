"""Memory layouts, as several backends need them."""

from __future__ import annotations

import torch
from torch import Tensor


def nhwc(x: Tensor) -> Tensor:
    """``x`` dense in NHWC; itself if it is so."""
    return x.contiguous(memory_format=torch.channels_last)


def in_layout(y: Tensor, layout: str) -> Tensor:
    """``y`` with the strides that the reference would return."""
    return nhwc(y) if layout == "nhwc" else y.contiguous()
