"""The figures of one line of the log: what was trained, and how long it took, since the line before."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Figures = tuple[float, float, int]
"""(mean loss, share of wrong answers, images) since an epoch began."""

NOTHING: Figures = (0.0, 0.0, 0)
BESIDES = ("forward", "backward", "optimizer", "check")
"""Parts of a step that are the net's; the rest is the loop's own."""


@dataclass
class Window:
    """``step`` and ``before`` are those of the last line; a checkpoint holds both, so that the first line after a
    resume says what it would have said.

    Times are this process's own: they count from ``timed_step`` and ``timed_images`` on, where it began.
    """

    step: int
    before: Figures
    timed_step: int
    timed_images: int
    since: float = field(default_factory=lambda: time.perf_counter())
    paused: float = 0.0
    """Seconds of validation and checkpoints, which are no part of a step."""

    @staticmethod
    def at(step: int, seen: Figures, saved: Mapping[str, Any] | None = None) -> Window:
        """The window at ``step`` where ``seen`` has been trained; ``saved`` is what :meth:`to_dict` returned there."""
        if saved is None:
            return Window(step, seen, step, seen[2])
        loss, error, images = saved["before"]
        return Window(saved["step"], (loss, error, images), step, seen[2])

    def to_dict(self) -> dict[str, Any]:
        """What goes into a checkpoint."""
        return {"step": self.step, "before": list(self.before)}

    def line(self, number: int, seen: Figures, waited: float, spent: Mapping[str, float]) -> dict[str, Any]:
        """The log's figures at step ``number``, after ``seen``. ``waited``: seconds for images; ``spent``: the step's.

        Begins anew.
        """
        now = time.perf_counter()
        took = max(now - self.since - self.paused, 1e-9)
        images, timed = seen[2] - self.before[2], seen[2] - self.timed_images
        steps = max(1, number - self.timed_step)
        host = took - waited - sum(spent.get(name, 0.0) for name in BESIDES)
        line = {
            "loss": (seen[0] * seen[2] - self.before[0] * self.before[2]) / max(images, 1),
            "error": (seen[1] * seen[2] - self.before[1] * self.before[2]) / max(images, 1),
            "images_per_s": round(timed / took, 1),
            "data_ms": round(1e3 * waited / steps, 3),
            "host_ms": round(1e3 * host / steps, 3),
            "step_ms": round(1e3 * took / steps, 3),
        }
        self.step, self.before = number, seen
        self.timed_step, self.timed_images, self.since, self.paused = number, seen[2], now, 0.0
        return line

    def new_epoch(self) -> None:
        """Count images from nothing again, as the sums do."""
        self.before, self.timed_images = NOTHING, 0
