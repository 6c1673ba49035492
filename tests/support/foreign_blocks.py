"""Residual blocks in the forms of other libraries, written for the tests, with their mappings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_fast import BlockMapping, Pool


class NormedConv2d(nn.Conv2d):
    """A convolution that runs its own norm and activation, as detectron2's does."""

    def __init__(self, *args: int, norm: nn.Module | None = None, activation: object = None, **kwargs: int) -> None:
        super().__init__(*args, bias=norm is None, **kwargs)
        self.norm, self.activation = norm, activation

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        if self.norm is not None:
            x = self.norm(x)
        return x if self.activation is None else self.activation(x)


class NormInside(nn.Module):
    """A bottleneck whose norms are inside its convolutions, and whose activations are function calls."""

    def __init__(
        self, inside: int, width: int, out: int, stride: int = 1, norm: type[nn.Module] = nn.BatchNorm2d
    ) -> None:
        super().__init__()
        shortcut = NormedConv2d(inside, out, 1, stride=stride, norm=norm(out))
        self.shortcut = shortcut if inside != out or stride > 1 else None
        self.conv1 = NormedConv2d(inside, width, 1, norm=norm(width))
        self.conv2 = NormedConv2d(width, width, 3, stride=stride, padding=1, norm=norm(width))
        self.conv3 = NormedConv2d(width, out, 1, norm=norm(out))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu_(self.conv1(x))
        out = F.relu_(self.conv2(out))
        out = self.conv3(out)
        out += x if self.shortcut is None else self.shortcut(x)
        return F.relu_(out)


NORM_INSIDE = BlockMapping(
    [("conv1", "conv1.norm", F.relu), ("conv2", "conv2.norm", F.relu), ("conv3", "conv3.norm")],
    ("shortcut", "shortcut.norm"),
    F.relu,
)


class NormInsideStem(nn.Module):
    """A stem of one such convolution and a max-pooling that is a function call."""

    def __init__(self, out: int) -> None:
        super().__init__()
        self.conv1 = NormedConv2d(3, out, 7, stride=2, padding=3, norm=nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(F.relu_(self.conv1(x)), kernel_size=3, stride=2, padding=1)


NORM_INSIDE_STEM = BlockMapping([("conv1", "conv1.norm", F.relu), Pool(3, 2, 1)], residual=False)


class Gate(nn.Module):
    """Squeeze-and-excitation without the squeeze: a gate per channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.fc(x.mean((2, 3), keepdim=True)))


class Plain(nn.Module):
    """A basic block with a pooled shortcut where it strides, and with a gate where it is asked for one."""

    def __init__(self, inside: int, out: int, stride: int = 1, gate: bool = False, scale: bool = False) -> None:
        super().__init__()
        self.act, self.scale = nn.ReLU(), scale
        self.body = nn.Sequential(
            nn.Sequential(nn.Conv2d(inside, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()),
            nn.Sequential(nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)),
        )
        self.gate = Gate(out) if gate else None
        pool = [nn.AvgPool2d(2, 2)] if stride == 2 else []
        project = nn.Sequential(*pool, nn.Conv2d(inside, out, 1, bias=False), nn.BatchNorm2d(out))
        self.proj = project if inside != out or stride > 1 else nn.Identity()

    def forward(self, features: Tensor) -> Tensor:
        y = self.body(features)
        if self.gate is not None:
            y = self.gate(y)
        if self.scale:
            y = 0.5 * y
        return self.act(y + self.proj(features))


class Cifar(nn.Module):
    """A basic block as many nets for CIFAR have it: its shortcut is an empty Sequential, or is not there."""

    def __init__(self, inside: int, out: int, keep: bool = True) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inside, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        if keep or inside != out:
            self.skip = nn.Sequential()
        if inside != out:
            self.skip.add_module("-1", nn.AvgPool2d(1))
            self.skip.add_module("0", nn.Conv2d(inside, out, 1, bias=False))
            self.skip.add_module("1", nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (self.skip(x) if hasattr(self, "skip") else x))


CIFAR = BlockMapping([("conv1", "bn1", F.relu), ("conv2", "bn2")], ("skip.-1", "skip.0", "skip.1"), F.relu)

PLAIN = BlockMapping(
    [("body.0.0", "body.0.1", "body.0.2"), ("body.1.0", "body.1.1"), "gate"],
    [("proj.0", "proj.1", "proj.2"), ("proj.0", "proj.1")],
    "act",
)
