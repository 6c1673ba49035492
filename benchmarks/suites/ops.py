"""Single fused convolutions, one of each shape that a net has, on the activations that reach them inside it.

A case is conv + BN, and ReLU where the net has one before the next convolution. The last convolution of a block adds
the shortcut first; that sum belongs to the ``blocks`` suite, here the case ends at the BN.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

import resnet_fast.ops  # noqa: F401 (defines torch.ops.resnet_fast)

from .case import SuiteCase, capture


class ConvBnAct(nn.Module):
    """``act(bn(conv(x)))`` in stock layers, (N, Ci, H, W) -> (N, Co, Ho, Wo); ``accelerated()`` gives the fused op."""

    def __init__(self, conv: nn.Module, bn: nn.Module, relu: bool):
        super().__init__()
        self.conv, self.bn = conv, bn
        self.act: nn.Module = nn.ReLU() if relu else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))

    def accelerated(self) -> nn.Module:
        """Return the same layers as one call of ``torch.ops.resnet_fast.conv_bn_act``."""
        return _FusedConvBnAct(self)


class _FusedConvBnAct(nn.Module):
    def __init__(self, stock: ConvBnAct):
        super().__init__()
        self.conv, self.bn = stock.conv, stock.bn
        self.relu = isinstance(stock.act, nn.ReLU)

    def forward(self, x: Tensor) -> Tensor:
        c: Any = self.conv
        n: Any = self.bn
        return torch.ops.resnet_fast.conv_bn_act(
            x, c.weight, c.bias, c.stride, c.padding, c.dilation, c.groups,
            n.weight, n.bias, n.running_mean, n.running_var, False, 0.0, n.eps, self.relu,
        )  # fmt: skip


def convolutions(model: nn.Module) -> dict[str, ConvBnAct]:
    """Return each convolution of a torchvision-style net with its BN, by the convolution's qualified name."""
    modules = dict(model.named_modules())
    found: dict[str, ConvBnAct] = {}
    for name, conv in modules.items():
        if not isinstance(conv, nn.Conv2d):
            continue
        parent, _, child = name.rpartition(".")
        prefix = f"{parent}." if parent else ""
        if child.startswith("conv"):
            number = int(child.removeprefix("conv"))
            bn = modules.get(f"{prefix}bn{number}")
            relu = f"{prefix}conv{number + 1}" in modules or not parent  # the stem has no second convolution
        else:  # downsample.0, downsample.1
            bn, relu = modules.get(f"{prefix}1"), False
        if isinstance(bn, nn.BatchNorm2d):
            found[name] = ConvBnAct(copy.deepcopy(conv), copy.deepcopy(bn), relu).eval()
    return found


def _kind(case: ConvBnAct, x: Tensor) -> tuple[Any, ...]:
    conv: Any = case.conv
    geometry = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
    return (x.shape, conv.out_channels, *geometry, type(case.act))


def cases(name: str, model: nn.Module, x: Tensor) -> list[SuiteCase]:
    """Return one case per shape, named ``<net>.<first convolution of that shape>``."""
    found = convolutions(model)
    modules = dict(model.named_modules())
    inputs = capture(model, x, {inner: modules[inner] for inner in found})
    kinds: dict[tuple[Any, ...], SuiteCase] = {}
    for inner, op in found.items():
        kinds.setdefault(_kind(op, inputs[inner]), SuiteCase(f"{name}.{inner}", op, inputs[inner]))
    return list(kinds.values())
