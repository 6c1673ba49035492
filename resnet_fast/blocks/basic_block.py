"""torchvision's BasicBlock with the op ``basic_block`` as its forward."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor
from torchvision.models import resnet as stock

from .residual import ResidualBlock


class BasicBlock(ResidualBlock, stock.BasicBlock):
    """relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x)), He et al. 2015, figure 5 left."""

    stock_class = stock.BasicBlock
    op = "basic_block"
    layers = (("conv1", "bn1"), ("conv2", "bn2"))

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            return self.fused_forward(x)
        # TorchScript compiles the rest only: no helper may take a module, so the lists are spelled out.
        if self.bn1.training or self.bn2.training:
            y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
            y += x if self.downsample is None else self.downsample(x)
            return self.relu(y)
        shortcut: Optional[Tensor] = None if self.downsample is None else self.downsample(x)  # noqa: UP045
        b1, b2, c1, c2 = self.bn1, self.bn2, self.conv1, self.conv2
        return torch.ops.resnet_fast.basic_block(
            x,
            [c1.weight, c2.weight],
            [c1.bias, c2.bias],
            [b1.weight, b1.bias, b1.running_mean, b1.running_var, b2.weight, b2.bias, b2.running_mean, b2.running_var],
            [c1.stride[0], c1.stride[1], c1.padding[0], c1.padding[1], c1.dilation[0], c1.dilation[1], c1.groups,
             c2.stride[0], c2.stride[1], c2.padding[0], c2.padding[1], c2.dilation[0], c2.dilation[1], c2.groups],
            [False, False],
            [0.0, 0.0],
            [b1.eps, b2.eps],
            shortcut,
        )  # fmt: skip
