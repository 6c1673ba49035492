"""Hooks see on the accelerated net exactly what they see on the stock one, in batch tiles too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resnet_fast
from resnet_fast.backends.onednn import tiling
from tests.support import nets
from tests.support.nets import twin

PLACES = [
    "", "conv1", "bn1", "relu", "maxpool", "layer1", "layer1.0", "layer1.0.conv1", "layer1.1.bn2",
    "layer1.1.relu", "layer2.0.downsample", "layer2.0.downsample.0", "layer2.0.downsample.1", "layer3.0.conv2",
    "layer4", "avgpool", "fc",
]  # fmt: skip


@pytest.fixture
def tiny_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shrink the last-level cache until every image is a tile of its own."""
    monkeypatch.setattr(tiling, "last_level_cache", lambda: 1)


def watch(model: nn.Module, place: str, seen: list[Any]) -> Any:
    return model.get_submodule(place).register_forward_hook(
        lambda m, args, out: seen.append((tuple(a.detach().clone() for a in args), out.detach().clone()))
    )


@pytest.mark.usefixtures("tiny_cache")
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("place", PLACES)
def test_a_forward_hook_sees_what_stock_shows(place: str, train: bool) -> None:
    seen: list[list[Any]] = []
    x = torch.randn(3, 3, 32, 32)
    for model in twin():
        seen.append([])
        watch(model.train(train), place, seen[-1])
        with resnet_fast.use_backend("reference"), torch.no_grad():
            model(x)
    nets.assert_equal(seen[1], seen[0])
    assert len(seen[0]) == (2 if place.endswith("1.relu") else 1)


@pytest.mark.usefixtures("tiny_cache")
@pytest.mark.parametrize("place", PLACES)
def test_a_forward_hook_sees_the_whole_batch_on_auto(place: str) -> None:
    seen: list[list[Any]] = []
    x = torch.randn(3, 3, 32, 32)
    for model in twin():
        seen.append([])
        watch(model, place, seen[-1])
        with torch.no_grad():
            model(x)
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("place", PLACES)
def test_a_forward_hook_may_change_the_output(place: str) -> None:
    stock, fused = twin()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for model in (stock, fused):
            model.get_submodule(place).register_forward_hook(lambda m, args, out: out * 0.5 + 0.1)
        torch.testing.assert_close(fused(x), stock(x), rtol=1e-4, atol=1e-4)
        with resnet_fast.use_backend("reference"):
            nets.assert_equal(fused(x), stock(x))


@pytest.mark.parametrize("place", PLACES)
def test_a_forward_pre_hook_may_change_the_input(place: str) -> None:
    stock, fused = twin()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad(), resnet_fast.use_backend("reference"):
        for model in (stock, fused):
            model.get_submodule(place).register_forward_pre_hook(lambda m, args: (args[0] * 0.5 + 0.1,))
        nets.assert_equal(fused(x), stock(x))


@pytest.mark.parametrize("place", ["layer1.0.conv1", "layer2.0.downsample.0", "layer1.0", "layer3", "fc", "conv1"])
@pytest.mark.parametrize("pre", [True, False])
def test_backward_hooks(place: str, pre: bool) -> None:
    seen: list[list[Any]] = []
    x = torch.randn(2, 3, 32, 32)
    for model in twin():
        seen.append([])
        for m in model.modules():
            if isinstance(m, nn.ReLU):
                m.inplace = False  # PyTorch's own rule for full backward hooks
        module, out = model.get_submodule(place), seen[-1]
        if pre:
            module.register_full_backward_pre_hook(lambda m, grads, out=out: out.append([g.clone() for g in grads]))
        else:
            module.register_full_backward_hook(
                lambda m, gin, gout, out=out: out.append([g.clone() for g in (*gin, *gout) if g is not None])
            )
        try:
            model.train()(x).square().mean().backward()
        except RuntimeError as error:  # stock blocks add in place, which PyTorch forbids on some hooked outputs
            out.append(str(error)[:60])
    assert seen[0]
    nets.assert_equal(seen[1], seen[0])


def test_a_removed_hook_lets_the_block_fuse_again() -> None:
    _, fused = twin()
    x, seen = torch.randn(1, 3, 32, 32), []
    handle = watch(fused, "layer1.0.conv1", seen)
    with torch.no_grad():
        fused(x)
        handle.remove()
        with resnet_fast.strict():
            fused(x)
    assert len(seen) == 1


def test_a_hooked_block_names_itself() -> None:
    _, fused = twin()
    watch(fused, "layer1.0.conv1", [])
    resnet_fast.reset_stats()
    with torch.no_grad():
        fused(torch.randn(1, 3, 32, 32))
    assert resnet_fast.stats()["calls"] == {"basic_block/onednn": 4, "basic_block/stock": 1, "stem/onednn": 1}
    assert "Conv2d with a hook or a replaced forward" in str(resnet_fast.stats()["fallbacks"])


def test_global_hooks_see_every_inner_layer() -> None:
    from torch.nn.modules.module import register_module_forward_hook

    names: list[list[str]] = []
    for model in twin():
        names.append([])
        handle = register_module_forward_hook(lambda m, args, out: names[-1].append(type(m).__name__))
        try:
            with torch.no_grad():
                model(torch.randn(2, 3, 32, 32))
        finally:
            handle.remove()
    assert names[1] == names[0]
    assert names[0].count("Conv2d") == 14


def test_tensor_hooks_and_retained_gradients() -> None:
    """Keep a stage's output and read its gradient, as Grad-CAM does."""
    kept: list[Tensor] = []
    for model in twin():
        model.layer3.register_forward_hook(lambda m, args, out: (out.retain_grad(), kept.append(out))[0])
        model(torch.ones(1, 3, 32, 32)).max().backward()
    nets.assert_equal(kept[1].grad, kept[0].grad)


def test_flop_counter_counts_what_it_counts_on_stock() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    for model in twin():
        for mode in (True, False):
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                model.train(mode)(torch.randn(2, 3, 32, 32))
            counts.append(counter.get_total_flops())
    assert counts[0] > 0
    assert counts[2:] == counts[:2]
