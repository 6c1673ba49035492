"""A stage of fused blocks: NHWC inside, the caller's layout outside, and nn.Sequential in every other respect."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torchvision.models.resnet import ResNet, resnet18

import resnet_fast
from resnet_fast import numerics
from resnet_fast.blocks import stage
from resnet_fast.dispatch import record
from tests.support.nets import randomize


@pytest.fixture
def stock() -> ResNet:
    torch.manual_seed(0)
    return randomize(resnet18(num_classes=10)).eval()


def layouts(module: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, list[str]]:
    with record.tape() as tape, torch.inference_mode():
        y = module(x)
    return y, [event.spec.layout for event in tape if isinstance(event, record.Ran)]


def test_nchw_at_both_ends_nhwc_between(stock: ResNet) -> None:
    fused, x = resnet_fast.accelerate(copy.deepcopy(stock)), torch.randn(2, 64, 20, 20)
    y, seen = layouts(fused.layer2, x)
    assert seen == ["nhwc", "nhwc"]
    with torch.inference_mode():
        expected, reference = stock.layer2(x), copy.deepcopy(stock).double().layer2(x.double())
    assert y.stride() == expected.stride()
    numerics.assert_close(y, reference, expected, gemm_k=128 * 9)


def test_nhwc_stays_nhwc(stock: ResNet) -> None:
    x = torch.randn(2, 64, 20, 20).contiguous(memory_format=torch.channels_last)
    y, seen = layouts(resnet_fast.accelerate(copy.deepcopy(stock)).layer2, x)
    assert seen == ["nhwc", "nhwc"]
    assert y.stride() == stock.layer2(x).stride()


@pytest.mark.parametrize("case", ["training", "grad", "reference", "unfusable"])
def test_bit_equal_where_nothing_is_fused(case: str, stock: ResNet) -> None:
    x = torch.randn(2, 64, 20, 20)
    if case == "training":
        stock.train()
    if case == "unfusable":
        for block in stock.layer2:
            block.relu = nn.ReLU6()
    fused = resnet_fast.accelerate(copy.deepcopy(stock), "reference" if case == "reference" else "auto")
    with torch.set_grad_enabled(case == "grad"):
        y, expected = fused.layer2(x), stock.layer2(x)
    assert torch.equal(y, expected)
    assert y.stride() == expected.stride()


def test_is_a_sequential_and_restored_to_one(stock: ResNet) -> None:
    fused = resnet_fast.accelerate(copy.deepcopy(stock))
    assert [type(getattr(fused, f"layer{i}")) for i in (1, 2, 3, 4)] == [stage.Sequential] * 4
    assert isinstance(fused.layer1, nn.Sequential) and len(fused.layer1[:1]) == 1
    assert type(fused.layer2[0].downsample) is nn.Sequential
    x = torch.randn(1, 64, 8, 8)
    with torch.inference_mode():
        again = pickle.loads(pickle.dumps(fused.layer1))
        assert torch.equal(again(x), fused.layer1(x))
    resnet_fast.restore(fused)
    assert [type(m) for m in fused.modules()] == [type(m) for m in stock.modules()]


def test_scripts_and_traces_as_a_sequential(stock: ResNet) -> None:
    fused, x = resnet_fast.accelerate(copy.deepcopy(stock)), torch.randn(1, 64, 8, 8)
    with torch.no_grad():
        expected = stock.layer1(x)
        torch.testing.assert_close(torch.jit.script(fused.layer1)(x), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(torch.fx.symbolic_trace(fused.layer1)(x), expected)
