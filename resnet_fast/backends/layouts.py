"""Convert memory layouts."""

from __future__ import annotations

import torch
from torch import Tensor


def nhwc(x: Tensor) -> Tensor:
    """Return ``x`` in dense NHWC; ``x`` itself if it already is."""
    return x.contiguous(memory_format=torch.channels_last)


def in_layout(y: Tensor, layout: str) -> Tensor:
    """Return ``y`` with the strides that the reference would return."""
    return nhwc(y) if layout == "nhwc" else y.contiguous()
