"""Nets small enough to train in Triton's interpreter, a training step of them, and its error budget."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet, conv3x3
from torchvision.ops.misc import FrozenBatchNorm2d

import resnet_fast
from resnet_fast import numerics
from resnet_fast.backends.triton.launch import INTERPRETED
from resnet_fast.devices import Device, Gpu
from resnet_fast.paper_nets import CifarResNet
from resnet_fast.spec import ConvSpec, LaunchSpec
from resnet_fast.tuning import launch_plan, training_configs
from resnet_fast.tuning.configs import Config
from resnet_fast.tuning.launch_plan import TrainingConfigs
from resnet_fast.tuning.tables import Table
from tests.support.nets import assert_equal

CLASSES = 5
WIDE = torch.float64


def _untidy(net: nn.Module) -> nn.Module:
    """Set norms as after some training: gamma of both signs, running means away from zero."""
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, -0.5, 1.5)
            nn.init.normal_(m.bias, 0, 0.3)
            nn.init.normal_(m.running_mean, 0, 0.3)
            nn.init.uniform_(m.running_var, 0.5, 2)
    return net.to(memory_format=torch.channels_last).train()


def imagenet(block: type[BasicBlock | Bottleneck]) -> ResNet:
    """Return torchvision's ResNet cut down to the stem and two stages of one block; the second stage strides."""
    net = ResNet(block, [1, 1, 1, 1])
    net.inplanes = 8
    net.conv1, net.bn1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8)
    planes = 8 // block.expansion * 2
    net.layer1, net.layer2 = net._make_layer(block, planes, 1), net._make_layer(block, planes, 1, stride=2)
    net.layer3 = net.layer4 = nn.Sequential()
    net.fc = nn.Linear(planes * block.expansion, CLASSES)
    return _untidy(net)  # type: ignore[return-value]


def freeze_norms(net: Any, kind: str | type[nn.Module]) -> Any:
    """Put every norm of ``net`` in eval mode, or replace it with a frozen one, and return the net.

    Args:
        net: a module with BatchNorm2d layers.
        kind: ``eval mode``, ``FrozenBatchNorm2d`` of torchvision, or a class with its buffers.
    """
    for name, child in net.named_children():
        if not isinstance(child, nn.BatchNorm2d):
            freeze_norms(child, kind)
        elif kind == "eval mode":
            child.eval()
        else:
            norm = FrozenBatchNorm2d(child.num_features) if isinstance(kind, str) else kind(child.num_features)
            norm.load_state_dict({n: t for n, t in child.state_dict().items() if "tracked" not in n})
            setattr(net, name, norm)
    return net


def cifar(channels: int = 3, classes: int = CLASSES, blocks: int = 1) -> CifarResNet:
    """Return the paper's CIFAR net with two stages of 8 and 16 channels: an identity and a padded shortcut."""
    net = CifarResNet(BasicBlock, 1, classes)
    net.conv1, net.bn1 = conv3x3(channels, 8), nn.BatchNorm2d(8)
    net.layer1 = net._stage(BasicBlock, blocks, 8, 8, 1, nn.BatchNorm2d)
    net.layer2 = net._stage(BasicBlock, blocks, 8, 16, 2, nn.BatchNorm2d)
    net.layer3, net.fc = nn.Sequential(), nn.Linear(16, classes)
    return _untidy(net)  # type: ignore[return-value]


def build(kind: str) -> nn.Module:
    """Build ``basic`` or ``bottleneck`` (ImageNet's stem and blocks) or ``cifar``."""
    blocks = {"basic": BasicBlock, "bottleneck": Bottleneck}
    return imagenet(blocks[kind]) if kind in blocks else cifar()


def shipped(one: LaunchSpec, gpu: Gpu, packed: bool) -> Config:
    """Return the shipped config with the fewest steps in the interpreter."""
    rows, columns, products, _ = training_configs.gemm(one)
    return min(
        training_configs.candidates(one, gpu, packed),
        key=lambda c: (
            -(-rows // c.block_m) * -(-columns // c.block_n) * -(-products // c.block_k),
            c.block_m * c.block_n,
        ),
    )


def whole(one: LaunchSpec, gpu: Gpu, packed: bool) -> Config:
    """Return a tile as large as the launch, up to 256 x 64 x 256: the interpreter's time goes by operations, not by
    elements. That is too large for a GPU, so compiled kernels get a shipped config."""
    if not INTERPRETED:
        return shipped(one, gpu, packed)
    rows, columns, products, _ = training_configs.gemm(one)
    sizes = (min(most, max(16, 1 << (n - 1).bit_length())) for most, n in ((256, rows), (64, columns), (256, products)))
    return Config(one.kernel, *sizes, packed=packed and bool(training_configs.packs(one)))


@contextmanager
def fewest_programs(tile: Callable[[LaunchSpec, Gpu, bool], Config] = shipped) -> Iterator[None]:
    """Make every convolution take the configs that ``tile`` picks."""
    from resnet_fast.backends.triton.training import chain

    def plan(
        conv: ConvSpec, prologue: bool, device: Device, table: Table, packed: bool, hopeful: bool
    ) -> TrainingConfigs:
        assert device.gpu is not None
        launches = (training_configs.training_launch(kernel, conv, prologue) for kernel in training_configs.KERNELS)
        return TrainingConfigs(*(tile(one, device.gpu, packed) for one in launches))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch_plan, "plan_training", plan)
        chain._plans.clear()
        yield
    chain._plans.clear()


def twin(net: nn.Module, save: str = "raw") -> nn.Module:
    """Return a copy of ``net`` that trains on our kernels."""
    return resnet_fast.accelerate(copy.deepcopy(net), backend="triton", save=save)


def images(n: int = 2, h: int = 8, w: int = 7, channels: int = 3) -> tuple[Tensor, Tensor]:
    """Return a batch (n, channels, h, w) and its labels."""
    return torch.randn(n, channels, h, w), torch.arange(n) % CLASSES


def loss_of(out: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(out.to(out.dtype if out.dtype == WIDE else torch.float32), labels)


def step(model: nn.Module, x: Tensor, labels: Tensor, dtype: torch.dtype = torch.float32) -> dict[str, Tensor | None]:
    """Run forward and backward, in autocast to a 16-bit ``dtype``; return output, gradients and buffers."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype, enabled=dtype.itemsize == 2):
        out = model(x)
    loss_of(out, labels).backward()
    found: dict[str, Tensor | None] = {"out": out.detach(), "gradient of x": x.grad}
    found |= {f"gradient of {n}": None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    return found | {n: b.clone() for n, b in model.named_buffers()}


def exact_step(net: nn.Module, x: Tensor, labels: Tensor) -> dict[str, Tensor | None]:
    """Run the same step in float64."""
    return step(copy.deepcopy(net).double(), x.double(), labels, WIDE)


def all_gradients(got: dict[str, Any], eager: dict[str, Any], exact: dict[str, Any]) -> numerics.ErrorReport:
    """Return the error over all gradients of a step together."""
    grads = [n for n, t in exact.items() if n.startswith("gradient") and t is not None]
    return numerics.compare(*(torch.cat([f[n].double().flatten() for n in grads]) for f in (got, exact, eager)))


def assert_within_budget(
    got: dict[str, Any], eager: dict[str, Any], exact: dict[str, Any], dtype: torch.dtype = torch.float32
) -> None:
    """Assert that every tensor of a step is within twice eager's error to float64.

    A ReLU that rounding flips makes a gradient jump, in ours or in eager's: eager's error over all gradients together
    is granted to each of them.
    """
    overall, granted = all_gradients(got, eager, exact), numerics.floor(dtype, 4608)
    assert overall.rel <= 2 * overall.eager_rel + granted, f"all gradients: {overall}"  # type: ignore[operator]
    assert_values_within_budget(got, eager, exact, dtype, overall.eager_rel)


def assert_values_within_budget(
    got: dict[str, Any],
    eager: dict[str, Any],
    exact: dict[str, Any],
    dtype: torch.dtype,
    gradients: float | None = None,
) -> None:
    """Assert output, buffers and gradients within twice eager's error, ``gradients`` granted; with None they may be
    anything finite."""
    granted = numerics.floor(dtype, 4608)
    assert list(got) == list(eager) == list(exact)
    for name, want in exact.items():
        if want is None or not want.is_floating_point():
            assert_equal(got[name], eager[name])
            continue
        report, is_gradient = numerics.compare(got[name], want.double(), eager[name]), name.startswith("gradient")
        assert not report.mismatched, f"{name}: {report}"
        if is_gradient and gradients is None:
            continue
        own = max(report.eager_rel, gradients if is_gradient else 0.0)  # type: ignore[type-var]
        assert report.rel <= 2 * own + 4 * granted, f"{name}: {report}"  # type: ignore[operator]


def check_step(net: nn.Module, x: Tensor, labels: Tensor, dtype: torch.dtype = torch.float32, save: str = "raw") -> Any:
    """Assert that a training step of ``net`` on our kernels is within the budget; return the accelerated net."""
    fused = twin(net, save)
    got, exact, eager = (
        step(fused, x, labels, dtype),
        exact_step(net, x, labels),
        step(copy.deepcopy(net), x, labels, dtype),
    )
    assert_within_budget(got, eager, exact, dtype)
    return fused


def calls() -> dict[str, int]:
    """Return calls since ``resnet_fast.reset_stats()``, by op and backend."""
    found: dict[str, int] = resnet_fast.stats()["calls"]
    return found
