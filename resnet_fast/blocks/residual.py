"""The forward of a fused residual block, for any number of convolutions and either library's children."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import ops
from ..calls import BlockCall
from .fused import Fused, conv_obstacle, conv_record, is_altered, norm_obstacle, norm_record


class ResidualBlock(Fused):
    """A stock residual block whose forward is the op ``op``.

    A shortcut made of one plain 1x1 convolution and norm goes into the op. Any other shortcut (option A's padded
    channels, timm's average-pooled projection) is computed by its own module and added by the op.
    """

    @torch.jit.unused
    def fused_forward(self, x: Tensor) -> Tensor:
        """relu(residual branch + shortcut) as one op call, or the stock forward with the reason counted."""
        if self.runs_stock(x):
            return self.stock_class.forward(self, x)
        children = self._modules
        pairs = [(children[conv], children[norm]) for conv, norm in self.layers]
        downsample, shortcut, projection = children.get("downsample"), None, False
        if downsample is not None:
            projection = is_projection(downsample)
            if projection:
                pairs.append((downsample[0], downsample[1]))  # type: ignore[index]
            else:
                shortcut = downsample(x)
        convs = tuple([conv_record(conv) for conv, _ in pairs])
        norms = tuple([norm_record(norm) for _, norm in pairs])
        return ops.run(BlockCall(x, convs, norms, projection, shortcut), self.backend)


def is_projection(shortcut: nn.Module) -> bool:
    """Is this shortcut a Sequential of exactly a convolution and a norm that the op can take in?"""
    if type(shortcut) is not nn.Sequential or len(shortcut) != 2 or is_altered(shortcut):
        return False
    return not conv_obstacle("downsample", shortcut[0]) and not norm_obstacle("downsample", shortcut[1])
