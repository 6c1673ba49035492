"""NaN and infinity come out of an accelerated net where they come out of the stock net, however the net is run.

oneDNN's ReLU turns NaN into 0 (docs/notes/nan-through-relu.md): a broken image or a broken weight would get plausible
features.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import segmentation
from torchvision.models._utils import IntermediateLayerGetter

import resnet_fast
from resnet_fast.backends.onednn import conv_bn_act, tiling
from tests.support import nets

NAN, INF = math.nan, math.inf
Run = Callable[[nn.Module, Tensor], Any]


def sequential(net: nn.Module, x: Tensor) -> Tensor:
    return nn.Sequential(*list(net.children())[:-1])(x)


def intermediate_layers(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    return IntermediateLayerGetter(net, {"layer1": "a", "layer4": "b"})(x)


def trained_head(net: nn.Module, x: Tensor) -> Tensor:
    """A frozen backbone in eval mode; the head gets gradients, so autograd is on."""
    net.requires_grad_(False)
    net.fc.requires_grad_(True)
    with torch.enable_grad():
        out = net(x)
    assert out.requires_grad
    return out.detach()


def compiled(net: nn.Module, x: Tensor) -> Tensor:
    torch._dynamo.reset()
    return torch.compile(net, backend="aot_eager")(x)


def exported(net: nn.Module, x: Tensor) -> Tensor:
    return torch.export.export(net, (torch.zeros_like(x),)).module()(x)


def scripted(net: nn.Module, x: Tensor) -> Tensor:
    return torch.jit.script(net)(x)


def hooked(net: nn.Module, x: Tensor) -> Any:
    """A hook on an inner layer takes the net apart."""
    seen: list[Tensor] = []
    net.layer2.register_forward_hook(lambda module, args, out: seen.append(out))
    return [net(x), *seen]


def whole(net: nn.Module, x: Tensor) -> Tensor:
    return net(x)


def whole_and_compiled_by_onednn(net: nn.Module, x: Tensor) -> Tensor:
    for _ in range(6):
        out = net(x)
    return out


WAYS: list[Run] = [
    whole, whole_and_compiled_by_onednn, sequential, intermediate_layers, trained_head, hooked, scripted,
]  # fmt: skip
SLOW_WAYS: list[Run] = [compiled, exported]
EVERY_WAY = [*WAYS, *[pytest.param(way, marks=pytest.mark.slow) for way in SLOW_WAYS]]


def kinds(out: Any) -> list[Tensor]:
    """Per tensor and element: 0 for a finite number, 1 for NaN, 2 for infinity, 3 for negative infinity."""
    tensors = out.values() if isinstance(out, dict) else out if isinstance(out, (list, tuple)) else [out]
    return [y.isnan() * 1 + y.isposinf() * 2 + y.isneginf() * 3 for y in tensors]


def assert_same_kinds(net: nn.Module, x: Tensor, way: Run = whole) -> list[Tensor]:
    """The accelerated net's output is NaN and infinite exactly where the stock net's is; returns where."""
    with torch.no_grad():
        want = kinds(way(copy.deepcopy(net), x))
        got = kinds(way(resnet_fast.accelerate(copy.deepcopy(net)), x))
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other), f"{(one != other).sum()} of {one.numel()} elements differ"
    return want


@pytest.mark.parametrize("way", EVERY_WAY)
@pytest.mark.parametrize("value", [NAN, -INF])
def test_a_broken_pixel_breaks_its_image_alone(way: Run, value: float) -> None:
    x = torch.randn(3, 3, 32, 32)
    x[1, 2, 7, 9] = value
    last = assert_same_kinds(nets.bottleneck().eval(), x, way)[-1]
    assert last[1].any() and not last[0].any() and not last[2].any()


@pytest.mark.parametrize("way", EVERY_WAY)
def test_overflow_in_the_middle(way: Run) -> None:
    """Finite input, finite weights: a later block makes infinity of large numbers, and NaN of that."""
    net = nets.bottleneck().eval()
    with torch.no_grad():
        for block in (net.layer1[0], net.layer2[0], net.layer3[0]):
            block.bn3.weight.mul_(1e14)
    where = assert_same_kinds(net, torch.randn(2, 3, 32, 32), way)
    assert any(each.any() for each in where)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
@pytest.mark.parametrize("scale", [1e10, 1e20, 1e30])
def test_an_overflow_that_shrinks_again(kind: str, dtype: torch.dtype, scale: float) -> None:
    """Values grow out of range in one stage and come back in the next: nothing shows in a fused net's output."""
    net = getattr(nets, kind)().eval().to(dtype)
    last = "bn3" if kind == "bottleneck" else "bn2"
    with torch.no_grad():
        for name in ("layer1", "layer2"):
            for block in getattr(net, name):
                getattr(block, last).weight.mul_(scale)
        for block in net.layer3:
            for norm in (block.bn1, block.downsample[1]):
                norm.weight.div_(scale).div_(scale)
    for way in (whole, whole_and_compiled_by_onednn, sequential):
        assert_same_kinds(net, torch.randn(2, 3, 32, 32, dtype=dtype), way)


EDITS: dict[str, Callable[[Any], Any]] = {
    "NaN in a filter": lambda net: net.layer2[0].conv2.weight.view(-1)[5:6].fill_(NAN),
    "infinity in a filter": lambda net: net.conv1.weight.view(-1)[5:6].fill_(INF),
    "NaN in gamma": lambda net: net.layer4[0].bn1.weight[3:4].fill_(NAN),
    "infinite mean": lambda net: net.layer3[0].bn2.running_mean[0:1].fill_(INF),
    "infinite variance": lambda net: net.layer3[0].bn2.running_var[0:1].fill_(INF),
    "negative variance": lambda net: net.bn1.running_var[4:5].fill_(-1),
    "NaN in the projection": lambda net: net.layer2[0].downsample[0].weight.view(-1)[0:1].fill_(NAN),
    "NaN in a shift": lambda net: net.layer1[1].bn2.bias[0:1].fill_(NAN),
}


@pytest.mark.parametrize("edit", EDITS)
def test_broken_parameters(edit: str) -> None:
    net = nets.bottleneck().eval()
    with torch.no_grad():
        EDITS[edit](net)
    x = torch.randn(2, 3, 32, 32)
    for way in (whole, whole_and_compiled_by_onednn, sequential, trained_head):
        assert_same_kinds(net, x, way)


def test_a_weight_that_breaks_later_and_is_mended() -> None:
    """Each edit recomputes the folded weights, and with them the values that they allow."""
    stock = nets.bottleneck().eval()
    fused = resnet_fast.accelerate(copy.deepcopy(stock))
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        for _ in range(6):
            fused(x)
        for value, breaks in ((NAN, True), (0.5, False), (INF, True), (-0.5, False)):
            for net in (stock, fused):
                net.layer1[0].conv1.weight[0, 0, 0, 0] = value
            out = fused(x)
            assert [k.tolist() for k in kinds(out)] == [k.tolist() for k in kinds(stock(x))]
            assert bool(out.isnan().any()) == breaks


def test_the_reason_is_counted_once_per_part_and_strict_mode_raises() -> None:
    net = resnet_fast.accelerate(nets.bottleneck().eval())
    x = torch.randn(1, 3, 32, 32)
    x[0, 0, 0, 0] = NAN
    resnet_fast.reset_stats()
    with torch.no_grad():
        sequential(net, x)
    stats = resnet_fast.stats()
    assert stats["calls"] == {"bottleneck/reference": 5}
    assert list(stats["fallbacks"]) == [
        "bottleneck runs on reference: its input holds NaN or infinity, which oneDNN's ReLU would hide"
    ]
    with resnet_fast.strict(), torch.no_grad(), pytest.raises(resnet_fast.BackendError, match="NaN or infinity"):
        sequential(net, x)


@pytest.mark.parametrize("backend", ["auto", "onednn"])
def test_a_batch_in_tiles_and_a_backend_by_name(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the tile with the broken image runs its stock layers."""

    monkeypatch.setattr(tiling, "last_level_cache", lambda: 2 * 4 * 64 * 16 * 16)  # one image's stem at a time
    stock = nets.bottleneck().eval()
    fused = resnet_fast.accelerate(copy.deepcopy(stock), backend)
    x = torch.randn(4, 3, 32, 32)
    x[2, 0, 0, 0] = NAN
    resnet_fast.reset_stats()
    with torch.no_grad():
        out, want = fused(x), stock(x)
    assert torch.equal(out.isnan(), want.isnan()) and out[2].isnan().all() and out[[0, 1, 3]].isfinite().all()
    calls = resnet_fast.stats()["calls"]
    assert calls["stem/reference"] == 1 and calls["stem/onednn"] == 3


@pytest.mark.parametrize("value", [NAN, INF])
def test_a_segmentation_net(value: float) -> None:
    torch.manual_seed(0)
    net = segmentation.fcn_resnet50(weights=None, weights_backbone=None, num_classes=3).eval()
    x = torch.randn(2, 3, 64, 64)
    x[0, 0, 3, 3] = value
    (where,) = assert_same_kinds(net, x, lambda net, x: net(x)["out"])
    assert where[0].any() and not where[1].any()


@pytest.mark.parametrize("name", ["resnet18", "resnet26d"])
def test_timm_features(name: str) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    net = nets.randomize(timm.create_model(name, features_only=True)).eval()
    x = torch.randn(2, 3, 64, 64)
    x[1, 1, 30, 30] = NAN
    *_, last = assert_same_kinds(net, x)
    assert last[1].any() and not last[0].any()


@pytest.mark.slow
def test_inductor() -> None:
    def run(net: nn.Module, x: Tensor) -> Tensor:
        torch._dynamo.reset()
        return torch.compile(net)(x)

    x = torch.randn(2, 64, 8, 8)
    x[1, 2, 7, 5] = NAN
    (where,) = assert_same_kinds(nn.Sequential(nets.basic().eval().layer1[0]), x, run)
    assert where[1].any() and not where[0].any()


def test_fp16_values_out_of_range_are_infinite_or_right() -> None:
    """Without fp16 arithmetic a net computes in fp32 between fp16 tensors: what is finite is right, where the stock
    net's fp16 tensors already overflow, and what does not fit the output's fp16 is infinite there."""
    net = nets.bottleneck().eval().half()
    with torch.no_grad():
        for block in net.layer1:
            block.bn3.weight.mul_(1e4)
        for norm in (net.layer2[0].bn1, net.layer2[0].downsample[1]):
            norm.weight.div_(1e4)
        x = torch.randn(2, 3, 32, 32).half()
        stock, exact = net(x), copy.deepcopy(net).double()(x.double())
        out = resnet_fast.accelerate(copy.deepcopy(net))(x)
        if conv_bn_act.compute_dtype(torch.float16) == torch.float32:
            assert exact.isfinite().all() and out.isfinite().all() and not stock.isfinite().all()
            torch.testing.assert_close(out.double(), exact, rtol=2e-2, atol=2e-2)
        else:
            assert torch.equal(out.isnan(), stock.isnan())
        (where,) = kinds(sequential(resnet_fast.accelerate(copy.deepcopy(net)), x))  # fp16 between blocks
        (want,) = kinds(sequential(net, x))
        assert torch.equal(where, want)
