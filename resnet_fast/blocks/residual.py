"""The forward of a fused residual block, for any number of convolutions and either library's children."""

from typing import Any

import torch
from torch import Tensor, nn

from .. import invariance, ops
from ..calls import Call
from . import frozen_norms
from .children import child, conv_record, counting_together, counts, norm_record
from .fused import Fused
from .obstacles import conv_obstacle, is_altered, norm_obstacle


class ResidualBlock(Fused):
    """A stock residual block that computes its forward as one op.

    A shortcut of one plain 1x1 convolution and norm becomes part of the op. timm's pooled projection is an op of its
    own after its pooling. Any other shortcut (option A's padded channels, a function) is computed first and added by
    the op.
    """

    # No deferred annotations in this file: torch.fx copies this signature, which must print as the stock block's.
    def forward(self, x: Tensor) -> Tensor:
        return self.stock_forward(x) if torch.jit.is_scripting() else self.fused_forward(x)

    def fused_forward(self, x: Tensor) -> Tensor:
        """Return relu(residual branch + shortcut) from one op call, or run the stock forward and count the reason."""
        if self.runs_stock(x):
            return self.stock_class.forward(self, x)
        layers = self.main_layers()
        downsample, shortcut, projection = child(self, "downsample"), None, False
        if downsample is not None:
            parts = projection_parts(downsample)
            if parts is None:
                shortcut = invariance.singly(downsample, x)
            elif parts[0] is None:
                projection = True
                layers.append(parts[1:])
            else:
                pooled, conv, norm = invariance.singly(parts[0], x), conv_record(parts[1]), norm_record(parts[2])
                shortcut = ops.run(Call("conv_bn_act", pooled, (conv,), (norm,), relu=False), self.backend)
        return ops.run(self.block_call(x, layers, projection, shortcut), self.backend, self.save)

    def main_layers(self) -> list[tuple[Any, Any]]:
        """Return the (convolution, norm) children of the residual branch."""
        modules, found = self._modules, []
        for conv, norm in self.layers:
            found.append((modules[conv], modules[norm]))
        return found

    def parts(self, x: Tensor) -> tuple[Call, ...] | None:
        """Return this block as part of a :class:`~resnet_fast.calls.NetCall`.

        None if its shortcut is a module of its own or one of its norms counts batches.
        """
        layers = self.main_layers()
        downsample = child(self, "downsample")
        if downsample is not None:
            shortcut = projection_parts(downsample)
            if shortcut is None or shortcut[0] is not None:
                return None
            layers.append(shortcut[1:])
        for _, norm in layers:
            if norm.training and counts(norm):
                return None
        return (self.block_call(x, layers, downsample is not None),)

    def block_call(
        self, x: Tensor, layers: list[tuple[Any, Any]], projection: bool, shortcut: Tensor | None = None
    ) -> Call:
        """Return the call of these (convolution, norm) layers, the projection last if there is one."""
        convs, norms = zip(*layers, strict=True)
        with counting_together():
            convs, norms = tuple(map(conv_record, convs)), tuple(map(norm_record, norms))
        return Call(self.op, x, convs, norms, shortcut, projection=projection)

    def op_convs(self) -> list[nn.Module]:
        downsample = child(self, "downsample")
        parts = None if downsample is None else projection_parts(downsample)
        return super().op_convs() + ([] if parts is None else [parts[1]])

    def unlike_reference(self) -> str:
        """Return what the reference rounds in another order than the stock block; empty if nothing.

        That is FrozenBatchNorm2d, or a shortcut that the op computes before the convolutions and the stock block after
        them: the gradients of its input are then summed in another order.
        """
        downsample = child(self, "downsample")
        parts = None if downsample is None else projection_parts(downsample)
        if downsample is not None and (parts is None or parts[0] is not None):
            return "a shortcut with another layer than its projection"
        if parts is not None and frozen_norms.is_frozen(parts[2]):
            return type(parts[2]).__name__
        return super().unlike_reference()


def projection_parts(shortcut: Any) -> tuple[nn.Module | None, nn.Module, nn.Module] | None:
    """Return (what comes before, convolution, norm) of a shortcut that the ops can compute, or None.

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
