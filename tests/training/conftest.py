"""Runs small enough for a test, and what is left of one that ended."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from resnet_fast.training import checkpoints, curves, optim, recipe, runlog
from resnet_fast.training.options import RunOptions
from resnet_fast.training.recipe import Recipe


@pytest.fixture(autouse=True)
def _threads(same_threads: None) -> None:
    """A run sets torch's threads and leaves them so."""


@pytest.fixture
def tiny() -> Callable[..., Recipe]:
    """ResNet-20 on 64 digits of 8x8 pixels, 6 steps of 16 images: an epoch and a half."""

    def make(**changes: Any) -> Recipe:
        length = {} if "epochs" in changes else {"steps": 6}
        return recipe.load_recipe(None, {"size": 8, "subset": 64, "batch": 16, "lr": 0.05} | length | changes)

    return make


@pytest.fixture
def minute(monkeypatch: pytest.MonkeyPatch) -> None:
    """A net whose step takes a millisecond in place of the recipe's, in this process."""

    def build(recipe: Recipe, classes: int) -> nn.Module:
        torch.manual_seed(recipe.seed)
        last = nn.Linear(144, recipe.classes or classes)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), last)

    monkeypatch.setattr(optim, "build_net", build)


@pytest.fixture
def options(tmp_path: Path) -> Callable[..., RunOptions]:
    """RunOptions into ``tmp_path/NAME``, with a log line per step."""

    def make(name: str = "run", **changes: Any) -> RunOptions:
        return RunOptions(**({"out": tmp_path / name, "probe": False, "threads": 1, "log_every": 1} | changes))

    return make


@pytest.fixture
def left() -> Callable[[Path], dict[str, Any]]:
    """What must not depend on how often a run was stopped: the newest checkpoint's content, and the log of epochs."""

    def read(out: Path) -> dict[str, Any]:
        from safetensors.torch import load_file

        place = checkpoints.found(out)[0]
        meta = checkpoints.read_meta(place)
        clock = ("time", "seconds")
        state = torch.load(place / "state.pt", weights_only=True)
        state["random"] = state["random"]["torch"]  # the others' generators are not the run's
        return {
            "step": meta["step"],
            "sums": meta["sums"],
            "weights": {p.name: load_file(p) for p in sorted(place.glob("*.safetensors"))},
            "state": state,
            "epochs": [{k: v for k, v in e.items() if k not in clock} for e in runlog.of_kind(out, "epoch")],
            "export": load_file(out / "model.safetensors"),
        }

    return read


@pytest.fixture
def same() -> Callable[[Any, Any], None]:
    """Assert that two trees of tensors and plain values are bit for bit equal, and say where they are not."""

    def check(a: Any, b: Any, where: str = "") -> None:
        if isinstance(a, torch.Tensor):
            assert isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b), where
        elif isinstance(a, Mapping):
            assert a.keys() == b.keys(), where
            for key in a:
                check(a[key], b[key], f"{where}/{key}")
        elif isinstance(a, (list, tuple)):
            assert len(a) == len(b), where
            for i, (left, right) in enumerate(zip(a, b, strict=True)):
                check(left, right, f"{where}/{i}")
        else:
            assert a == b, where

    return check


@pytest.fixture
def quick(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train a minute net and draw nothing: the loop depends on neither. Slow tests start processes, which this does not
    reach, and train the real net."""
    if request.node.get_closest_marker("slow") is None:
        request.getfixturevalue("minute")
        monkeypatch.setattr(curves, "write_curves", lambda out, title: None)
