"""The forward of a fused residual block, for any number of convolutions and either library's children."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops.misc import FrozenBatchNorm2d

from .. import ops
from ..calls import Call
from .fused import Fused, child, conv_obstacle, conv_record, counts, is_altered, norm_obstacle, norm_record


class ResidualBlock(Fused):
    """A stock residual block whose forward is the op ``op``.

    A shortcut made of one plain 1x1 convolution and norm goes into the op. timm's pooled projection is an op of its own
    behind its pooling; any other shortcut (option A's padded channels, a function) is computed first and added by the
    op.
    """

    @torch.jit.unused
    def fused_forward(self, x: Tensor) -> Tensor:
        """relu(residual branch + shortcut) as one op call, or the stock forward with the reason counted."""
        if self.runs_stock(x):
            return self.stock_class.forward(self, x)
        children = self._modules
        pairs = [(children[conv], children[norm]) for conv, norm in self.layers]
        downsample, shortcut, projection = child(self, "downsample"), None, False
        if downsample is not None:
            parts = projection_parts(downsample)
            if parts is None:
                shortcut = downsample(x)
            elif parts[0] is None:
                projection = True
                pairs.append(parts[1:])
            else:
                pooled, conv, norm = parts[0](x), conv_record(parts[1]), norm_record(parts[2])
                shortcut = ops.run(Call("conv_bn_act", pooled, (conv,), (norm,), relu=False), self.backend)
        convs = tuple([conv_record(conv) for conv, _ in pairs])
        norms = tuple([norm_record(norm) for _, norm in pairs])
        return ops.run(Call(self.op, x, convs, norms, shortcut, projection=projection), self.backend, self.save)

    def unlike_reference(self) -> str:
        """FrozenBatchNorm2d, or a shortcut that would be computed before the convolutions, where the stock block
        computes it after them: the gradients of its input are then summed in another order."""
        downsample = child(self, "downsample")
        parts = None if downsample is None else projection_parts(downsample)
        if downsample is not None and (parts is None or parts[0] is not None):
            return "a shortcut with a layer besides its projection"
        if parts is not None and type(parts[2]) is FrozenBatchNorm2d:
            return "FrozenBatchNorm2d"
        return super().unlike_reference()

    def parts(self, x: Tensor) -> tuple[Call, ...] | None:
        """This block as part of a :class:`~resnet_fast.calls.NetCall`; None if its shortcut is a module of its own or a
        norm counts batches."""
        children = self._modules
        pairs = [(children[conv], children[norm]) for conv, norm in self.layers]
        downsample = child(self, "downsample")
        if downsample is not None:
            shortcut = projection_parts(downsample)
            if shortcut is None or shortcut[0] is not None:
                return None
            pairs.append(shortcut[1:])
        if any([counts(norm) for _, norm in pairs]):
            return None
        convs = tuple([conv_record(conv) for conv, _ in pairs])
        norms = tuple([norm_record(norm) for _, norm in pairs])
        return (Call(self.op, x, convs, norms, projection=downsample is not None),)


def projection_parts(shortcut: Any) -> tuple[nn.Module | None, nn.Module, nn.Module] | None:
    """(what comes before, convolution, norm) of a shortcut that the ops can compute, or None.

    torchvision's is a Sequential of a convolution and a norm; timm may put an average pool or an Identity before them.
    """
    if type(shortcut) is not nn.Sequential or not 2 <= len(shortcut) <= 3 or is_altered(shortcut):
        return None
    *before, conv, norm = shortcut._modules.values()
    if conv_obstacle("downsample", conv) or norm_obstacle("downsample", norm):
        return None
    if not before or (type(before[0]) is nn.Identity and not is_altered(before[0])):
        return None, conv, norm
    return before[0], conv, norm
