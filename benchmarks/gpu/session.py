"""What the three commands share: options, the clock, results on disk that a cut run keeps, and the order of cases.

A command is a module with ``cases(settings)``: a list of :class:`GpuCase`, the same in the supervisor and in every
worker. Each result is one line of ``<folder>/<command>.jsonl``, written and synced at once. Its key is the case, the
GPU, the config space and the versions of torch and triton, and not the commit. What is on disk under the same key is
not run again, except what failed, which is tried again after all new cases. ``--fresh`` deletes earlier results.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from resnet_fast import devices
from resnet_fast.errors import UserError
from resnet_fast.io import safe_files
from resnet_fast.io.safe_files import json_text
from resnet_fast.tuning import configs

from .. import checkout, harness, provenance
from ..checkout import ROOT

INTERPRETER = "Triton interpreter"
HARD_LIMIT_S = 540.0
"""A command ends after nine minutes, whatever its budget: the last 20 s are for the report and for stopping."""

Row = dict[str, Any]


class Skipped(Exception):
    """Raised by a case that cannot run here; its text is the reason."""


@dataclass(frozen=True)
class Settings:
    """Options of a command. ``folder``: where results go; ``only``: part of the names of the cases to run."""

    command: str
    device: str = "cuda"
    folder: str = ""
    quick: bool = False
    budget: float = 500.0
    fresh: bool = False
    only: str = ""

    @property
    def path(self) -> Path:
        return Path(self.folder)

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    def to_json(self) -> str:
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class GpuCase:
    """One thing to check or measure. ``run`` returns the details of its row; an exception is a row that failed.

    ``limit_s``: seconds after which it counts as hanging; ``needs_s``: it is not begun with less of the budget left;
    ``known``: its row where nothing has to run for it.
    """

    name: str
    run: Callable[[], Row]
    limit_s: float = 60.0
    needs_s: float = 0.0
    known: Row | None = None


class BudgetClock:
    """The budget of a command in seconds, from the start of its process on."""

    def __init__(self, budget: float) -> None:
        self.start = time.monotonic()
        self.budget = budget

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.start

    @property
    def left(self) -> float:
        """Seconds left."""
        return self.budget - self.elapsed


def gpu_name(device: str) -> str:
    """Return the GPU's name, or that of the interpreter."""
    return torch.cuda.get_device_name() if device == "cuda" else INTERPRETER


def context(device: str) -> str:
    """Return the part of a key that all cases of a run share."""
    versions = f"torch {torch.__version__} | triton {provenance.version('triton')}"
    return f"{gpu_name(device)} | space {configs.SPACE} | {versions}"


def settings_from(command: str, what: str, argv: Sequence[str] | None = None) -> Settings:
    """Read the command line. For ``--device cpu`` restart the process with Triton's interpreter switched on."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog=f"python3 -m resnet_fast.benchmarks.gpu.{command}", description=what)
    parser.add_argument("--budget", type=float, default=500.0, help="seconds to spend, at most 520; default 500")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: in Triton's interpreter")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does every part work?")
    parser.add_argument("--fresh", action="store_true", help="delete the results of earlier runs")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains this")
    parser.add_argument("--out", type=Path, help="folder of the results; default benchmarks/results/<gpu>")
    o = parser.parse_args(arguments)
    if not 0 < o.budget <= HARD_LIMIT_S - 20:
        parser.error(f"expected a budget of at most {HARD_LIMIT_S - 20:.0f} seconds, got {o.budget:g}")
    try:
        checkout.require("the commands for a GPU")
    except UserError as error:
        parser.error(str(error))
    interpreting = os.environ.get("TRITON_INTERPRET", "") not in ("", "0")
    if o.device == "cpu" and not interpreting:
        os.execve(
            sys.executable,
            [sys.executable, "-m", f"{__package__}.{command}", *arguments],
            os.environ | {"TRITON_INTERPRET": "1"},
        )
    if o.device == "cuda" and interpreting:
        parser.error("expected compiled kernels on a GPU, got TRITON_INTERPRET; unset it")
    if o.device == "cuda" and not torch.cuda.is_available():
        parser.error("expected a CUDA device, got none; --device cpu --quick runs the same code in the interpreter")
    return Settings(command, o.device, str(_folder(o.out, o.device)), o.quick, o.budget, o.fresh, o.only)


def _folder(out: Path | None, device: str) -> Path:
    """``--out``, or the GPU's own folder; what the interpreter finds is no result, so it goes to a temporary one."""
    if out is not None:
        return out.resolve()
    if device == "cpu":
        return Path(tempfile.mkdtemp(prefix="resnet_fast_gpu_"))
    return ROOT / "benchmarks" / "results" / devices.file_stem(gpu_name(device))


def write_text(path: Path, text: str) -> None:
    """Write the whole file, or leave the one that was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    safe_files.write_whole(path, text.encode())


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a results file, without a line that a cut left unfinished."""
    rows = []
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        return []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "key" in row:
            rows.append(row)
    return rows


class Store:
    """A results file: one row per line, the last one of a key counts."""

    def __init__(self, path: Path, fresh: bool = False) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if fresh:
            path.unlink(missing_ok=True)
        elif path.exists() and not path.read_bytes().endswith(b"\n"):
            with path.open("a") as file:  # the last line was cut: the next one begins on its own
                file.write("\n")
        self.rows = {row["key"]: row for row in read_rows(path)}

    def add(self, row: Row) -> None:
        """Append a row; it is on disk when this returns."""
        with self.path.open("a") as file:
            file.write(json_text(row, separators=(",", ":")) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.rows[row["key"]] = row


@dataclass
class Session:
    """One run of a command: its budget, the results on disk, and the counts of what it did."""

    settings: Settings
    clock: BudgetClock
    store: Store
    context: str
    commit: str
    counts: dict[str, int] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    on_row: Callable[[], None] = lambda: None

    def key(self, name: str) -> str:
        """Return the key of a case's row."""
        return f"{name} | {self.context}"

    def row(self, name: str) -> Row | None:
        """Return the latest row of a case under this run's key."""
        return self.store.rows.get(self.key(name))

    def todo(self, cases: Iterable[GpuCase], done: Callable[[GpuCase], bool] | None = None) -> list[GpuCase]:
        """Return the cases to run: those never run, then those that failed.

        What is known without running is recorded here.

        Args:
            cases: in the order of their importance.
            done: decides in place of the results file whether a case need not run.
        """
        new, again = [], []
        for case in cases:
            if self.settings.only not in case.name:
                continue
            earlier = self.row(case.name)
            failed = earlier is not None and earlier["status"] == "failed"
            if done(case) if done else earlier is not None and not failed:
                self.counts["kept"] = self.counts.get("kept", 0) + 1
            elif failed:
                again.append(case)
            elif case.known is not None:
                self.record(case.name, case.known, quiet=True)
            else:
                new.append(case)
        return new + again

    def record(self, name: str, row: Row, quiet: bool = False) -> None:
        """Write a row, and print it on one line."""
        full = {"key": self.key(name), "case": name, **row, "at": provenance.now(), "commit": self.commit}
        self.store.add(full)
        status = row["status"]
        self.counts[status] = self.counts.get(status, 0) + 1
        if not quiet:
            note = row.get("error") or row.get("reason") or row.get("note") or ""
            self.say(f"{status:9s} {name}" + (f": {note}" if note else ""))
        self.on_row()

    def say(self, text: str) -> None:
        """Print a line with the seconds so far."""
        print(f"{self.clock.elapsed:6.1f} s  {text}", flush=True)

    def finish(self, cases: Iterable[GpuCase]) -> int:
        """Print the closing line; return 1 if the latest row of any of ``cases`` is a failure, else 0."""
        rows = [self.row(case.name) for case in cases]
        failed = [row["case"] for row in rows if row and row["status"] == "failed"]
        said = ", ".join(f"{n} {what}" for what, n in sorted(self.counts.items())) or "nothing to do"
        if self.left:
            said += f"; {len(self.left)} left for the next run: the budget was used up"
        self.say(f"{said}; results in {self.settings.folder}")
        for name in failed:
            print(f"FAILED  {name}")
        return 1 if failed else 0


def begin(settings: Settings, more: str = "") -> Session:
    """Open the results of a command and write the environment next to them. ``more``: part of each key."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that workers are stopped and the report is written
    clock = BudgetClock(settings.budget)
    folder = settings.path
    store = Store(folder / f"{settings.command}.jsonl", settings.fresh)
    shared = " | ".join(filter(None, (context(settings.device), more)))
    session = Session(settings, clock, store, shared, provenance.commit())
    update_environment(settings, {})
    kept = f", {len(store.rows)} rows of earlier runs" if store.rows else ""
    session.say(f"{session.context}; budget {settings.budget:.0f} s{kept}")
    return session


def update_environment(settings: Settings, more: Row) -> None:
    """Write ``env.json``: versions, GPU, driver and commit of the latest run, and what is added by ``more``."""
    path = settings.path / "env.json"
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        known = {}
    now = {"driver": "unknown"} | provenance.collect(settings.device)
    now |= {"gpu": gpu_name(settings.device), "config_space": configs.SPACE}
    now["command"] = f"python3 -m resnet_fast.benchmarks.gpu.{settings.command}"
    write_text(path, json_text(known | now | more, indent=1) + "\n")


def execute(case: GpuCase) -> Row:
    """Run a case in this process; return its row, also where it failed."""
    start = time.perf_counter()
    try:
        row = {"status": "passed", **case.run()}
    except Skipped as reason:
        row = {"status": "skipped", "reason": str(reason)}
    except Exception as error:  # a failure of any kind is a row of the report
        row = {"status": "failed", "error": harness.first_line(error)}
    return row | {"seconds": round(time.perf_counter() - start, 3)}


def run_limited(
    command: Sequence[str], limit_s: float, cwd: Path = ROOT, env: dict[str, str] | None = None, grace_s: float = 5.0
) -> tuple[int | None, str]:
    """Run a command; its children end with it.

    Returns:
        The exit code (None: stopped at the limit), and stdout and stderr together.
    """
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
        try:
            code: int | None = process.wait(max(0.1, limit_s))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)  # pytest closes its report
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(grace_s)
            end_group(process)
        output.seek(0)
        return code, output.read()


def end_group(process: subprocess.Popen[Any]) -> None:
    """Kill a process that was started in a session of its own, with what it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
