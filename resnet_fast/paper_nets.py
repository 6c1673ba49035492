"""The nets of He et al., "Deep residual learning for image recognition" (2015), that torchvision does not have.

Stock torch modules with torchvision's names and initialisation (He et al., "Delving deep into rectifiers": normal
with variance 2/fan_out; biases belong to the norm). They edit torchvision's nets instead of repeating their code.
Depths and widths come from :data:`resnet_fast.tuning.shapes.ARCHS`, so table and module cannot differ.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet, conv1x1, conv3x3

from .errors import UserError
from .tuning import shapes

Norm = Callable[..., nn.Module]


class PadShortcut(nn.Module):
    """Shortcut option A of section 3.3: every ``stride``-th pixel, and zeros appended up to ``co`` channels.

    It has no parameters.

    Args:
        stride: step between the pixels that are kept.
        ci: channels of the input (N, ci, H, W).
        co: channels of the output (N, co, ceil(H/stride), ceil(W/stride)), which has the input's dtype.

    Raises:
        UserError: ``co`` is less than ``ci``.
    """

    def __init__(self, stride: int, ci: int, co: int):
        super().__init__()
        if co < ci:
            raise UserError("at least as many output as input channels", f"{ci} -> {co}", "use a projection instead")
        self.stride, self.ci, self.co = stride, ci, co

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.co - self.ci))

    def extra_repr(self) -> str:
        return f"{self.ci} -> {self.co}, stride={self.stride}"


class PlainBlock(nn.Module):
    """Two 3x3 convolutions as in a basic block, without the shortcut: relu(bn2(conv2(relu(bn1(conv1(x)))))).

    The arguments are those of torchvision's blocks, so that its ``ResNet`` can build plain nets. ``downsample`` is
    ignored.

    Raises:
        UserError: ``groups``, ``base_width`` or ``dilation`` is not the default.
    """

    expansion: int = 1

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Norm | None = None,
    ):
        super().__init__()
        if groups != 1 or base_width != 64 or dilation != 1:
            got = f"groups={groups}, base_width={base_width}, dilation={dilation}"
            raise UserError("a plain block with groups=1, base_width=64, dilation=1", got, "use a bottleneck net")
        norm_layer = norm_layer or nn.BatchNorm2d
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.bn1 = norm_layer(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = norm_layer(planes)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)))


def _init(module: nn.Module) -> None:
    """Initialise the convolutions of ``module`` as torchvision does."""
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")


class CifarResNet(nn.Module):
    """Section 4.2's net for (N, 3, 32, 32) images: 3x3 conv, three stages of n blocks with 16, 32, 64 channels, fc.

    Any image size works. The output is (N, num_classes).

    Args:
        block: torchvision's ``BasicBlock`` or :class:`PlainBlock`.
        n: blocks per stage, for 6n+2 weighted layers.
        num_classes: outputs of the last layer.
        norm_layer: builds a norm from its number of channels; by default BatchNorm2d.
    """

    def __init__(self, block: type[nn.Module], n: int, num_classes: int = 10, norm_layer: Norm | None = None):
        super().__init__()
        norm_layer = norm_layer or nn.BatchNorm2d
        self.conv1 = conv3x3(3, 16)
        self.bn1 = norm_layer(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = self._stage(block, n, 16, 16, 1, norm_layer)
        self.layer2 = self._stage(block, n, 16, 32, 2, norm_layer)
        self.layer3 = self._stage(block, n, 32, 64, 2, norm_layer)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(64, num_classes)
        _init(self)

    @staticmethod
    def _stage(block: type[nn.Module], n: int, ci: int, co: int, stride: int, norm_layer: Norm) -> nn.Sequential:
        first = block(ci, co, stride, PadShortcut(stride, ci, co) if ci != co else None, norm_layer=norm_layer)
        return nn.Sequential(first, *(block(co, co, norm_layer=norm_layer) for _ in range(n - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def _blocks(model: nn.Module) -> list[Any]:
    """Return the residual blocks of ``model``; Any, because torch types every child as Tensor or Module."""
    return [m for m in model.modules() if isinstance(m, BasicBlock | Bottleneck)]


def _set_shortcuts(model: nn.Module, shortcut: str, norm_layer: Norm) -> None:
    """Give every block of ``model`` the shortcut of option A, B or C, in place."""
    for block in _blocks(model):
        last = block.conv3 if isinstance(block, Bottleneck) else block.conv2
        ci, co, stride = block.conv1.in_channels, last.out_channels, block.stride
        changes = stride != 1 or ci != co
        if shortcut == "C" or (shortcut == "B" and changes):
            if not isinstance(block.downsample, nn.Sequential):
                block.downsample = nn.Sequential(conv1x1(ci, co, stride), norm_layer(co))
                _init(block.downsample)
        else:
            block.downsample = PadShortcut(stride, ci, co) if changes else None


def imagenet_resnet(name: str, *, shortcut: str = "B", stride_in_1x1: bool = True, **kwargs: Any) -> nn.Module:
    """Build one of torchvision's ten ResNets as in the paper: the stride of a bottleneck is on its first 1x1 (v1).

    Args:
        name: such as ``resnet50``.
        shortcut: A, B or C of section 3.3. In Table 2 the nets with 18 and 34 layers use A, deeper ones B.
        stride_in_1x1: whether to move the stride; False keeps torchvision's position.
        **kwargs: passed to torchvision's builder.

    Raises:
        UserError: ``name`` or ``shortcut`` is unknown.
    """
    from torchvision import models

    if shapes.arch(name).stem != "imagenet" or shapes.arch(name).shortcut is None:
        raise UserError("the name of a torchvision ResNet", repr(name), "such as resnet50")
    shapes.check_variant(name, shortcut)
    model = getattr(models, name)(**kwargs)
    if shortcut != "B":
        _set_shortcuts(model, shortcut, model._norm_layer)
    if stride_in_1x1:
        for block in _blocks(model):
            if isinstance(block, Bottleneck):
                block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride
    return model


def plain18(**kwargs: Any) -> nn.Module:
    """Table 1's 18 layers without shortcuts, for ImageNet. ``kwargs``: torchvision's ``ResNet`` arguments."""
    return ResNet(PlainBlock, list(shapes.arch("plain18").depths), **kwargs)


def plain34(**kwargs: Any) -> nn.Module:
    """Table 1's 34 layers without shortcuts (Figure 3, middle). ``kwargs``: torchvision's ``ResNet`` arguments."""
    return ResNet(PlainBlock, list(shapes.arch("plain34").depths), **kwargs)


def _cifar_resnet(name: str, shortcut: str, num_classes: int, norm_layer: Norm | None) -> CifarResNet:
    shapes.check_variant(name, shortcut)
    model = CifarResNet(BasicBlock, shapes.arch(name).depths[0], num_classes, norm_layer)
    if shortcut != "A":
        _set_shortcuts(model, shortcut, norm_layer or nn.BatchNorm2d)
    return model


def cifar_resnet20(*, shortcut: str = "A", num_classes: int = 10, norm_layer: Norm | None = None) -> CifarResNet:
    """Section 4.2, n = 3. 0.27 M parameters (Table 6)."""
    return _cifar_resnet("cifar_resnet20", shortcut, num_classes, norm_layer)


def cifar_resnet32(*, shortcut: str = "A", num_classes: int = 10, norm_layer: Norm | None = None) -> CifarResNet:
    """Section 4.2, n = 5. 0.46 M parameters (Table 6)."""
    return _cifar_resnet("cifar_resnet32", shortcut, num_classes, norm_layer)


def cifar_resnet44(*, shortcut: str = "A", num_classes: int = 10, norm_layer: Norm | None = None) -> CifarResNet:
    """Section 4.2, n = 7. 0.66 M parameters (Table 6)."""
    return _cifar_resnet("cifar_resnet44", shortcut, num_classes, norm_layer)


def cifar_resnet56(*, shortcut: str = "A", num_classes: int = 10, norm_layer: Norm | None = None) -> CifarResNet:
    """Section 4.2, n = 9. 0.85 M parameters (Table 6)."""
    return _cifar_resnet("cifar_resnet56", shortcut, num_classes, norm_layer)


def cifar_resnet110(*, shortcut: str = "A", num_classes: int = 10, norm_layer: Norm | None = None) -> CifarResNet:
    """Section 4.2, n = 18. 1.7 M parameters (Table 6). The paper warms it up with a smaller learning rate."""
    return _cifar_resnet("cifar_resnet110", shortcut, num_classes, norm_layer)


def cifar_resnet1202(*, shortcut: str = "A", num_classes: int = 10, norm_layer: Norm | None = None) -> CifarResNet:
    """Section 4.2, n = 200. 19.4 M parameters (Table 6)."""
    return _cifar_resnet("cifar_resnet1202", shortcut, num_classes, norm_layer)


def _cifar_plain(name: str, num_classes: int, norm_layer: Norm | None) -> CifarResNet:
    return CifarResNet(PlainBlock, shapes.arch(name).depths[0], num_classes, norm_layer)


def cifar_plain20(*, num_classes: int = 10, norm_layer: Norm | None = None) -> CifarResNet:
    """:func:`cifar_resnet20` without shortcuts (Figure 6, left)."""
    return _cifar_plain("cifar_plain20", num_classes, norm_layer)


def cifar_plain32(*, num_classes: int = 10, norm_layer: Norm | None = None) -> CifarResNet:
    """:func:`cifar_resnet32` without shortcuts (Figure 6, left)."""
    return _cifar_plain("cifar_plain32", num_classes, norm_layer)


def cifar_plain44(*, num_classes: int = 10, norm_layer: Norm | None = None) -> CifarResNet:
    """:func:`cifar_resnet44` without shortcuts (Figure 6, left)."""
    return _cifar_plain("cifar_plain44", num_classes, norm_layer)


def cifar_plain56(*, num_classes: int = 10, norm_layer: Norm | None = None) -> CifarResNet:
    """:func:`cifar_resnet56` without shortcuts (Figure 6, left)."""
    return _cifar_plain("cifar_plain56", num_classes, norm_layer)


def cifar_plain110(*, num_classes: int = 10, norm_layer: Norm | None = None) -> CifarResNet:
    """:func:`cifar_resnet110` without shortcuts; the paper reports over 60 % error for it (section 4.2)."""
    return _cifar_plain("cifar_plain110", num_classes, norm_layer)
