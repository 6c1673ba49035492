"""Whole nets in the interpreter: ``accelerate(model, backend="triton")`` on CPU tensors against the net in fp64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import resnet_fast
from resnet_fast import accelerate, explain, numerics
from resnet_fast.models.registry import build

pytestmark = pytest.mark.interpret

SLOW = ("resnet18", "resnet50", "resnext50_32x4d")


def randomised(net: nn.Module) -> nn.Module:
    """Set running statistics as in a trained net; outputs keep a size of about one."""
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.3)
            m.running_var.uniform_(0.5, 2)
            m.weight.data.uniform_(0.5, 1)
            m.bias.data.normal_(0, 0.3)
    return net.eval()


def check(name: str, n: int, h: int, w: int, dtype: torch.dtype, layout: torch.memory_format) -> None:
    net = randomised(build(name)).to(dtype)
    x = torch.randn(n, 3, h, w).to(dtype).contiguous(memory_format=layout)
    double = copy.deepcopy(net).double()
    fast = accelerate(copy.deepcopy(net), backend="triton")
    with torch.no_grad(), resnet_fast.use_backend("reference"):
        reference, eager = double(x.double()), net(x)
    with torch.no_grad():
        y = fast(x)
        numerics.assert_close(y, reference, eager, 4608)
        rows = explain(fast, x).rows
    assert {row.backend for row in rows} == {"triton"} and all(row.detail for row in rows)


def test_residual_net_in_float16() -> None:
    check("cifar_resnet20", 2, 9, 11, torch.float16, torch.channels_last)


def test_plain_net_in_float32() -> None:
    check("cifar_plain20", 2, 8, 10, torch.float32, torch.channels_last)


def test_net_in_bfloat16_and_nchw() -> None:
    check("cifar_resnet20", 3, 7, 5, torch.bfloat16, torch.contiguous_format)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_deeper_net(name: str) -> None:
    check(name, 1, 33, 30, torch.float16, torch.channels_last)


def test_one_block_that_cannot_run_takes_the_stock_path_alone() -> None:
    net = accelerate(randomised(build("cifar_resnet20")), backend="auto")
    net.layer2[1].bn1 = nn.GroupNorm(4, 32)
    with torch.no_grad():
        rows = {row.layer: row for row in explain(net, torch.randn(1, 3, 8, 8)).rows}
    assert rows["layer2.1"].backend == "stock" and "GroupNorm" in rows["layer2.1"].why_not["fused"]
    assert rows["layer2.0"].backend != "stock"


@pytest.mark.slow
def test_a_detector_backbone_of_frozen_norms() -> None:
    from torchvision.ops.misc import FrozenBatchNorm2d

    net = build("resnet18", norm_layer=FrozenBatchNorm2d).eval().half()
    x = torch.randn(1, 3, 24, 24, dtype=torch.float16)
    with torch.no_grad():
        eager, reference = net(x), copy.deepcopy(net).double()(x.double())
        numerics.assert_close(accelerate(net, backend="triton")(x), reference, eager, 4608)
