"""A net keeps the parts of its call: they are read again after every change, and only then."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

import resnet_fast
from resnet_fast.blocks import held
from resnet_fast.blocks.frozen import HELD
from resnet_fast.blocks.net import Net
from tests.support.graph_cases import EDITS, change_eps, dilate, eager, image, small


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Net]:
    """Return the nets whose layers were read, one item for each time."""
    found: list[Net] = []
    read = Net.parts

    def spy(self: Net, x: Tensor) -> Any:
        found.append(self)
        return read(self, x)

    monkeypatch.setattr(Net, "parts", spy)
    return found


def dilate_in_place(model: nn.Module) -> None:
    model.layer1[0].conv2.dilation[:] = model.layer1[0].conv2.padding[:] = [2, 2]


def with_lists(model: nn.Module) -> nn.Module:
    conv = model.layer1[0].conv2
    conv.dilation, conv.padding = list(conv.dilation), list(conv.padding)
    return model


def hook_a_block(model: nn.Module) -> None:
    model.layer2[0].register_forward_hook(lambda m, args, out: out + 1)


def write_through_data(model: nn.Module) -> None:
    model.layer2[0].conv1.weight.data.mul_(0.5)


def another_parameter(model: nn.Module) -> None:
    model.layer2[0].conv1.weight = nn.Parameter(0.5 * model.layer2[0].conv1.weight)


@torch.no_grad()
@pytest.mark.parametrize(
    "edit", [*EDITS, dilate_in_place, hook_a_block, write_through_data, another_parameter, torch.nn.Module.train]
)
def test_an_edit_after_the_first_call_is_seen(edit: Callable[[nn.Module], Any], reads: list[Net]) -> None:
    net, x = with_lists(resnet_fast.accelerate(small())), image()
    for _ in range(3):
        net(x)
    edit(net)
    x = x.to(net.conv1.weight.dtype)
    twin = copy.deepcopy(net)
    torch.testing.assert_close(net(x), resnet_fast.restore(twin)(x), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_an_unchanged_net_is_read_once(reads: list[Net]) -> None:
    net, x = resnet_fast.accelerate(small()), image()
    for _ in range(2):
        net(x)
    before = len(reads)
    for y in (x, x[:1], image(size=40)):
        net(y)
    assert before and len(reads) == before
    change_eps(net)
    net(x)
    assert len(reads) > before


@torch.no_grad()
def test_a_net_whose_parameters_are_exchanged_all_the_time_is_only_read(
    reads: list[Net], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(held.Held, "__init__", lambda *args: pytest.fail("took a snapshot"))
    net, x = resnet_fast.accelerate(small()), image()
    for _ in range(4):
        another_parameter(net)
        net(x)
    assert len(reads) == 4


@torch.no_grad()
def test_a_replaced_library_function_is_run(reads: list[Net], monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = resnet_fast.accelerate(resnet_fast.resnet18(num_classes=10).eval()), image(size=64)
    for _ in range(3):
        net(x)
    forward = BasicBlock.forward
    seen: list[torch.Size] = []
    monkeypatch.setattr(BasicBlock, "forward", lambda self, x: seen.append(x.shape) or forward(self, x))
    net(x)
    assert len(seen) == 8


@torch.no_grad()
@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, copy.copy, lambda net: pickle.loads(pickle.dumps(net))],
    ids=["deepcopy", "copy", "pickle"],
)
def test_a_copy_reads_its_own_layers(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    net, x = resnet_fast.accelerate(small()), image()
    for _ in range(2):
        net(x)
    other = duplicate(net)
    assert HELD in net.__dict__ and HELD not in other.__dict__
    dilate(other)
    torch.testing.assert_close(other(x), eager(other, x))


@torch.no_grad()
def test_a_replica_with_the_same_attributes_reads_its_own_layers() -> None:
    net, x = resnet_fast.accelerate(small()), image()
    for _ in range(2):
        net(x)
    other = copy.copy(net)
    other.__dict__ = dict(net.__dict__)  # as DataParallel makes its replicas
    other._modules = dict(net._modules, layer2=nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(16, 32, 1)).eval())
    assert not torch.allclose(other(x), net(x))


@torch.no_grad()
def test_a_net_is_freed_at_once() -> None:
    net, x = resnet_fast.accelerate(small()), image()
    for _ in range(3):
        net(x)
    weight = weakref.ref(net.conv1.weight)
    gc.disable()
    try:
        del net
        assert weight() is None
    finally:
        gc.enable()


def test_restore_leaves_nothing() -> None:
    net = small()
    before = set(net.__dict__)
    with torch.no_grad():
        for _ in range(2):
            resnet_fast.accelerate(net)(image())
    assert set(resnet_fast.restore(net).__dict__) == before
