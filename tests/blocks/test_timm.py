"""Features of timm: additions to a block, stochastic depth, deep stems, its methods."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import resnet_fast
from resnet_fast.backends.onednn import tiling

timm = pytest.importorskip("timm")


def net(name: str = "resnet18", **kwargs: object) -> nn.Module:
    return timm.create_model(name, pretrained=False, num_classes=10, **kwargs).eval()


def test_stochastic_depth_keeps_a_block_from_being_one_op_in_training_only() -> None:
    block = resnet_fast.accelerate(net(drop_path_rate=0.5)).layer4[1]
    x = torch.randn(1, 512, 2, 2)
    assert block.unfusable() == "" and len(block.parts(x)) == 1
    assert block.train().unfusable() == "" and block.parts(x) is None


@pytest.mark.parametrize(
    ("child", "layer"), [("aa", nn.AvgPool2d(2)), ("se", nn.Sigmoid()), ("drop_block", nn.Dropout())]
)
def test_an_addition_is_named(child: str, layer: nn.Module) -> None:
    block = resnet_fast.accelerate(net()).layer1[0]
    setattr(block, child, layer)
    assert block.unfusable().startswith(f"expected {child} to be absent, got {type(layer).__name__}")


def test_a_deep_stem_and_the_blocks_fuse() -> None:
    model = resnet_fast.accelerate(net("resnet10t"))
    assert [block.unfusable() for stage in (model.layer1, model.layer2) for block in stage] == ["", ""]
    assert [call.op for call in model.stem_parts(torch.randn(1, 3, 32, 32))] == ["conv_bn_act", "conv_bn_act", "stem"]


@pytest.mark.parametrize(
    ("place", "layer", "reason"),
    [
        (1, nn.GroupNorm(1, 24), "expected conv1.1 to be BatchNorm2d"),
        (5, nn.SiLU(), "expected conv1.5 to be a plain ReLU, got SiLU"),
        (6, nn.Identity(), "expected conv1.6 to be a plain Conv2d, got Identity"),
    ],
)
def test_another_layer_in_a_deep_stem_is_named(place: int, layer: nn.Module, reason: str) -> None:
    model = resnet_fast.accelerate(net("resnet10t"))
    model.conv1[place] = layer
    assert model.unfusable().startswith(reason)
    del model.conv1[place]
    assert model.unfusable().startswith("expected conv1 to be a plain Conv2d, or seven plain layers, got Sequential")


def test_tiles_join_up(monkeypatch: pytest.MonkeyPatch) -> None:

    stock = net()
    fused = resnet_fast.accelerate(copy.deepcopy(stock))
    x = torch.randn(3, 3, 32, 32)
    assert fused.images_are_independent()
    monkeypatch.setattr(tiling, "last_level_cache", lambda: 1)
    resnet_fast.reset_stats()
    with torch.no_grad():
        torch.testing.assert_close(fused(x), stock(x), rtol=1e-4, atol=1e-4)
    assert resnet_fast.stats()["calls"] == {"basic_block/onednn": 24, "stem/onednn": 3}


@pytest.mark.parametrize("name", ["resnet18", "resnet10t", "seresnet18"])
def test_scripting_leaves_the_model_as_it_is(name: str) -> None:
    stock = net(name)
    fused = resnet_fast.accelerate(copy.deepcopy(stock))
    before = [(n, type(m), id(m)) for n, m in fused.named_modules()]
    scripted = torch.jit.script(fused)
    assert [(n, type(m), id(m)) for n, m in fused.named_modules()] == before
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(scripted(x), stock(x), rtol=1e-4, atol=1e-4)
