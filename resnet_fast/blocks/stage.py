"""A stage of a net (layer1 … layer4): NHWC between its blocks, the user's layout at both ends.

    x NCHW -> [NHWC] block -> block -> … -> block -> [NCHW] y

A fused block gives back the layout that it was given. On a CPU its kernels work in NHWC, so a net in NCHW that is built
around such blocks and not run as a whole (a detector, a segmentation net) would convert twice per block; this way it is
twice per stage.
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

    # The stock signature, for who calls it by keyword and for the names of fx's nodes.
    def forward(self, input):  # type: ignore[no-untyped-def]
        if not torch.jit.is_scripting():
            return self.eager_forward(input)
        for block in self:
            input = block(input)
        return input

    @torch.jit.unused
    def eager_forward(self, x: Tensor) -> Tensor:
        """The blocks one after another."""
        if self.converts(x):
            return nn.Sequential.forward(self, x.contiguous(memory_format=torch.channels_last)).contiguous()
        return nn.Sequential.forward(self, x)

    @torch.jit.unused
    def converts(self, x: Tensor) -> bool:
        """Is ``x`` a plain NCHW tensor in inference, and will one of the blocks run on a backend that works in NHWC?"""
        if not ops.is_plain_inference(x) or self.training or x.dim() != 4:
            return False
        if not x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
            return False
        fused = [block for block in self if isinstance(block, Fused) and not block.unfusable()]
        return bool(fused) and select.prefers_nhwc(x.device.type, fused[0].backend)


_own_forward = Sequential.forward


def is_own() -> bool:
    """Does calling a stage run the code above, and nobody's function in its place?"""
    return Sequential.forward is _own_forward
