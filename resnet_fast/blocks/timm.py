"""timm's blocks and net, fused. Imported only when a timm model is accelerated or unpickled."""

import torch
from timm.layers import DropPath, SelectAdaptivePool2d
from timm.layers.adaptive_avgmax_pool import FastAdaptiveAvgPool
from timm.models import resnet as stock
from timm.models._manipulate import checkpoint_seq
from torch import Tensor, nn

from .children import child
from .fused import StockMethod
from .net import Net
from .obstacles import is_altered, obstacle, untraceable
from .residual import ResidualBlock

_ADDITIONS = ("drop_block", "aa", "se")


class _TimmBlock(ResidualBlock):
    absent = _ADDITIONS

    def unfusable(self) -> str:
        drop = child(self, "drop_path")
        if drop is not None and (type(drop) not in (nn.Identity, DropPath) or is_altered(drop)):
            return obstacle("drop_path to be absent or DropPath", drop)
        if self.training and type(drop) is DropPath:
            return obstacle("drop_path to be absent in training", drop)
        return super().unfusable()


class BasicBlock(_TimmBlock, stock.BasicBlock):
    """timm's BasicBlock with the op ``basic_block`` as its forward."""

    stock_class = stock.BasicBlock
    op = "basic_block"
    layers = (("conv1", "bn1"), ("conv2", "bn2"))
    acts = ("act1", "act2")


class Bottleneck(_TimmBlock, stock.Bottleneck):
    """timm's Bottleneck with the op ``bottleneck`` as its forward."""

    stock_class = stock.Bottleneck
    op = "bottleneck"
    layers = (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"))
    acts = ("act1", "act2", "act3")


class ResNet(Net, stock.ResNet):
    """timm's ResNet around fused blocks. Deep stems and replaced poolings run unfused."""

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

    def layers_forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def head_forward(self, x: Tensor) -> Tensor:
        return self.forward_head(x)

    def fused_features(self, x: Tensor) -> Tensor:
        """Return the feature map after the stem and the stages."""
        if untraceable(x) or self.watched.changed():
            return stock.ResNet.forward_features(self, x)
        x = self.stem_forward(x)
        stages = [getattr(self, name) for name in self.stages]
        if self.grad_checkpointing:
            return checkpoint_seq(stages, x, flatten=True)
        for stage in stages:
            x = stage(x)
        return x
