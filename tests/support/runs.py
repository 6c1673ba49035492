"""What a run left in its log, a run to be killed, and the function that draws its curves, which tests replace."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from resnet_fast.training import curves, runlog
from resnet_fast.training.loop import train
from resnet_fast.training.options import RunOptions, Tick, Watch
from resnet_fast.training.recipe import Recipe
from tests.support.processes import LIMIT_S

Make = Callable[..., Any]
draw_curves = curves.write_curves
"""The real one: see the fixture ``quick``."""

AHEAD = 5
"""Steps that a run to be killed may take beyond the one that its killer waits for."""


def train_until_killed(chosen: Recipe, run: RunOptions, last: int) -> None:
    """Train up to step ``last`` and wait there: on a busy machine a run would end before anybody kills it."""

    def wait(tick: Tick) -> None:
        if tick.step >= last:
            time.sleep(LIMIT_S)
            raise TimeoutError(f"nobody killed the run at step {tick.step} within {LIMIT_S} s")

    train(chosen, run, Watch(step=wait))


def steps(out: Path, kind: str = "train") -> list[int]:
    return [line["step"] for line in runlog.of_kind(out, kind)]


def assert_log_is_whole(out: Path, last: int) -> None:
    """A line per step, one per epoch, in order, each once; no note of one step twice."""
    assert steps(out) == list(range(1, last + 1))
    assert steps(out, "epoch") == sorted(set(steps(out, "epoch")))
    notes = Counter(
        (line["step"], line["text"]) for line in runlog.of_kind(out, "note") if "going on" not in line["text"]
    )
    assert not [note for note, count in notes.items() if count > 1]
