"""Profilers count the FLOPs of the stock net, in every way to run it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

import resnet_fast


def counted(run: Callable[[Tensor], Tensor], x: Tensor) -> tuple[int, set[str]]:
    """Return torch.profiler's FLOPs and the names of the ops it saw."""
    with profile(activities=[ProfilerActivity.CPU], with_flops=True) as found, torch.no_grad():
        run(x)
    events = found.events()
    names = ("aten::conv2d", "aten::addmm", "aten::linear")
    return sum(e.flops for e in events if e.name in names and e.flops), {e.name for e in events}


def sequential(net: nn.Module) -> nn.Module:
    return nn.Sequential(*list(net.children())[:-1])


NETS = {
    "bottleneck": lambda: ResNet(Bottleneck, [1, 2, 1, 1], num_classes=10),
    "basic": lambda: ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10),
    "grouped": lambda: ResNet(Bottleneck, [1, 1, 1, 1], num_classes=10, groups=4, width_per_group=16),
    "dilated": lambda: ResNet(
        Bottleneck, [1, 1, 2, 1], num_classes=10, replace_stride_with_dilation=[False, True, True]
    ),
}


@pytest.mark.parametrize("name", NETS)
def test_flops_are_those_of_the_stock_net(name: str) -> None:
    stock = NETS[name]().eval()
    fused = resnet_fast.accelerate(copy.deepcopy(stock))
    x = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        for _ in range(2):
            fused(x)
    for way in (lambda net: net, sequential):
        want, _ = counted(way(stock), x)
        got, names = counted(way(fused), x)
        assert got == want > 1e6 and any(n.startswith("resnet_fast::") for n in names)
    with torch.no_grad():
        for _ in range(6):
            fused(x)  # compiled
    assert counted(fused, x)[0] == counted(stock, x)[0]
    with FlopCounterMode(display=False) as ours, torch.no_grad():
        fused(x)
    with FlopCounterMode(display=False) as theirs, torch.no_grad():
        stock(x)
    assert ours.get_total_flops() == theirs.get_total_flops() > 1e6


def test_a_call_that_runs_on_the_reference_is_counted_once() -> None:
    stock = NETS["basic"]().eval()
    fused = resnet_fast.accelerate(copy.deepcopy(stock))
    x = torch.full((1, 3, 32, 32), float("nan"))
    assert counted(fused, x)[0] == counted(stock, x)[0]


def test_without_a_profiler_nothing_is_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    import resnet_fast.dispatch.profiling as module

    monkeypatch.setattr(module, "_announce", lambda conv: pytest.fail("announced"))
    with torch.no_grad():
        resnet_fast.accelerate(NETS["basic"]().eval())(torch.randn(1, 3, 32, 32))
