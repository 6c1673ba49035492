"""The log of a run: ``log.jsonl``, one JSON object per line, and the same figures for TensorBoard.

``kind`` is ``run`` (how it started or resumed), ``train`` (every few steps), ``epoch`` (training and validation error)
or ``note``. A run that resumes from step s first removes what was logged after s, so that no step is logged twice. A
figure that is not finite, such as the validation loss of a net that diverges, is ``null``.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from pathlib import Path
from typing import Any

from ..errors import UserError, missing_package
from ..io import safe_files
from .disk import no_room, write_file

NAME = "log.jsonl"
MOST = 2**31
"""The most bytes of a log that is read: ten million lines."""


def read_log(out: Path) -> list[dict[str, Any]]:
    """Return the lines of the log in ``out``, without damaged ones, such as the last line of a killed run.

    Raises:
        UserError: The log exists and cannot be read.
    """
    try:
        text = safe_files.read_plain(out / NAME, MOST).decode(errors="replace")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError("a log to read", f"{out / NAME} ({error.strerror})", "repair or remove it") from error
    return [line for line in map(_line, text.splitlines()) if line is not None]


def _line(text: str) -> dict[str, Any] | None:
    try:
        line = safe_files.json_value(text)
    except ValueError:
        return None
    known = isinstance(line, dict) and isinstance(line.get("kind"), str) and isinstance(line.get("step"), int)
    return line if known else None


WRITTEN = (NAME, "curves.png", "best.safetensors", "model.safetensors")
"""Files that a run writes into its folder."""


def check_place(out: Path) -> None:
    """Raise UserError if a run in ``out`` would overwrite files that no run wrote: there is no log with them."""
    there = [name for name in WRITTEN if (out / name).exists() and (out / name).stat().st_size]
    if there and not read_log(out):
        got = f"{out}, where {', '.join(there)} would be lost: there is no log of a run with them"
        raise UserError("an output folder that is a run's, or new", got, "name another with --out")


def of_kind(out: Path, kind: str) -> list[dict[str, Any]]:
    """Return the lines of one kind in the log of ``out``."""
    return [line for line in read_log(out) if line["kind"] == kind]


class FolderLock:
    """The right to write into a folder, held until the process ends or :meth:`release`.

    Raises:
        UserError: Another run has it, or the folder cannot be written.
    """

    def __init__(self, out: Path):
        try:
            out.mkdir(parents=True, exist_ok=True)
            self.file = open(out / "run.lock", "a+", encoding="latin-1")  # noqa: SIM115 - held open on purpose
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
        try:
            self.file.seek(0)
            if self.file.read(100).strip("0123456789"):
                self.file.close()
                got = f"{out / 'run.lock'}, which no run wrote and would be lost"
                raise UserError("an output folder that is a run's, or new", got, "name another with --out")
            self.file.truncate(0)
            self.file.write(str(os.getpid()))
            self.file.flush()
        except OSError as error:
            with contextlib.suppress(OSError):
                self.file.close()
            raise no_room(out / "run.lock", error) from error
        # A worker process may outlive a killed run by seconds. It must not keep the lock from the restarted run.
        os.register_at_fork(after_in_child=self.file.close)

    def release(self) -> None:
        """Give the folder back."""
        self.file.close()


class RunLog:
    """The log of a run that starts or resumes at ``step``, with event files too if ``tensorboard``."""

    def __init__(self, out: Path, step: int, tensorboard: bool):
        kept = [line for line in read_log(out) if line["step"] <= step] if step else []
        self.events = Events(out / "tensorboard", step) if tensorboard else None
        write_file(out / NAME, "".join(safe_files.json_text(line) + "\n" for line in kept).encode())
        try:
            self.file = open(out / NAME, "a", buffering=1)  # noqa: SIM115 - closed by close()
        except OSError as error:
            raise no_room(out / NAME, error) from error

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Append a line. It is in the file when this returns. Raises UserError if it cannot be written."""
        line = {"kind": kind, "step": step, "time": round(time.time(), 3)} | values
        try:
            self.file.write(safe_files.json_text(line) + "\n")
        except OSError as error:
            raise no_room(Path(self.file.name), error) from error
        if self.events is not None:
            numbers = {f"{kind}/{n}": v for n, v in values.items() if isinstance(v, (int, float))}
            self.events.write(numbers, step)

    def close(self) -> None:
        """Close the files. What could not be written, which was reported at the time, is given up."""
        with contextlib.suppress(OSError):
            self.file.close()
        if self.events is not None:
            self.events.close()


class Events:
    """An event file in ``folder`` for TensorBoard, which replaces what older files have from ``step`` on.

    torch's SummaryWriter writes in another thread, where a full disk becomes a traceback and a later error.
    """

    def __init__(self, folder: Path, step: int):
        try:
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog
            from tensorboard.compat.proto.summary_pb2 import Summary
            from tensorboard.summary.writer.record_writer import RecordWriter
        except ImportError as error:
            raise missing_package(
                "tensorboard", "which writes event files", error, "train", "give --no-tensorboard"
            ) from error
        self.event, self.summary = Event, Summary
        now = time.time()
        self.path = folder / f"events.out.tfevents.{int(now):010d}.{socket.gethostname()}.{os.getpid()}.{now % 1:.6f}"
        try:
            folder.mkdir(exist_ok=True)
            self.file = open(self.path, "wb")  # noqa: SIM115 - closed by close()
        except OSError as error:
            raise no_room(self.path, error) from error
        self.records = RecordWriter(self.file)
        self._append(Event(wall_time=now, file_version="brain.Event:2"))
        self._append(Event(wall_time=now, step=step, session_log=SessionLog(status=SessionLog.START)))

    def write(self, numbers: dict[str, float], step: int) -> None:
        """Write a figure per name. Raises UserError if they cannot be written."""
        values = [self.summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
        self._append(self.event(wall_time=time.time(), step=step, summary=self.summary(value=values)))

    def _append(self, event: Any) -> None:
        try:
            self.records.write(event.SerializeToString())
            self.records.flush()
        except OSError as error:
            raise no_room(self.path, error) from error

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.file.close()
