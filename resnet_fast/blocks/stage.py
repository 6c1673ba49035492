"""A stage of a net (layer1 ... layer4): channels_last between its blocks, the caller's layout at both ends.

    x NCHW -> [NHWC] block -> block -> ... -> block -> [NCHW] y

A fused block returns the layout of its input. On a CPU its kernels work in NHWC, so a net in NCHW that is not run as a
whole (a detector, a segmentation net) would convert twice per block. A stage converts twice in all.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from .. import ops
from ..dispatch import select
from .fused import Fused


class Sequential(nn.Sequential):
    """A Sequential of fused blocks."""

    stock_class: ClassVar[type[nn.Module]] = nn.Sequential

    # The stock signature, for callers by keyword and for the names of fx's nodes.
    def forward(self, input):  # type: ignore[no-untyped-def]
        if not torch.jit.is_scripting():
            return self.eager_forward(input)
        for block in self:
            input = block(input)
        return input

    def eager_forward(self, x: Tensor) -> Tensor:
        """Run the blocks one after another."""
        if self.converts(x):
            return nn.Sequential.forward(self, x.contiguous(memory_format=torch.channels_last)).contiguous()
        return nn.Sequential.forward(self, x)

    def converts(self, x: Tensor) -> bool:
        """Return whether ``x`` is a plain NCHW tensor in inference, and a block's backend works in NHWC."""
        if not _is_plain_nchw(x) or self.training:
            return False
        fused = next((block for block in self if isinstance(block, Fused) and not block.unfusable()), None)
        return fused is not None and select.prefers_nhwc(x.device, fused.backend)


def converts(x: Tensor, training: bool, backend: str) -> bool:
    """Return whether a block in pieces should convert ``x`` once for all of them, in inference."""
    return _is_plain_nchw(x) and not training and select.prefers_nhwc(x.device, backend)


def _is_plain_nchw(x: Tensor) -> bool:
    """Return whether ``x`` is a plain tensor (N, C, H, W) in that layout, outside of autograd."""
    if not ops.is_plain_inference(x) or x.dim() != 4:
        return False
    return x.is_contiguous() and not x.is_contiguous(memory_format=torch.channels_last)


_own_forward = Sequential.forward


def is_own() -> bool:
    """Return whether calling a stage runs the code above, not a function put in its place."""
    return Sequential.forward is _own_forward
