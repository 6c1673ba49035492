"""Whole residual blocks in training, through ``accelerate``: every gradient and statistic against fp64, and twice."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from resnet_fast import accelerate
from tests.support.block_cases import made, projection, step

pytestmark = pytest.mark.interpret


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "bottleneck": lambda: Bottleneck(16, 4),
    "bottleneck stride 2": lambda: Bottleneck(16, 8, 2, projection(16, 32, 2)),
    "basic block stride 2": lambda: BasicBlock(16, 24, 2, projection(16, 24, 2)),
}


def stepped(block: nn.Module, x: Tensor) -> list[Tensor]:
    """Return the output, every gradient and every buffer."""
    return [*step(block, x), *block.buffers()]


@pytest.mark.parametrize("name", BLOCKS)
def test_float32_against_fp64(name: str) -> None:
    """Sums of a few dozen values cancel, so the bound is 1e-5 of each tensor's norm."""
    block, x = made(BLOCKS[name], 2, 16, 6, 5)
    exact = stepped(copy.deepcopy(block).double(), x.double())
    ours = stepped(accelerate(copy.deepcopy(block), backend="triton"), x)
    for got, reference in zip(ours, exact, strict=True):
        torch.testing.assert_close(
            got.double(), reference.double(), rtol=1e-4, atol=2e-5 * float(reference.abs().max())
        )


def test_recomputing_changes_no_bit() -> None:
    block, x = made(BLOCKS["bottleneck"], 2, 16, 6, 5)
    raw = stepped(accelerate(copy.deepcopy(block), backend="triton"), x)
    less = stepped(accelerate(copy.deepcopy(block), backend="triton", save="recompute"), x)
    assert all(map(torch.equal, raw, less))
