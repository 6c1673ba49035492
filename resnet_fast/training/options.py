"""Options of a run other than its recipe, and what a run reports while it runs and at its end."""

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
    """How to run a recipe. None of it changes the result.

    Attributes:
        out: The folder of the run.
        resume: ``auto``, the folder of a checkpoint or of a run; "" starts a new run.
        device: ``cpu``, ``cuda`` or ``cuda:0``.
        parallel: ``ddp`` or ``fsdp``, with several processes.
        workers: Processes that read images; None chooses.
        threads: CPU threads of the net; None leaves torch's number.
        strict_data: Decode all images first, and end with an error if one cannot be read.
        save_steps: Steps between checkpoints; 0 spends a hundredth of the time on them.
        keep: The number of checkpoints that stay, not counting the best one.
        log_every: Steps per line of the log.
        tensorboard: Write event files.
        probe: Measure the input pipeline alone before the first step.
        deterministic: Use only deterministic cuDNN algorithms.
        stop_after: Save and end after that many steps of this process.
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
        """Raise UserError for the first option that cannot be used."""
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
    """What a run reports after each step. ``loss``, ``error`` and the rest are those of the last log line."""

    step: int
    steps: int
    epoch: float
    loss: float
    error: float
    images_per_s: float
    waiting: float


@dataclass
class Watch:
    """Functions that the first process calls after each step, with each epoch's log line, and with notes."""

    step: Callable[[Tick], None] = lambda tick: None
    epoch: Callable[[dict[str, Any]], None] = lambda line: None
    note: Callable[[str], None] = lambda text: None


@dataclass(frozen=True)
class RunResult:
    """How a run ended. If ``finished`` is False, ``stopped_by`` stopped it and it can be resumed."""

    out: Path
    step: int
    finished: bool
    stopped_by: str
    seconds: float
    epochs: list[dict[str, Any]] = field(repr=False)
