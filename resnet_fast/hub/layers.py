"""The layers that ``kernels`` puts into models: the residual blocks of torchvision and transformers.

Each is pure, as the library asks: no constructor, no state, no method but ``forward``. It works with the children of
the module that it is put into, named in its annotations, and with whatever weights and modes they have at the call.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..blocks import transformers
from ..blocks.mapping import BlockMapping
from .forward import run

__all__ = ["BasicBlock", "Bottleneck", "ResNetBasicLayer", "ResNetBottleNeckLayer", "ResNetEmbeddings"]

_SHORTCUTS = [("downsample.0", "downsample.1"), ("downsample",)]
_BASIC = BlockMapping([("conv1", "bn1", "relu"), ("conv2", "bn2")], _SHORTCUTS, "relu")
_BOTTLENECK = BlockMapping(
    [("conv1", "bn1", "relu"), ("conv2", "bn2", "relu"), ("conv3", "bn3")], _SHORTCUTS, "relu"
)  # fmt: skip

_RESNET, _RT_DETR = transformers.LIBRARIES


class BasicBlock(nn.Module):
    """relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x)), for ``torchvision.models.resnet.BasicBlock``."""

    has_backward = True
    can_torch_compile = True

    conv1: nn.Conv2d
    bn1: nn.Module
    relu: nn.ReLU
    conv2: nn.Conv2d
    bn2: nn.Module
    downsample: nn.Sequential | None

    def forward(self, x: Tensor) -> Tensor:
        return run(self, x, _BASIC, ("torchvision.models.resnet.BasicBlock",))


class Bottleneck(nn.Module):
    """A 1x1, a 3x3 and a 1x1 convolution with their norms, for ``torchvision.models.resnet.Bottleneck``."""

    has_backward = True
    can_torch_compile = True

    conv1: nn.Conv2d
    bn1: nn.Module
    conv2: nn.Conv2d
    bn2: nn.Module
    conv3: nn.Conv2d
    bn3: nn.Module
    relu: nn.ReLU
    downsample: nn.Sequential | None

    def forward(self, x: Tensor) -> Tensor:
        return run(self, x, _BOTTLENECK, ("torchvision.models.resnet.Bottleneck",))


class ResNetBasicLayer(nn.Module):
    """For the class of this name in transformers, and for its ``RTDetrResNetBasicLayer``."""

    has_backward = True
    can_torch_compile = True

    layer: nn.Sequential
    shortcut: nn.Module
    activation: nn.ReLU

    def forward(self, hidden_state: Tensor) -> Tensor:
        names = (f"{_RESNET}.ResNetBasicLayer", f"{_RT_DETR}.RTDetrResNetBasicLayer")
        return run(self, hidden_state, transformers.BASIC, names)


class ResNetBottleNeckLayer(nn.Module):
    """For the class of this name in transformers, and for its ``RTDetrResNetBottleNeckLayer``."""

    has_backward = True
    can_torch_compile = True

    layer: nn.Sequential
    shortcut: nn.Module
    activation: nn.ReLU

    def forward(self, hidden_state: Tensor) -> Tensor:
        names = (f"{_RESNET}.ResNetBottleNeckLayer", f"{_RT_DETR}.RTDetrResNetBottleNeckLayer")
        return run(self, hidden_state, transformers.BOTTLENECK, names)


class ResNetEmbeddings(nn.Module):
    """The stem of transformers' ``ResNetEmbeddings``: a convolution with its norm and ReLU, then max-pooling."""

    has_backward = True
    can_torch_compile = True

    embedder: nn.Module
    pooler: nn.MaxPool2d

    def forward(self, pixel_values: Tensor) -> Tensor:
        return run(self, pixel_values, transformers.STEM, (f"{_RESNET}.ResNetEmbeddings",))
