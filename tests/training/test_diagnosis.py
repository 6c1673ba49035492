"""A loss that is no number: which layer it began in, and that no weight was moved by it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from resnet_fast.training import checkpoints, optim
from resnet_fast.training.diagnosis import NotFinite, first_overflow
from resnet_fast.training.distributed import World
from resnet_fast.training.loader import Part
from resnet_fast.training.loop import train
from resnet_fast.training.options import RunOptions, Tick, Watch
from resnet_fast.training.recipe import Recipe
from resnet_fast.training.step import Normalise, TrainingStep

LARGEST = {"none": 3e38, "bfloat16": 3e38, "float16": 6e4}
"""Weights that the dtype holds, whose sums it does not."""


def planted(recipe: Recipe, value: float) -> nn.Module:
    model = optim.build_net(recipe, 10)
    with torch.no_grad():
        model.get_submodule("layer2.0.conv1").weight.fill_(value)
    return model


def stepper(recipe: Recipe, model: nn.Module) -> TrainingStep:
    normalise = Normalise((0.5,), (0.25,), torch.device("cpu"), True)
    return TrainingStep(recipe, model, optim.build_optimizer(model, recipe), normalise, World(), 10)


@pytest.mark.parametrize("amp", ["none", "bfloat16", "float16"])
def test_the_layer_that_overflowed_is_named_and_no_weight_moves(amp: str, tiny: Callable[..., Recipe]) -> None:
    recipe = tiny(amp=amp)
    model = planted(recipe, LARGEST[amp])
    before = [p.detach().clone() for p in model.parameters()]
    part = Part(torch.randint(256, (4, 1, 8, 8), dtype=torch.uint8), torch.arange(4))
    dtype = "float32" if amp == "none" else amp
    with pytest.raises(NotFinite, match=rf"the loss is nan: first in layer2\.0\.conv1 \(Conv2d, torch\.{dtype}\)") as e:
        stepper(recipe, model)(iter([part]), 4, rate=0.1)
    assert "; its input: 0 of " in str(e.value)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_the_model_is_left_as_it_was(tiny: Callable[..., Recipe], same: Callable[[Any, Any], None]) -> None:
    model = planted(tiny(), 3e38)
    x, before = torch.randn(4, 3, 8, 8), copy.deepcopy(model.state_dict())
    classes = [type(m) for m in model.modules()]
    assert "first in layer2.0.conv1" in first_overflow(model, x, contextlib.nullcontext())
    same(model.state_dict(), before)
    assert [type(m) for m in model.modules()] == classes
    assert not any(m._forward_hooks for m in model.modules())


def test_a_broken_batch_is_no_layers_fault(tiny: Callable[..., Recipe]) -> None:
    x = torch.randn(4, 3, 8, 8)
    x[2, 1, 3, 4] = torch.nan
    text = first_overflow(optim.build_net(tiny(), 10), x, contextlib.nullcontext())
    assert text.startswith("the batch itself is broken: 1 of 768 values not finite")


def test_broken_weights_are_older_than_the_step(tiny: Callable[..., Recipe]) -> None:
    model = planted(tiny(), torch.nan)
    text = first_overflow(model, torch.randn(4, 3, 8, 8), contextlib.nullcontext())
    assert text.startswith("before this step layer2.0.conv1.weight was broken already")


def test_a_net_that_is_finite(tiny: Callable[..., Recipe]) -> None:
    text = first_overflow(optim.build_net(tiny(), 10), torch.randn(4, 3, 8, 8), contextlib.nullcontext())
    assert text == "every layer's output is finite: the loss itself overflowed"


def test_a_net_that_was_never_accelerated() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    nn.init.constant_(model[1].weight, 3e38)
    assert "first in 1 (Linear, torch.float32)" in first_overflow(
        model, torch.full((2, 4), 9.0), contextlib.nullcontext()
    )


def test_a_diverging_run_stops_with_its_checkpoints_as_they_were(
    tiny: Callable[..., Recipe], options: Callable[..., RunOptions], monkeypatch: pytest.MonkeyPatch
) -> None:
    nets: list[nn.Module] = []
    build = optim.build_net

    def kept(recipe: Recipe, classes: int) -> nn.Module:
        nets.append(build(recipe, classes))
        return nets[-1]

    def spoil(tick: Tick) -> None:
        if tick.step == 3:
            with torch.no_grad():
                nets[-1].get_submodule("layer3.1.conv2").weight.fill_(3e38)

    monkeypatch.setattr(optim, "build_net", kept)
    run = options(save_steps=2)
    with pytest.raises(NotFinite, match=r"layer3\.1\.conv2"):
        train(tiny(), run, Watch(step=spoil))
    assert [p.name for p in checkpoints.found(run.out)] == ["step-00000002"]
    nets.clear()
    monkeypatch.setattr(optim, "build_net", build)
    again = options(save_steps=2, resume="auto")
    assert train(tiny(), again).finished
