"""The sentences that keep a layer out of a fused call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torchvision.ops import FrozenBatchNorm2d

from resnet_fast.blocks import obstacles


def conv(**kwargs: Any) -> nn.Conv2d:
    return nn.Conv2d(8, 8, 3, **kwargs)


def hooked(m: nn.Module) -> nn.Module:
    m.register_forward_hook(lambda *args: None)
    return m


def replaced(m: nn.Module) -> nn.Module:
    m.forward = lambda x: x  # type: ignore[assignment]
    return m


class Own(nn.Conv2d):
    pass


class Half(nn.Module):
    def forward(self, w: torch.Tensor) -> torch.Tensor:
        return w / 2


def parametrized() -> nn.Module:
    m = conv()
    parametrize.register_parametrization(m, "weight", Half())
    return m


def buffered() -> nn.Module:
    m = conv()
    weight = m.weight.detach()
    del m.weight
    m.weight = weight
    return m


@pytest.mark.parametrize(
    "layer",
    [conv(), conv(padding=1, bias=False), conv(groups=4, dilation=2, stride=3), conv().bfloat16(), conv().to("meta")],
)
def test_plain_convolutions_fuse(layer: nn.Module) -> None:
    assert obstacles.conv_obstacle("conv1", layer) == ""


@pytest.mark.parametrize(
    ("make", "got"),
    [
        (lambda: Own(8, 8, 3), "got Own; it runs unfused"),
        (lambda: nn.Conv1d(8, 8, 3), "got Conv1d"),
        (lambda: nn.Sequential(conv()), "got Sequential"),
        (lambda: hooked(conv()), "got Conv2d with a hook or a replaced forward"),
        (lambda: replaced(conv()), "got Conv2d with a hook or a replaced forward"),
        (parametrized, "got ParametrizedConv2d"),
        (lambda: conv(padding=1, padding_mode="circular"), "got circular (1, 1)"),
        (lambda: conv(padding="same"), "got zeros same"),
        (buffered, "weight to be a plain parameter"),
    ],
)
def test_other_convolutions_say_why_not(make: Callable[[], nn.Module], got: str) -> None:
    reason = obstacles.conv_obstacle("conv1", make())
    assert reason.startswith("expected conv1")
    assert got in reason


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm2d(4),
        nn.BatchNorm2d(4, affine=False),
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.BatchNorm2d(4).eval(),
        FrozenBatchNorm2d(4),
        nn.Identity(),
        nn.SyncBatchNorm(4),
    ],
)
def test_norms_that_fuse(layer: nn.Module) -> None:
    assert obstacles.norm_obstacle("bn1", layer) == ""


@pytest.mark.parametrize(
    ("make", "got"),
    [
        (lambda: nn.GroupNorm(2, 4), "got GroupNorm"),
        (lambda: nn.InstanceNorm2d(4), "got InstanceNorm2d"),
        (lambda: hooked(nn.BatchNorm2d(4)), "got BatchNorm2d with a hook"),
        (lambda: type("Own", (nn.BatchNorm2d,), {})(4), "got Own"),
    ],
)
def test_other_norms_say_why_not(make: Callable[[], nn.Module], got: str) -> None:
    reason = obstacles.norm_obstacle("bn1", make())
    assert reason.startswith("expected bn1")
    assert got in reason


@pytest.mark.parametrize(
    "register",
    [
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ],
)
def test_every_kind_of_hook_alters_a_layer(register: str) -> None:
    layer = conv()
    handle = getattr(layer, register)(lambda *args: None)
    assert obstacles.is_altered(layer)
    handle.remove()
    assert not obstacles.is_altered(layer)


class Described(torch.Tensor):
    pass


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, FrozenBatchNorm2d])
@pytest.mark.parametrize("buffer", ["running_mean", "running_var"])
def test_a_buffer_of_another_class(norm: Any, buffer: str) -> None:
    layer = norm(4)
    setattr(layer, buffer, getattr(layer, buffer).as_subclass(Described))
    want = f"expected bn1's {buffer} to be a plain buffer, got {__name__}.Described; it runs unfused"
    assert obstacles.norm_obstacle("bn1", layer) == want


def test_a_state_dict_hook_does_not_alter_a_layer() -> None:
    layer = conv()
    layer.register_state_dict_post_hook(lambda *args: None)
    layer.register_load_state_dict_pre_hook(lambda *args: None)
    assert not obstacles.is_altered(layer)
