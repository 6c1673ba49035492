"""The forward of a fused residual block, for any number of convolutions and either library's children."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .fused import Arguments, Fused, conv_obstacle, is_altered, norm_obstacle


class ResidualBlock(Fused):
    """A stock residual block whose forward is the op ``op``.

    A shortcut made of one plain 1x1 convolution and norm goes into the op. Any other shortcut (option A's padded
    channels, timm's average-pooled projection) is computed by its own module and added by the op.
    """

    downsample: Any

    @torch.jit.unused
    def fused_forward(self, x: Tensor) -> Tensor:
        """relu(residual branch + shortcut) as one op call, or the stock forward with the reason counted."""
        reason = self.obstacle(x)
        if reason:
            self.stock(reason)
            return self.stock_class.forward(self, x)
        arguments = Arguments()
        for conv, norm in self.layers:
            arguments.add(getattr(self, conv), getattr(self, norm))
        shortcut = None
        if self.downsample is not None:
            if is_projection(self.downsample):
                arguments.add(self.downsample[0], self.downsample[1])
            else:
                shortcut = self.downsample(x)
        op = torch.ops.resnet_fast.bottleneck if self.op == "bottleneck" else torch.ops.resnet_fast.basic_block
        return op(x, *arguments.of_block(), shortcut, self.backend)


def is_projection(shortcut: nn.Module) -> bool:
    """Is this shortcut a Sequential of exactly a convolution and a norm that the op can take in?"""
    if type(shortcut) is not nn.Sequential or len(shortcut) != 2 or is_altered(shortcut):
        return False
    return not conv_obstacle("downsample", shortcut[0]) and not norm_obstacle("downsample", shortcut[1])
