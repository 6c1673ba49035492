"""Runs whose steps are replayed: their result is that of other runs, and what cannot be captured is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from torch import nn

import resnet_fast
from resnet_fast.errors import UserError
from resnet_fast.training import checkpoints, optim, runlog
from resnet_fast.training.distributed import World
from resnet_fast.training.loop import train
from resnet_fast.training.recipe import Recipe
from resnet_fast.training.setup import set_up
from tests.support import training_graph_cases
from tests.support.graph_cases import fallbacks, replays
from tests.support.training_graph_cases import TapeRecorder, tapes

Make = Callable[..., Any]

__all__ = ["tapes"]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, quick: None) -> Iterator[None]:
    """A real net of three blocks, in place of the recipe's."""

    def build(recipe: Recipe, classes: int) -> nn.Module:
        return resnet_fast.accelerate(training_graph_cases.small(), cuda_graph=recipe.cuda_graph)

    monkeypatch.setattr(optim, "build_net", build)
    yield


@pytest.mark.parametrize("how", [{"accumulate": 2}, {"amp": "bfloat16", "ema": 0.9}], ids=str)
def test_a_replayed_run_ends_where_another_ends(
    how: dict[str, Any], tapes: type[TapeRecorder], tiny: Make, options: Make, left: Make, same: Make
) -> None:
    plain = train(tiny(**how), options("plain"))
    run = train(tiny(cuda_graph=True, **how), options("run"))
    same(left(run.out), left(plain.out))
    parts = how.get("accumulate", 1)
    assert replays() == 6 * parts and len(tapes.captures) == 2 * parts and "CUDA graph" not in fallbacks()
    assert runlog.of_kind(run.out, "run")[0]["recipe"]["cuda_graph"]
    assert checkpoints.read_meta(checkpoints.found(run.out)[0])["recipe"]["cuda_graph"]


def test_a_run_goes_on_without_graphs(
    tapes: type[TapeRecorder], tiny: Make, options: Make, left: Make, same: Make
) -> None:
    train(tiny(cuda_graph=True), options(stop_after=3))
    assert replays() == 3
    train(tiny(), options(resume="auto"))
    assert replays() == 3
    same(left(options().out), left(train(tiny(), options("whole")).out))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "expected a GPU for cuda_graph, got device cpu; leave it out, or give --no-cuda-graph"),
        ({"model": "vgg16", "size": 32}, "expected a ResNet for cuda_graph, got vgg16"),
        ({"sync_bn": True, "backend": "triton"}, "expected BatchNorm for cuda_graph, got sync_bn"),
    ],
)
def test_what_cannot_be_captured_is_refused(
    changes: dict[str, Any], said: str, request: pytest.FixtureRequest, tiny: Make, options: Make
) -> None:
    if changes:
        request.getfixturevalue("tapes")
    with pytest.raises(UserError, match=said):
        train(tiny(cuda_graph=True, **changes), options())


def test_sharded_weights_are_refused(tapes: type[TapeRecorder], tiny: Make, options: Make) -> None:
    with pytest.raises(UserError, match="expected --parallel ddp for cuda_graph, got --parallel fsdp"):
        set_up(tiny(cuda_graph=True), options(parallel="fsdp"), World())


@pytest.mark.gpu
def test_gpu_a_run_is_replayed(tiny: Make, options: Make) -> None:
    resnet_fast.reset_stats()
    runs = [
        train(tiny(cuda_graph=replayed), options(name, device="cuda", deterministic=True))
        for name, replayed in (("plain", False), ("run", True))
    ]
    plain, run = ([line["loss"] for line in runlog.of_kind(each.out, "train")] for each in runs)
    assert run == pytest.approx(plain, rel=2e-2)
    assert replays() == 6 and "CUDA graph" not in fallbacks()
