"""Shortcuts: which kinds become part of the block's op, and that each is computed right."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

import resnet_fast
from resnet_fast.blocks.residual import projection_parts
from resnet_fast.paper_nets import PadShortcut


def hooked(m: nn.Module) -> nn.Module:
    m.register_forward_hook(lambda *args: None)
    return m


def projection() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(16, 64, 1, stride=2, bias=False), nn.BatchNorm2d(64))


SHORTCUTS: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "projection": (projection, True),
    "with bias": (lambda: nn.Sequential(nn.Conv2d(16, 64, 1, stride=2), nn.BatchNorm2d(64)), True),
    "3x3": (lambda: nn.Sequential(nn.Conv2d(16, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64)), True),
    "folded": (lambda: nn.Sequential(nn.Conv2d(16, 64, 1, stride=2), nn.Identity()), True),
    "pooled": (lambda: nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(16, 64, 1), nn.BatchNorm2d(64)), True),
    "identity first": (lambda: nn.Sequential(nn.Identity(), *projection()), True),
    "hooked convolution": (lambda: nn.Sequential(hooked(projection()[0]), projection()[1]), False),
    "hooked sequence": (lambda: hooked(projection()), False),
    "convolution alone": (lambda: nn.Conv2d(16, 64, 1, stride=2), False),
    "four layers": (lambda: nn.Sequential(nn.Identity(), nn.Identity(), *projection()), False),
    "other norm": (lambda: nn.Sequential(projection()[0], nn.GroupNorm(4, 64)), False),
    "option A": (lambda: PadShortcut(2, 16, 64), False),
}


@pytest.mark.parametrize("name", SHORTCUTS)
def test_which_shortcuts_the_ops_compute(name: str) -> None:
    make, fuses = SHORTCUTS[name]
    assert (projection_parts(make()) is not None) == fuses


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("kind", [BasicBlock, Bottleneck])
@pytest.mark.parametrize("name", SHORTCUTS)
def test_every_shortcut_is_computed_right(name: str, kind: type[nn.Module], train: bool) -> None:
    stock = kind(16, 64 // kind.expansion, 2, SHORTCUTS[name][0]()).train(train)  # type: ignore[call-arg,operator]
    fused = resnet_fast.accelerate(copy.deepcopy(stock))
    x = torch.randn(2, 16, 8, 8)
    grads: list[list[Tensor | None]] = []
    with resnet_fast.use_backend("reference"):
        for block in (stock, fused):
            leaf = x.clone().requires_grad_()
            out = block(leaf)
            out.square().sum().backward()
            grads.append([out.detach(), leaf.grad, *(p.grad for p in block.parameters()), *block.buffers()])
    torch.testing.assert_close(grads[1], grads[0], rtol=0, atol=0)
    if not train:
        resnet_fast.reset_stats()
        with torch.no_grad():
            torch.testing.assert_close(fused(x), stock(x), rtol=1e-4, atol=1e-4)
        assert not resnet_fast.stats()["fallbacks"]
