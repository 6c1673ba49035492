"""timm's blocks and net, fused. Imported only when a timm model is accelerated or unpickled."""

from __future__ import annotations

import torch
from timm.models import resnet as stock
from timm.models._manipulate import checkpoint_seq
from torch import Tensor, nn

from .residual import ResidualBlock
from .stem import Net

_ADDITIONS = ("drop_block", "aa", "se")


class _TimmBlock(ResidualBlock):
    absent = _ADDITIONS

    def unfusable(self) -> str:
        drop = self.drop_path
        if self.training and drop is not None and type(drop) is not nn.Identity:
            return f"expected drop_path to be absent in training, got {type(drop).__name__}; it runs unfused"
        return super().unfusable()

    def __prepare_scriptable__(self) -> nn.Module:
        """TorchScript compiles the stock block: timm's optional children differ from instance to instance."""
        return _stock_copy(self)


class BasicBlock(_TimmBlock, stock.BasicBlock):
    """timm's BasicBlock with the op ``basic_block`` as its forward."""

    stock_class = stock.BasicBlock
    op = "basic_block"
    layers = (("conv1", "bn1"), ("conv2", "bn2"))
    acts = ("act1", "act2")

    def forward(self, x: Tensor) -> Tensor:
        return self.fused_forward(x)


class Bottleneck(_TimmBlock, stock.Bottleneck):
    """timm's Bottleneck with the op ``bottleneck`` as its forward."""

    stock_class = stock.Bottleneck
    op = "bottleneck"
    layers = (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"))
    acts = ("act1", "act2", "act3")

    def forward(self, x: Tensor) -> Tensor:
        return self.fused_forward(x)


class ResNet(Net, stock.ResNet):
    """timm's ResNet around fused blocks; its deep stems and replaced poolings run unfused."""

    stock_class = stock.ResNet
    acts = ("act1",)

    def forward(self, x: Tensor) -> Tensor:
        return self.net_forward(x, lambda part: self.forward_head(self.forward_features(part)))

    def forward_features(self, x: Tensor) -> Tensor:
        if isinstance(x, torch.fx.Proxy):
            return stock.ResNet.forward_features(self, x)
        x = self.stem_forward(x)
        stages = [getattr(self, name) for name in self.stages]
        if self.grad_checkpointing:
            return checkpoint_seq(stages, x, flatten=True)
        for stage in stages:
            x = stage(x)
        return x

    def __prepare_scriptable__(self) -> nn.Module:
        return _stock_copy(self)


def _stock_copy(module: ResidualBlock | Net) -> nn.Module:
    """A shallow copy of stock class that shares parameters and children."""
    copy = module.stock_class.__new__(module.stock_class)
    copy.__dict__.update(module.__dict__)
    return copy
