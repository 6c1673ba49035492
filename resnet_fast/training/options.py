"""What a run is asked for besides its recipe, and what it says while it runs and at its end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import devices, limits
from ..errors import UserError
from . import distributed


@dataclass(frozen=True)
class RunOptions:
    """How to run a recipe, none of which changes what it computes.

    ``resume``: empty, ``auto``, a checkpoint's folder or a run's. ``workers``: None chooses. ``save_steps``: steps
    between checkpoints, 0 as often as costs a hundredth of the time; ``keep`` of them stay. ``log_every``: steps per
    log line. ``stop_after``: end (saved, to go on later) after that many steps of this process. ``probe``: measure
    the input pipeline by itself before the first step.
    """

    out: Path
    resume: str = ""
    device: str = "cpu"
    parallel: str = "ddp"
    workers: int | None = None
    threads: int | None = None
    strict_data: bool = False
    save_steps: int = 0
    keep: int = 2
    log_every: int = 10
    tensorboard: bool = False
    probe: bool = True
    deterministic: bool = False
    stop_after: int | None = None

    def check(self) -> None:
        """UserError for the first option that cannot be used."""
        for name in ("keep", "log_every", "stop_after"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} >= 1", str(value), f"correct --{name.replace('_', '-')}")
        if self.save_steps < 0:
            raise UserError("save_steps >= 0", str(self.save_steps), "correct --save-steps")
        limits.check_threads(self.threads)
        limits.check_workers(self.workers)
        if self.parallel not in distributed.PARALLEL:
            allowed = ", ".join(distributed.PARALLEL)
            raise UserError(f"parallel among {allowed}", repr(self.parallel), "correct --parallel")
        devices.check_device(self.device)


@dataclass(frozen=True)
class Tick:
    """What a run says of itself after each step. ``loss`` and ``error`` are those of the last log line."""

    step: int
    steps: int
    epoch: float
    loss: float
    error: float
    images_per_s: float
    waiting: float


@dataclass
class Watch:
    """Who is told what, in the first process: each step, each epoch's log line, and sentences worth reading."""

    step: Callable[[Tick], None] = lambda tick: None
    epoch: Callable[[dict[str, Any]], None] = lambda line: None
    note: Callable[[str], None] = lambda text: None


@dataclass(frozen=True)
class RunResult:
    """How a run ended. ``finished`` is False for one that was told to stop by ``stopped_by`` and may go on."""

    out: Path
    step: int
    finished: bool
    stopped_by: str
    seconds: float
    epochs: list[dict[str, Any]] = field(repr=False)
