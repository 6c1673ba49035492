"""Training kernels on a GPU, at a network's sizes: blocks against fp64, determinism, compile, the peak of memory."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

import resnet_fast
from resnet_fast import accelerate
from tests.support.block_cases import made, projection, step

pytestmark = pytest.mark.gpu


def relative(a: Tensor, b: Tensor) -> float:
    """Return the norm of the difference divided by the norm of ``b``."""
    return float((a.double() - b.double()).norm() / b.double().norm())


BLOCKS = {
    "bottleneck": (lambda: Bottleneck(256, 64), 256),
    "bottleneck stride 2": (lambda: Bottleneck(256, 128, 2, projection(256, 512, 2)), 256),
    "bottleneck groups": (lambda: Bottleneck(256, 64, groups=32, base_width=4), 256),
    "basic block": (lambda: BasicBlock(64, 64), 64),
    "basic block stride 2": (lambda: BasicBlock(64, 128, 2, projection(64, 128, 2)), 64),
}


def on_gpu(name: str) -> tuple[nn.Module, Tensor]:
    make, channels = BLOCKS[name]
    return made(make, 4, channels, 29, 27, "cuda")


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("prologue", ["packed", "exact"])
def test_block_against_fp64(name: str, dtype: torch.dtype, prologue: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESNET_FAST_PROLOGUE", prologue)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    block, x = on_gpu(name)
    exact = step(copy.deepcopy(block).double(), x.double(), torch.float64)
    eager = step(copy.deepcopy(block), x, dtype)
    ours = step(accelerate(copy.deepcopy(block), backend="triton"), x, dtype)
    for got, reference, stock in zip(ours, exact, eager, strict=True):
        limit = 2 * relative(stock, reference) + 8 * torch.finfo(got.dtype).eps
        assert relative(got, reference) <= limit


@pytest.mark.parametrize("name", BLOCKS)
def test_two_runs_are_equal(name: str) -> None:
    block, x = on_gpu(name)
    first, second = (step(accelerate(copy.deepcopy(block)), x, torch.bfloat16) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_compiled_net_trains_as_eager_one() -> None:
    net = resnet_fast.resnet18(num_classes=10).cuda().to(memory_format=torch.channels_last).train()
    x = torch.randn(8, 3, 96, 96, device="cuda").to(memory_format=torch.channels_last)
    plain = step(copy.deepcopy(net), x, torch.bfloat16)
    compiled = step(torch.compile(copy.deepcopy(net), fullgraph=True), x, torch.bfloat16)
    for a, b in zip(compiled, plain, strict=True):
        assert relative(a, b) < 0.05


def test_resnet50_takes_less_memory_than_eager() -> None:
    def peak(net: nn.Module) -> int:
        x = torch.randn(32, 3, 224, 224, device="cuda").to(memory_format=torch.channels_last)
        torch.cuda.reset_peak_memory_stats()
        step(net, x, torch.bfloat16)
        return torch.cuda.max_memory_allocated()

    net = resnet_fast.resnet50().cuda().to(memory_format=torch.channels_last).train()
    with resnet_fast.use_backend("reference"):
        stock = peak(copy.deepcopy(net))
    ours = peak(copy.deepcopy(net))
    less = peak(accelerate(copy.deepcopy(net), save="recompute"))
    assert less < ours < stock
