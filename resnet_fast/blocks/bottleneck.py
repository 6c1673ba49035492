"""torchvision's Bottleneck with the op ``bottleneck`` as its forward."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor
from torchvision.models import resnet as stock

from .residual import ResidualBlock


class Bottleneck(ResidualBlock, stock.Bottleneck):
    """relu(bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x)))))))) + shortcut(x)), He et al. 2015, figure 5 right."""

    stock_class = stock.Bottleneck
    op = "bottleneck"
    layers = (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"))

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            return self.fused_forward(x)
        # TorchScript compiles the rest only: no helper may take a module, so the lists are spelled out.
        if self.bn1.training or self.bn2.training or self.bn3.training:
            y = self.relu(self.bn1(self.conv1(x)))
            y = self.bn3(self.conv3(self.relu(self.bn2(self.conv2(y)))))
            y += x if self.downsample is None else self.downsample(x)
            return self.relu(y)
        shortcut: Optional[Tensor] = None if self.downsample is None else self.downsample(x)  # noqa: UP045
        b1, b2, b3 = self.bn1, self.bn2, self.bn3
        c1, c2, c3 = self.conv1, self.conv2, self.conv3
        return torch.ops.resnet_fast.bottleneck(
            x,
            [c1.weight, c2.weight, c3.weight],
            [c1.bias, c2.bias, c3.bias],
            [b1.weight, b1.bias, b1.running_mean, b1.running_var, b2.weight, b2.bias, b2.running_mean, b2.running_var,
             b3.weight, b3.bias, b3.running_mean, b3.running_var],
            [c1.stride[0], c1.stride[1], c1.padding[0], c1.padding[1], c1.dilation[0], c1.dilation[1], c1.groups,
             c2.stride[0], c2.stride[1], c2.padding[0], c2.padding[1], c2.dilation[0], c2.dilation[1], c2.groups,
             c3.stride[0], c3.stride[1], c3.padding[0], c3.padding[1], c3.dilation[0], c3.dilation[1], c3.groups],
            [False, False, False],
            [0.0, 0.0, 0.0],
            [b1.eps, b2.eps, b3.eps],
            shortcut,
        )  # fmt: skip
