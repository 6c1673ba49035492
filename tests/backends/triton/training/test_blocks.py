"""Whole residual blocks in training, through ``accelerate``: every gradient and statistic against fp64, and twice."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from resnet_fast import accelerate

pytestmark = pytest.mark.interpret


def projection(ci: int, co: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(ci, co, 1, stride, bias=False), nn.BatchNorm2d(co))


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "bottleneck": lambda: Bottleneck(16, 4),
    "bottleneck stride 2": lambda: Bottleneck(16, 8, 2, projection(16, 32, 2)),
    "basic block stride 2": lambda: BasicBlock(16, 24, 2, projection(16, 24, 2)),
}


def made(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    block = nn.Sequential(BLOCKS[name]()).train()
    for m in block.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, -1, 1.5)
            nn.init.normal_(m.bias)
    return block, torch.randn(2, 16, 6, 5).contiguous(memory_format=torch.channels_last)


def step(block: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, dx, every parameter's gradient and every buffer."""
    x = x.clone().requires_grad_()
    y = block(x)
    y.backward(torch.cos(torch.arange(y.numel(), dtype=torch.float64)).reshape(y.shape).to(y.dtype))
    return [y.detach(), x.grad, *(p.grad for p in block.parameters()), *block.buffers()]  # type: ignore[list-item]


@pytest.mark.parametrize("name", BLOCKS)
def test_float32_against_fp64(name: str) -> None:
    """Sums of a few dozen values that cancel: rounding of the sums, 1e-5 of each tensor's norm, not of its result."""
    block, x = made(name)
    exact = step(copy.deepcopy(block).double(), x.double())
    ours = step(accelerate(copy.deepcopy(block), backend="triton"), x)
    for got, reference in zip(ours, exact, strict=True):
        torch.testing.assert_close(
            got.double(), reference.double(), rtol=1e-4, atol=2e-5 * float(reference.abs().max())
        )


def test_recomputing_changes_no_bit() -> None:
    block, x = made("bottleneck")
    raw = step(accelerate(copy.deepcopy(block), backend="triton"), x)
    less = step(accelerate(copy.deepcopy(block), backend="triton", save="recompute"), x)
    assert all(map(torch.equal, raw, less))
