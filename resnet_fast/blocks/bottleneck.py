# mypy: disable-error-code="list-item, arg-type, operator, misc, union-attr, index, call-arg"
"""torchvision's Bottleneck with the op ``bottleneck`` as its forward."""

from __future__ import annotations

from typing import List, Optional  # noqa: UP035 (TorchScript reads these)

import torch
from torch import Tensor
from torchvision.models import resnet as stock

from .fused import renamed
from .residual import ResidualBlock


class Bottleneck(ResidualBlock, stock.Bottleneck):
    """relu(bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x)))))))) + shortcut(x)), He et al. 2015, figure 5 right."""

    stock_class = stock.Bottleneck
    op = "bottleneck"
    layers = (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"))

    stock_forward = renamed(stock.Bottleneck.forward, "stock_forward")

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            return self.fused_forward(x)
        # TorchScript compiles the rest only: no helper may take a module, so the lists are spelled out.
        if not self.scripts_fused:
            return self.stock_forward(x)
        if self.bn1.training or self.bn2.training or self.bn3.training:
            return self.stock_forward(x)
        shortcut: Optional[Tensor] = None if self.downsample is None else self.downsample(x)  # noqa: UP045
        biases: List[Optional[Tensor]] = [self.conv1.bias, self.conv2.bias, self.conv3.bias]  # noqa: UP006, UP045
        norms: List[Optional[Tensor]] = [  # noqa: UP006, UP045
            self.bn1.weight, self.bn1.bias, self.bn1.running_mean, self.bn1.running_var,
            self.bn2.weight, self.bn2.bias, self.bn2.running_mean, self.bn2.running_var,
            self.bn3.weight, self.bn3.bias, self.bn3.running_mean, self.bn3.running_var,
        ]  # fmt: skip
        return torch.ops.resnet_fast.bottleneck(
            x,
            [self.conv1.weight, self.conv2.weight, self.conv3.weight],
            biases,
            norms,
            [
                self.conv1.stride[0], self.conv1.stride[1], self.conv1.padding[0], self.conv1.padding[1],
                self.conv1.dilation[0], self.conv1.dilation[1], self.conv1.groups,
                self.conv2.stride[0], self.conv2.stride[1], self.conv2.padding[0], self.conv2.padding[1],
                self.conv2.dilation[0], self.conv2.dilation[1], self.conv2.groups,
                self.conv3.stride[0], self.conv3.stride[1], self.conv3.padding[0], self.conv3.padding[1],
                self.conv3.dilation[0], self.conv3.dilation[1], self.conv3.groups,
            ],
            [False, False, False],
            [0.0, 0.0, 0.0],
            [self.bn1.eps, self.bn2.eps, self.bn3.eps],
            shortcut,
        )  # fmt: skip
