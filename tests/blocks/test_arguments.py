"""For any argument that a stock layer takes, the accelerated module gives the same output or the same error."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.models import resnet as stock
from torchvision.ops import FrozenBatchNorm2d

import resnet_fast

quickly = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    phases=(Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)

KEEPING: list[tuple[Any, Any, Any]] = [
    (1, 0, 1), (3, 1, 1), (3, (1, 1), 1), ((3, 3), [1, 1], 1), ((1, 3), (0, 1), 1), ((3, 1), (1, 0), 1), (3, 2, 2),
    (3, (1, 2), (1, 2)), (3, "same", 1), (3, "same", 2), (1, "valid", 1),
]  # fmt: skip
"""Filters, paddings and dilations that keep the image's size."""

OTHER: list[tuple[Any, Any, Any]] = [(3, 0, 1), (3, (0, 1), 1), (3, "valid", 1), (1, 1, 1)]


@st.composite
def convs(draw: st.DrawFn, ci: int, co: int) -> nn.Module:
    """Draw a convolution; most keep the image's size, so that a block of them works."""
    kernel, padding, dilation = draw(st.sampled_from(KEEPING * 3 + OTHER))
    stride = 1 if padding == "same" else draw(st.sampled_from([1, 1, 1, 1, (1, 1), [1, 1], 2, (2, 1)]))
    mode = draw(st.sampled_from(["zeros"] * 6 + ["reflect", "circular"]))
    groups, bias = draw(st.sampled_from([1, 1, 2, 4])), draw(st.booleans())
    m = nn.Conv2d(ci, co, kernel, 1, padding, dilation, groups if ci % 4 == co % 4 == 0 else 1, bias, mode)
    m.stride = stride  # as it is: libraries that dilate nets assign ints and lists
    return m


class Own(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


@st.composite
def norms(draw: st.DrawFn, channels: int) -> nn.Module:
    kind = draw(st.sampled_from(["batch"] * 8 + ["frozen", "identity", "group", "instance", "own"]))
    if kind == "frozen":
        return FrozenBatchNorm2d(channels, eps=draw(st.sampled_from([0.0, 1e-5, 1e-3])))
    if kind == "identity":
        return nn.Identity()
    if kind == "group":
        return nn.GroupNorm(2, channels)
    if kind == "instance":
        return nn.InstanceNorm2d(channels)
    affine, track = draw(st.booleans()), draw(st.sampled_from([True, True, False]))
    m = (Own if kind == "own" else nn.BatchNorm2d)(channels, affine=affine, track_running_stats=track)
    m.eps = draw(st.sampled_from([1e-5, 1e-3, 1, torch.tensor(1e-3)]))  # type: ignore[assignment]
    m.momentum = draw(st.sampled_from([0.1, None, 0, 1, 0.0, 1.0]))
    return m


acts = st.sampled_from(
    [nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.SiLU(), nn.Identity(), nn.Hardtanh(-1, 1), F.relu]
)

POOLS: dict[str, Callable[[], Any]] = {
    "average": lambda: nn.AvgPool2d(2),
    "identity": nn.Identity,
    "empty": nn.Sequential,
    "sequence": lambda: nn.Sequential(nn.MaxPool2d(3, 2, 1)),
    "adaptive": lambda: nn.AdaptiveMaxPool2d(4),
    "function": lambda: F.relu,
}


@st.composite
def pools(draw: st.DrawFn) -> Any:
    other = draw(st.sampled_from(["max"] * 12 + list(POOLS)))
    if other != "max":
        return POOLS[other]()
    window = st.sampled_from([1, 2, 3, (3, 3), (2, 3), [3, 3], (3, 1)])
    m = nn.MaxPool2d(
        draw(window),
        draw(st.sampled_from([None, 1, 2, (2, 2), (2, 1), [2, 2]])),
        draw(st.sampled_from([0, 1, (1, 1), (0, 1), (1, 0), [1, 1]])),
        draw(st.sampled_from([1, 1, 1, (1, 1), 2, (2, 1)])),
        ceil_mode=draw(st.sampled_from([False, False, True])),
        return_indices=draw(st.sampled_from([False] * 5 + [True])),
    )
    if draw(st.booleans()):
        m.stride = draw(st.sampled_from([m.stride, None]))
    return m


def replace(m: nn.Module, name: str, value: Any) -> None:
    delattr(m, name)
    setattr(m, name, value)


def outcome(m: nn.Module, x: Tensor) -> tuple[Any, Any]:
    """Return the output and buffers, or the name of the error."""
    try:
        with torch.no_grad():
            y = m(x)
    except Exception as error:
        return f"raised, as {type(error).__name__}", None
    return y, dict(m.named_buffers())


def check(plain: nn.Module, x: Tensor) -> None:
    """Assert the same outcome in eval and in training, and a reason of one line for each unfused part."""
    for m in plain.modules():
        if isinstance(m, nn.modules.batchnorm._NormBase) and m.running_mean is not None and m.running_var is not None:
            m.running_mean.uniform_(-0.5, 0.5)
            m.running_var.uniform_(0.5, 2)
    for mode in (False, True):
        model = resnet_fast.accelerate(copy.deepcopy(plain.train(mode)))
        resnet_fast.reset_stats()
        want, buffers = outcome(copy.deepcopy(plain), x)
        got, ours = outcome(model, x)
        if isinstance(want, str):
            assert isinstance(got, str), want
            continue
        assert not isinstance(got, str), got
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(ours, buffers, rtol=1e-3, atol=1e-3)
        for reason in resnet_fast.stats()["fallbacks"]:
            assert "\n" not in reason and "NoneType" not in reason


@quickly
@given(st.data())
def test_blocks(data: st.DataObject) -> None:
    torch.manual_seed(0)
    bottleneck = data.draw(st.booleans())
    block: nn.Module = stock.Bottleneck(16, 4) if bottleneck else stock.BasicBlock(16, 16)
    names = ("1", "2", "3") if bottleneck else ("1", "2")
    edited = data.draw(st.sets(st.sampled_from([*(f"{k}{n}" for k in ("conv", "bn") for n in names), "relu"])))
    for name in sorted(edited):
        if name == "relu":
            replace(block, name, data.draw(acts))
        elif name.startswith("bn"):
            setattr(block, name, data.draw(norms(getattr(block, "conv" + name[2:]).out_channels)))
        else:
            old = getattr(block, name)
            setattr(block, name, data.draw(convs(old.in_channels, old.out_channels)))
    shortcut = data.draw(st.sampled_from(["none", "projection", "pooled", "function", "convolution"]))
    if shortcut == "function":
        block.downsample = torch.sin  # type: ignore[assignment]
    elif shortcut != "none":
        layers = [data.draw(convs(16, 16))]
        if shortcut != "convolution":
            layers.append(data.draw(norms(16)))
        if shortcut == "pooled":
            layers.insert(0, nn.AvgPool2d(3, 1, 1))
        block.downsample = nn.Sequential(*layers)  # type: ignore[assignment]
    check(block, torch.randn(data.draw(st.sampled_from([2, 2, 1, 0])), 16, 9, 9))


STAGES: dict[str, Callable[[], Any]] = {
    "block": lambda: nn.Sequential(stock.BasicBlock(64, 64)),
    "empty": nn.Sequential,
    "identity": nn.Identity,
    "list": lambda: nn.ModuleList([stock.BasicBlock(64, 64)]),
    "bare block": lambda: stock.BasicBlock(64, 64),
    "function": lambda: torch.cos,
    "mixed": lambda: nn.Sequential(stock.BasicBlock(64, 64), nn.Conv2d(64, 64, 1)),
}
HEADS: dict[str, Callable[[], Any]] = {
    "linear": lambda: nn.Linear(64, 10),
    "identity": nn.Identity,
    "function": lambda: torch.exp,
    "sequence": lambda: nn.Sequential(nn.Linear(64, 10), nn.Softmax(dim=0)),
}


@quickly
@given(st.data())
def test_nets(data: st.DataObject) -> None:
    """Covers stem, poolings, stages and classifier; the later stages are small."""
    torch.manual_seed(0)
    model = stock.ResNet(stock.BasicBlock, [1, 1, 1, 1], num_classes=10)
    for name in ("layer2", "layer3", "layer4"):
        replace(model, name, STAGES[data.draw(st.sampled_from(["empty", *STAGES]))]())
    replace(model, "fc", HEADS[data.draw(st.sampled_from(["linear", *HEADS]))]())
    edited = data.draw(st.sets(st.sampled_from(["conv1", "bn1", "relu", "layer1", "avgpool"]), max_size=2))
    if "conv1" in edited:
        model.conv1 = data.draw(convs(4, 64))
    if "bn1" in edited:
        model.bn1 = data.draw(norms(64))
    if "relu" in edited:
        replace(model, "relu", data.draw(acts))
    if "layer1" in edited:
        replace(model, "layer1", STAGES[data.draw(st.sampled_from(list(STAGES)))]())
    if "avgpool" in edited:
        replace(model, "avgpool", data.draw(st.sampled_from([nn.AdaptiveMaxPool2d(1), nn.AvgPool2d((2, 1))])))
    replace(model, "maxpool", data.draw(pools()))
    check(model, torch.randn(2, model.conv1.in_channels, data.draw(st.sampled_from([16, 17])), 16))


@pytest.mark.parametrize("pool", [nn.MaxPool2d(3, 2, padding=(0, 1)), nn.MaxPool2d(3, 2, padding=(1, 0))])
def test_a_padding_that_is_not_square(pool: nn.Module) -> None:
    model = stock.resnet18(num_classes=10)
    model.maxpool = pool
    check(model, torch.randn(2, 3, 33, 33))
    reason = resnet_fast.accelerate(model).unfusable()
    assert reason.startswith(
        "expected maxpool to be a plain square MaxPool2d, got MaxPool2d(kernel_size=3, stride=2, pad"
    )


def test_blocks_of_unusual_sizes() -> None:
    check(stock.BasicBlock(0, 0), torch.randn(2, 0, 4, 4))
    check(stock.BasicBlock(4, 4), torch.randn(2, 4, 0, 4))
    check(stock.BasicBlock(4, 4), torch.randn(2, 4, 4, 0))
    check(stock.BasicBlock(4, 4, norm_layer=nn.Identity), torch.randn(4, 5, 5))  # type: ignore[arg-type]
    check(stock.BasicBlock(4, 4, norm_layer=FrozenBatchNorm2d), torch.randn(4, 5, 5))
    check(stock.BasicBlock(4, 4), torch.randn(4, 5, 5))
