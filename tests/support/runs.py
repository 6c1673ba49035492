"""What a run left in its log, and the function that draws its curves, which tests replace."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from resnet_fast.training import curves, runlog

Make = Callable[..., Any]
draw_curves = curves.write_curves
"""The real one: see the fixture ``quick``."""


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
