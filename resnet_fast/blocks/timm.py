"""timm's blocks and net, fused. Imported only when a timm model is accelerated or unpickled."""

from typing import Any, ClassVar

import torch
from timm.layers import DropBlock2d, DropPath, SelectAdaptivePool2d
from timm.layers.adaptive_avgmax_pool import FastAdaptiveAvgPool
from timm.models import resnet as stock
from timm.models._manipulate import checkpoint_seq
from torch import Tensor, nn

from .. import invariance, ops
from ..calls import Call
from . import head
from .children import child, conv_record, counts, norm_record, sync_group
from .described import IDLE_IN_EVAL, at
from .frozen_norms import is_frozen
from .fused import Fused, StockMethod, runs_for_tracer
from .mapped import fused_class
from .mapping import BlockMapping, LayerPath
from .net import Net
from .obstacles import conv_obstacle, is_altered, norm_obstacle, obstacle
from .residual import ResidualBlock
from .stem import pool_obstacle, pool_record, side

IDLE_IN_EVAL.update((DropBlock2d, DropPath))

_ADDITIONS = ("drop_block", "aa", "se", "drop_path")


class _TimmBlock(ResidualBlock):
    """A block without additions. One with squeeze-and-excitation, blur or dropout gets a class of its own."""

    absent = _ADDITIONS
    mappings: ClassVar[tuple[BlockMapping, BlockMapping]]

    @classmethod
    def class_for(cls, m: nn.Module) -> type[Fused]:
        additions = [child(m, name) for name in _ADDITIONS]
        if all(part is None or type(part) is nn.Identity for part in additions):
            return cls
        plain, with_drop_block = cls.mappings
        drops = additions[0] is not None and type(additions[0]) is not nn.Identity
        return fused_class(cls.stock_class, with_drop_block if drops else plain).class_for(m)


def _mappings(*layers: LayerPath) -> tuple[BlockMapping, BlockMapping]:
    """Return the mappings of a block with these layers: without drop_block, and with it, which keeps ReLU apart."""
    *first, inner, last = layers
    assert isinstance(inner.act, str)
    shortcut = [("downsample.0", "downsample.1", "downsample.2"), ("downsample.0", "downsample.1"), ("downsample",)]
    rest = ["aa", last._replace(act=None), "se", "drop_path"]
    plain = BlockMapping([*first, inner, *rest], shortcut, last.act)
    return plain, BlockMapping([*first, inner._replace(act=None), "drop_block", inner.act, *rest], shortcut, last.act)


_SHALLOW = (("conv1", "bn1", "act1"),)
_DEEP = (("conv1.0", "conv1.1", "conv1.2"), ("conv1.3", "conv1.4", "conv1.5"), ("conv1.6", "bn1", "act1"))
_LAYERS = [LayerPath(f"conv{i}", f"bn{i}", f"act{i}") for i in (1, 2, 3)]


class BasicBlock(_TimmBlock, stock.BasicBlock):
    """timm's BasicBlock with the op ``basic_block`` as its forward."""

    stock_class = stock.BasicBlock
    op = "basic_block"
    layers = (("conv1", "bn1"), ("conv2", "bn2"))
    acts = ("act1", "act2")
    mappings = _mappings(*_LAYERS[:2])


class Bottleneck(_TimmBlock, stock.Bottleneck):
    """timm's Bottleneck with the op ``bottleneck`` as its forward."""

    stock_class = stock.Bottleneck
    op = "bottleneck"
    layers = (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"))
    acts = ("act1", "act2", "act3")
    mappings = _mappings(*_LAYERS)


class ResNet(Net, stock.ResNet):
    """timm's ResNet around fused blocks. A deep stem runs in three pieces, a pooling of another kind by itself."""

    stock_class = stock.ResNet
    acts = ("act1",)
    stock_methods = ("forward", "forward_features")
    inner_methods = frozenset({"forward_features"})
    per_image = Net.per_image | {SelectAdaptivePool2d, FastAdaptiveAvgPool, DropPath}
    stock_forward_features = StockMethod("forward_features")

    def forward(self, x: Tensor) -> Tensor:
        return self.stock_forward(x) if torch.jit.is_scripting() else self.net_forward(x)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.stock_forward_features(x) if torch.jit.is_scripting() else self.fused_features(x)

    def stem_layers(self) -> list[tuple[Any, Any, Any]]:
        """Return the convolutions of the stem with their norms and activations: one, or three in a deep stem."""
        paths = _DEEP if type(child(self, "conv1")) is nn.Sequential else _SHALLOW
        return [tuple([at(self, path.split(".")) for path in layer]) for layer in paths]

    def unfusable(self) -> str:
        conv1 = child(self, "conv1")
        deep = type(conv1) is nn.Sequential
        if deep and (len(conv1) != 7 or is_altered(conv1)):
            return obstacle("conv1 to be a plain Conv2d, or seven plain layers", conv1)
        reason = self.watched.changed()
        for (conv, norm, act), names in zip(self.stem_layers(), _DEEP if deep else _SHALLOW, strict=True):
            reason = reason or conv_obstacle(names[0], conv) or norm_obstacle(names[1], norm)
            if not reason and (type(act) is not nn.ReLU or is_altered(act)):
                reason = obstacle(f"{names[2]} to be a plain ReLU", act)
        return reason

    def op_convs(self) -> list[nn.Module]:
        return [conv for conv, _, _ in self.stem_layers()]

    def op_name(self) -> str:
        return "stem" if len(self.stem_layers()) == 1 and not pool_obstacle(child(self, "maxpool")) else "pieces"

    def sync_obstacle(self, x: Tensor) -> str:
        groups = {sync_group(norm) for _, norm, _ in self.stem_layers()} - {""}
        return self.group_obstacle(groups, x) if groups else ""

    def unlike_reference(self) -> str:
        for _, norm, _ in self.stem_layers():
            if type(norm) is not nn.BatchNorm2d and is_frozen(norm):
                return type(norm).__name__
        return ""

    def stem_forward(self, x: Tensor) -> Tensor:
        if self.runs_stock(x):
            return self.maxpool(self.act1(self.bn1(self.conv1(x))))
        calls = self._stem_calls(x)
        for call in calls:
            x = ops.run(call._replace(x=x), self.backend)
        return x if calls[-1].pool else invariance.singly(self.maxpool, x)

    def stem_parts(self, x: Tensor) -> tuple[Call, ...] | None:
        if any([counts(norm) for _, norm, _ in self.stem_layers()]):
            return None
        calls = self._stem_calls(x)
        return calls if calls[-1].pool else None

    def _stem_calls(self, x: Tensor) -> tuple[Call, ...]:
        """Return the stem as calls, all with the input ``x``. The pooling belongs to the last if it can."""
        pool = child(self, "maxpool")
        *calls, last = [
            Call("conv_bn_act", x, (conv_record(conv),), (norm_record(norm),)) for conv, norm, _ in self.stem_layers()
        ]
        return (*calls, last if pool_obstacle(pool) else last._replace(op="stem", pool=pool_record(pool)))

    def largest_activation(self, h: int, w: int) -> int:
        """Return the elements per image of the largest activation, in the stem or in the first block."""
        convs = [conv for conv, _, _ in self.stem_layers()]
        stride = side(convs[0].stride)
        shrink = side(getattr(self.maxpool, "stride", 1)) ** 2
        blocks = [m.weight.shape[0] for m in self.layer1[0].modules() if isinstance(m, nn.Conv2d)]
        return -(-h // stride) * -(-w // stride) * max(*[c.out_channels for c in convs], max(blocks) // shrink)

    def layers_forward(self, x: Tensor) -> Tensor:
        return head.run(self, self.forward_features(x))

    def head_forward(self, x: Tensor) -> Tensor:
        return self.forward_head(x)

    def fused_features(self, x: Tensor) -> Tensor:
        """Return the feature map after the stem and the stages."""
        if runs_for_tracer(x) or self.watched.changed():
            return stock.ResNet.forward_features(self, x)
        x = self.stem_forward(x)
        stages = [getattr(self, name) for name in self.stages]
        if self.grad_checkpointing:
            return checkpoint_seq(stages, x, flatten=True)
        for stage in stages:
            x = stage(x)
        return x
