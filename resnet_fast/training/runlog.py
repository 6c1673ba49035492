"""What a run wrote down: ``log.jsonl``, one JSON object per line, and the same figures for TensorBoard.

``kind`` is ``run`` (how it began or went on), ``train`` (every few steps), ``epoch`` (training and validation error) or
``note``. A run that goes on from step s first removes what was logged after s, so that no step is there twice.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from pathlib import Path
from typing import Any

from ..errors import UserError, missing_package
from .checkpoint import no_room, write_whole

NAME = "log.jsonl"


def read(out: Path) -> list[dict[str, Any]]:
    """The lines of ``out``'s log; a last line that a killed run left unfinished is not one."""
    path = out / NAME
    if not path.exists():
        return []
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def of_kind(out: Path, kind: str) -> list[dict[str, Any]]:
    return [line for line in read(out) if line["kind"] == kind]


class Lock:
    """The right to write into a folder, held as long as the process lives, however it ends."""

    def __init__(self, out: Path):
        try:
            out.mkdir(parents=True, exist_ok=True)
            self.file = open(out / "run.lock", "a+")  # noqa: SIM115 - held open on purpose
        except OSError as error:
            raise UserError("a folder to write to", f"{out} ({error.strerror})", "name another with --out") from error
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.file.seek(0)
            owner = self.file.read().strip()
            self.file.close()
            raise UserError(
                "one run per output folder", f"{out}, where process {owner} is at work", "name another with --out"
            ) from error
        self.file.truncate(0)
        self.file.write(str(os.getpid()))
        self.file.flush()
        # A worker process that outlives a killed run for seconds must not hold its lock: the restarted run needs it.
        os.register_at_fork(after_in_child=self.file.close)

    def release(self) -> None:
        self.file.close()


class RunLog:
    """The log of a run that starts, or goes on, at ``step``. ``tensorboard``: also event files."""

    def __init__(self, out: Path, step: int, tensorboard: bool):
        kept = [line for line in read(out) if line.get("step", 0) <= step] if step else []
        write_whole(out / NAME, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self.file = open(out / NAME, "a", buffering=1)  # noqa: SIM115 - closed by close()
        self.events: Any = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise missing_package(
                    "tensorboard", "which writes event files", error, "train", "give --no-tensorboard"
                ) from error
            self.events = SummaryWriter(str(out / "tensorboard"), purge_step=step)

    def write(self, kind: str, step: int, **values: Any) -> None:
        line = {"kind": kind, "step": step, "time": round(time.time(), 3)} | values
        try:
            self.file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise no_room(Path(self.file.name), error) from error
        if self.events is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self.events.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        self.file.close()
        if self.events is not None:
            self.events.close()
