"""The poolings that the op ``stem`` computes, and those that run unfused."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

import resnet_fast


def net() -> nn.Module:
    return resnet_fast.accelerate(ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10).eval())


@pytest.mark.parametrize(
    "pool",
    [
        nn.MaxPool2d(3, 2, 1, ceil_mode=True),
        nn.MaxPool2d((3, 2), 2, 1),
        nn.MaxPool2d(3, (2, 1), 1),
        nn.MaxPool2d(3, 2, 1, dilation=2),
        nn.MaxPool2d(3, 2, 1, return_indices=True),
        nn.AvgPool2d(3, 2, 1),
        nn.Identity(),
        nn.Sequential(),
    ],
)
def test_poolings_that_the_op_does_not_compute(pool: nn.Module) -> None:
    model = net()
    model.maxpool = pool
    assert model.unfusable().startswith("expected maxpool to be a plain square MaxPool2d, got ")


@pytest.mark.parametrize(
    "pool", [nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(2), nn.MaxPool2d((2, 2), (2, 2)), nn.MaxPool2d(1)]
)
def test_poolings_that_it_does(pool: nn.Module) -> None:
    model = net()
    model.maxpool = pool
    assert model.unfusable() == ""
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        got = model(x)
        torch.testing.assert_close(got, resnet_fast.restore(model)(x), rtol=1e-4, atol=1e-4)
