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


def test_stochastic_depth_stands_in_the_way_in_training_only() -> None:
    block = resnet_fast.accelerate(net(drop_path_rate=0.5)).layer4[1]
    assert block.unfusable() == ""
    assert block.train().unfusable().startswith("expected drop_path to be absent in training, got DropPath")


@pytest.mark.parametrize(
    ("child", "layer"), [("aa", nn.AvgPool2d(2)), ("se", nn.Sigmoid()), ("drop_block", nn.Dropout())]
)
def test_an_addition_is_named(child: str, layer: nn.Module) -> None:
    block = resnet_fast.accelerate(net()).layer1[0]
    setattr(block, child, layer)
    assert block.unfusable().startswith(f"expected {child} to be absent, got {type(layer).__name__}")


def test_a_deep_stem_runs_its_layers_and_the_blocks_fuse() -> None:
    model = resnet_fast.accelerate(net("resnet10t"))
    assert model.unfusable().startswith("expected conv1 to be a plain Conv2d, got Sequential")
    assert [block.unfusable() for stage in (model.layer1, model.layer2) for block in stage] == ["", ""]


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
