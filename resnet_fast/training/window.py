"""The figures of one line of the log: what was trained since the previous line, and how long it took."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Figures = tuple[float, float, int]
"""(mean loss, share of wrong answers, images) since the epoch began."""

NOTHING: Figures = (0.0, 0.0, 0)
NET_PARTS = ("forward", "backward", "optimizer", "check")
"""Parts of a step that the net takes; the rest is the time of the loop."""


@dataclass
class Window:
    """What happened since the last line of the log, at ``step`` with the figures ``before``.

    A checkpoint holds both, so that the first line after a resume says what it would have said without it. Times are
    those of this process: they count from ``timed_step`` and ``timed_images``, where it began.
    """

    step: int
    before: Figures
    timed_step: int
    timed_images: int
    since: float = field(default_factory=lambda: time.perf_counter())
    paused: float = 0.0
    """Seconds of validation and checkpoints, which do not count as steps."""

    @staticmethod
    def at(step: int, seen: Figures, saved: Mapping[str, Any] | None = None) -> Window:
        """Return the window at ``step`` after ``seen``. ``saved`` is what :meth:`to_dict` returned before a resume."""
        if saved is None:
            return Window(step, seen, step, seen[2])
        loss, error, images = saved["before"]
        return Window(saved["step"], (loss, error, images), step, seen[2])

    def to_dict(self) -> dict[str, Any]:
        """Return what a checkpoint holds."""
        return {"step": self.step, "before": list(self.before)}

    def line(self, number: int, seen: Figures, waited: float, spent: Mapping[str, float]) -> dict[str, Any]:
        """Return the figures of the log line at step ``number``, and start a new window.

        Args:
            number: Steps done.
            seen: The figures of the epoch so far.
            waited: Seconds spent waiting for images.
            spent: Seconds spent in the parts of a step, by name.
        """
        now = time.perf_counter()
        took = max(now - self.since - self.paused, 1e-9)
        images, timed = seen[2] - self.before[2], seen[2] - self.timed_images
        steps = max(1, number - self.timed_step)
        host = took - waited - sum(spent.get(name, 0.0) for name in NET_PARTS)
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
        """Start counting images at zero again, as the sums do."""
        self.before, self.timed_images = NOTHING, 0
