"""The call records that are read from a convolution and a norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import resnet18
from torchvision.ops import FrozenBatchNorm2d

from resnet_fast import accelerate
from resnet_fast.blocks import children
from resnet_fast.calls import Norm

NORMS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.BatchNorm2d(4),
    "momentum": lambda: nn.BatchNorm2d(4, momentum=0.3, eps=1e-2),
    "zero momentum": lambda: nn.BatchNorm2d(4, momentum=0.0),
    "cumulative": lambda: nn.BatchNorm2d(4, momentum=None),
    "no affine": lambda: nn.BatchNorm2d(4, affine=False),
    "no tracking": lambda: nn.BatchNorm2d(4, track_running_stats=False),
    "nothing": lambda: nn.BatchNorm2d(4, affine=False, track_running_stats=False, momentum=None),
}


@pytest.mark.parametrize("untrack", [False, True])
@pytest.mark.parametrize("name", NORMS)
def test_a_norm_record_computes_what_the_norm_does(name: str, untrack: bool) -> None:
    """Through three training batches and an eval batch, outputs, statistics and counters agree bit for bit."""
    want, read = NORMS[name](), NORMS[name]()
    if untrack:
        want.track_running_stats = read.track_running_stats = False
    for mode in (True, True, True, False):
        x = torch.randn(3, 4, 5, 5) * 2 + 1
        y = want.train(mode)(x)
        n = children.norm_record(read.train(mode))
        got = F.batch_norm(x, n.mean, n.var, n.weight, n.bias, n.batch_stats, n.momentum, n.eps)
        torch.testing.assert_close(got, y, rtol=0, atol=0)
        torch.testing.assert_close(dict(read.state_dict()), dict(want.state_dict()), rtol=0, atol=0)


def test_identity_and_frozen_records() -> None:
    assert children.norm_record(nn.Identity()) == Norm()
    layer = FrozenBatchNorm2d(4, eps=1e-3).train()
    record = children.norm_record(layer)
    assert (record.batch_stats, record.eps) == (False, 1e-3)
    assert record.tensors() == (layer.weight, layer.bias, layer.running_mean, layer.running_var)


def test_records_hold_the_current_attributes() -> None:
    layer = nn.Conv2d(8, 8, 3)
    before = children.conv_record(layer)
    layer.stride, layer.dilation, layer.padding, layer.groups = (2, 2), (3, 3), (1, 1), 1
    layer.weight = nn.Parameter(layer.weight + 1)
    after = children.conv_record(layer)
    assert (after.stride, after.dilation, after.padding) == ((2, 2), (3, 3), (1, 1))
    assert after.weight is layer.weight
    assert before.weight is not after.weight


@pytest.mark.parametrize(
    ("value", "pair"),
    [(2, (2, 2)), ([2], (2, 2)), ((2,), (2, 2)), ([1, 2], (1, 2)), ((1, 2), (1, 2)), ((1, 2, 3), None)],
)
@pytest.mark.parametrize("name", ["stride", "padding", "dilation"])
def test_geometry_takes_one_or_two_ints(name: str, value: Any, pair: tuple[int, int] | None) -> None:
    layer = nn.Conv2d(8, 8, 3)
    setattr(layer, name, value)
    found = children.geometry(layer.__dict__)
    assert (found and found[("stride", "padding", "dilation").index(name)]) == pair


def test_batches_counted_together_are_counted_at_the_end_once_per_run(monkeypatch: pytest.MonkeyPatch) -> None:
    together: list[int] = []
    add = torch._foreach_add_
    monkeypatch.setattr(torch, "_foreach_add_", lambda tensors, n: (together.append(len(tensors)), add(tensors, n)))
    once, twice, cumulative = nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.BatchNorm2d(4, momentum=None)
    before = once.num_batches_tracked._version
    with children.counting_together():
        with children.counting_together():
            for norm in (once, twice, twice, cumulative):
                children.norm_record(norm)
        assert once.num_batches_tracked == 0
        assert cumulative.num_batches_tracked == 1, "its momentum is computed from it"
    assert [int(n.num_batches_tracked) for n in (once, twice, cumulative)] == [1, 2, 1]
    assert together == [2]
    assert once.num_batches_tracked._version > before, "inference sees by it that the statistics changed"


def test_an_error_leaves_counted_what_ran_before_it() -> None:
    norm = nn.BatchNorm2d(4)
    with pytest.raises(ZeroDivisionError), children.counting_together():
        children.norm_record(norm)
        raise ZeroDivisionError
    children.norm_record(norm)
    assert norm.num_batches_tracked == 2


def test_a_net_counts_its_batches_with_one_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    together: list[int] = []
    add = torch._foreach_add_
    monkeypatch.setattr(torch, "_foreach_add_", lambda tensors, n: (together.append(len(tensors)), add(tensors, n)))
    net = accelerate(resnet18(num_classes=3)).train()
    net.layer2[0].bn1.momentum = None
    net.layer3[1].register_forward_hook(lambda *args: None)
    net(torch.randn(2, 3, 32, 32))
    assert together == [19]
    assert {int(m.num_batches_tracked) for m in net.modules() if isinstance(m, nn.BatchNorm2d)} == {1}
