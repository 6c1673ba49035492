"""Read folders of result files: what `make gpu-check`, `make gpu-bench` and `resnet-fast bench` write, and the table of
instructions on the host.

A file is known by its content, not by its name. A run that was cut leaves fewer rows, a folder without ``env.json``, or
a line that ends in its middle: what is there is read, and :class:`ResultSet` says what is not. A file that cannot be
what a cut left is broken, and raises.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from resnet_fast.errors import UserError, printable
from resnet_fast.io import safe_files

from ..providers import OURS

Row = dict[str, Any]
VERSIONS = ("torch", "triton", "cuda", "cudnn", "driver", "onnxruntime", "openvino")
WANTED = "a folder with result files (bench.jsonl, check.jsonl, bench.json, host-instructions.json)"
TODO = "measure with `make gpu-bench` or `resnet-fast bench`, or name another folder"
HALF_VALUE = re.compile(r"(t|tr|tru|f|fa|fal|fals|n|nu|nul|-|\d*\.|\d*[eE][+-]?|u[0-9a-fA-F]{0,3})?\s*")
"""What is left of a JSON value whose writer was stopped inside it."""


@dataclass(frozen=True)
class Run:
    """Where figures come from: one folder or file. Empty texts: not recorded."""

    name: str
    device: str
    versions: tuple[tuple[str, str], ...] = ()
    commit: str = ""
    date: str = ""
    command: str = ""
    source: str = ""

    @property
    def versions_text(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.versions) or "versions not recorded"


@dataclass(frozen=True)
class PeerTime:
    """What one path took. ``ms`` is the median; ``error`` says how far its output is from which reference."""

    peer: str
    stock: bool
    ms: float
    images_per_s: float
    quartiles: tuple[float, float] | None = None
    error: str = ""
    peak_gib: float | None = None
    note: str = ""

    @property
    def ours(self) -> bool:
        return self.peer.startswith(OURS)


@dataclass(frozen=True)
class MeasuredCell:
    """One net at one batch size, measured in one run: the only place where times may be divided by each other.

    ``missing``: why a path has no time.
    """

    run: Run
    case: str
    kind: str
    net: str
    precision: str
    batch: int
    image: int | None
    times: tuple[PeerTime, ...]
    missing: tuple[tuple[str, str], ...]
    date: str
    commit: str

    @property
    def best_stock(self) -> PeerTime | None:
        """The fastest path that PyTorch alone offers; None if none was measured here."""
        return min((t for t in self.times if t.stock), key=lambda t: t.ms, default=None)


@dataclass(frozen=True)
class LaunchTime:
    """One launch of a convolution: its work, and the median microseconds by kernel."""

    run: Run
    name: str
    batch: int
    flops: float
    nbytes: float
    us: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class StepProfile:
    """The kernels of one step: name, launches, microseconds."""

    run: Run
    net: str
    batch: int
    of: str
    peer: str
    kernels: tuple[tuple[str, int, float], ...]
    note: str


@dataclass(frozen=True)
class CheckedCase:
    """What a check found: ``error`` relative to fp64 and ``ratio`` to eager's own error, where it computed them."""

    run: Run
    case: str
    status: str
    error: float | None
    ratio: float | None
    note: str


@dataclass(frozen=True)
class HostInstructions:
    """Instructions of a step on the host, by case: ours and stock's."""

    run: Run
    steps: tuple[tuple[str, int, int], ...]


@dataclass
class ResultSet:
    """All that was read. ``cells`` are the latest of their case and run, ``earlier`` the ones before them.

    ``ceilings``: value and unit by run and name. ``cut``: unfinished lines by file. ``other``: files that are no
    results.
    """

    cells: list[MeasuredCell] = field(default_factory=list)
    earlier: list[MeasuredCell] = field(default_factory=list)
    launches: list[LaunchTime] = field(default_factory=list)
    profiles: list[StepProfile] = field(default_factory=list)
    checks: list[CheckedCase] = field(default_factory=list)
    hosts: list[HostInstructions] = field(default_factory=list)
    failed: list[tuple[Run, str, str]] = field(default_factory=list)
    ceilings: dict[Run, dict[str, tuple[float, str]]] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)
    cut: dict[str, int] = field(default_factory=dict)
    other: list[str] = field(default_factory=list)


def read(folders: Sequence[Path]) -> ResultSet:
    """Read every result file in ``folders`` and the folders inside them; a file may be named too.

    Raises:
        UserError: a folder does not exist, a file is broken, or there is no result at all.
    """
    found = ResultSet()
    for top in folders:
        for path, name in _files(top):
            content = _content(path)
            if path.suffix == ".jsonl":
                _read_lines(path, name, content, found)
            else:
                _read_json(path, name, content, found)
    if not found.runs:
        raise UserError(WANTED, f"no result in {', '.join(map(str, folders))}", TODO)
    return found


def _files(top: Path) -> Iterator[tuple[Path, str]]:
    """Yield each JSON file, and its name in the report: its path below the folder that was named."""
    if top.is_file():
        yield top, top.name
        return
    if not top.is_dir():
        raise UserError(WANTED, f"{top}, which does not exist", TODO)
    for path in sorted(top.rglob("*.json*")):
        below = path.relative_to(top)
        if path.suffix in (".json", ".jsonl") and path.is_file() and not any(p.startswith(".") for p in below.parts):
            yield path, (Path(top.resolve().name) / below).as_posix()


def _content(path: Path) -> str:
    try:
        return safe_files.read_plain(path).decode()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "not UTF-8"
        raise UserError("a result file that can be read", f"{path} ({why})", TODO) from error


def _broken(where: str, why: str) -> UserError:
    return UserError(
        "a whole result file", f"{where}: {printable(why)}", "delete or restore the file, or name another folder"
    )


def _read_json(path: Path, name: str, content: str, found: ResultSet) -> None:
    try:
        value = safe_files.json_value(content)
    except ValueError as error:
        raise _broken(str(path), str(error)) from error
    if isinstance(value, dict) and {"rows", "samples_ns", "provenance"} <= value.keys():
        _bench_report(Fields(value, str(path)), name, found)
    elif isinstance(value, dict) and {"versions", "budget"} <= value.keys():
        _host_instructions(Fields(value, str(path)), name, found)
    elif path.name != "env.json":
        found.other.append(name)


def _read_lines(path: Path, name: str, content: str, found: ResultSet) -> None:
    rows: list[Fields] = []
    for number, line in enumerate(content.splitlines(), 1):
        where = f"{path}, line {number}"
        try:
            value = json.loads(line) if line.strip() else None
        except json.JSONDecodeError as error:
            if not _is_cut(line, error):
                raise _broken(where, str(error)) from error
            found.cut[name] = found.cut.get(name, 0) + 1
            continue
        if isinstance(value, dict) and {"key", "case", "status"} <= value.keys():
            rows.append(Fields(value, where))
        elif value is not None:
            if rows:
                raise _broken(where, "no row with key, case and status")
            found.other.append(name)  # lines of another program, such as the log of a training run
            return
    if rows or name in found.cut:
        _gpu_rows(path, name, rows, found)


def _is_cut(line: str, error: json.JSONDecodeError) -> bool:
    """Return whether the line is the beginning of a row, whose writer was stopped."""
    unfinished = error.msg.startswith("Unterminated string") or HALF_VALUE.fullmatch(line[error.pos :]) is not None
    return line.startswith("{") and unfinished


class Fields:
    """A row of a file, whose fields are read with their types; an error names the file and the line."""

    def __init__(self, row: Row, where: str) -> None:
        self.row, self.where = row, where

    def _get(self, name: str, kind: tuple[type, ...], what: str) -> Any:
        value = self.row.get(name)
        if not isinstance(value, kind) or (isinstance(value, bool) and bool not in kind):
            got = "nothing" if name not in self.row else repr(value)[:60]
            raise _broken(self.where, f"expected {what} as {name!r}, got {got}")
        return value

    def text(self, name: str) -> str:
        return str(self._get(name, (str,), "a text"))

    def number(self, name: str) -> float:
        return float(self._get(name, (int, float), "a number"))

    def positive(self, name: str) -> float:
        if (value := self.number(name)) <= 0:
            raise _broken(self.where, f"expected a number above 0 as {name!r}, got {value:g}")
        return value

    def whole(self, name: str) -> int:
        return int(self._get(name, (int,), "a whole number"))

    def group(self, name: str) -> Fields:
        return Fields(self._get(name, (dict,), "an object"), f"{self.where}, {name}")

    def groups(self, name: str) -> Iterator[tuple[str, Fields]]:
        """Yield the objects inside an object, by name."""
        group = self.group(name)
        return ((key, group.group(key)) for key in group.row)

    def several(self, name: str, least: int = 0) -> list[Any]:
        values = list(self._get(name, (list,), "a list"))
        if len(values) < least:
            raise _broken(self.where, f"expected at least {least} values as {name!r}, got {len(values)}")
        return values

    def numbers(self, name: str, least: int) -> list[float]:
        """Return a list of at least that many numbers."""
        values = self.several(name, least)
        if any(isinstance(v, bool) or not isinstance(v, (int, float)) for v in values):
            raise _broken(self.where, f"expected numbers as {name!r}, got {values!r:.60}")
        return [float(v) for v in values]

    def optional(self, name: str) -> float | None:
        return None if self.row.get(name) is None else self.number(name)

    def known(self, name: str) -> str:
        """Return what the file says there as text; empty if it says nothing."""
        value = self.row.get(name)
        return "" if value in (None, "", "unknown", "not installed") else str(value)


def _run(name: str, origin: Fields, device: str = "") -> Run:
    versions = tuple((key, value) for key in VERSIONS if (value := origin.known(key)))
    device = origin.known("gpu") or device or origin.known("cpu") or origin.known("device") or "device not recorded"
    if not origin.known("gpu") and (threads := origin.known("threads")):
        device += f", {threads} threads"
    return Run(name, device, versions, *(origin.known(key) for key in ("commit", "date", "command", "source")))


def _gpu_rows(path: Path, name: str, rows: list[Fields], found: ResultSet) -> None:
    """Read what the commands for a GPU wrote: the last row of a case is the one in force."""
    beside = path.with_name("env.json")
    known = Fields({}, "")
    if beside.exists():
        try:
            known = Fields(dict(safe_files.json_value(_content(beside))), str(beside))
        except (ValueError, TypeError) as error:
            if isinstance(error, UserError):
                raise
            raise _broken(str(beside), str(error)) from error
    parts = rows[-1].text("key").split(" | ") if rows else []
    run = _run(str(Path(name).parent), known, parts[1] if len(parts) > 1 else "")
    if run not in found.runs:
        found.runs.append(run)
    latest = {row.text("case"): row for row in rows}
    for row in rows:
        _gpu_row(run, row, row is latest[row.text("case")], found)


def _gpu_row(run: Run, row: Fields, last: bool, found: ResultSet) -> None:
    status, kind = row.text("status"), row.known("kind")
    if kind in ("inference", "training") and "peers" in row.row:
        (found.cells if last else found.earlier).append(_gpu_cell(run, row, kind))
    if not last:
        return
    if status == "failed":
        found.failed.append((run, row.text("case"), row.known("error")))
    elif status != "measured":
        ratio, error = row.optional("ratio"), row.optional("rel")
        note = row.known("reason") or row.known("note")
        found.checks.append(CheckedCase(run, row.text("case"), status, error, ratio, note))
    elif kind == "profile":
        found.profiles.append(_profile(run, row))
    elif row.text("case").startswith("ceiling "):
        value = row.positive("value"), row.text("unit")
        found.ceilings.setdefault(run, {})[row.text("case").removeprefix("ceiling ")] = value
    elif "conv" in row.row and "flops" in row.row:
        measured = row.group("us")
        us = tuple((name, measured.numbers(name, 3)[1]) for name in measured.row)
        work = row.positive("flops"), row.positive("nbytes")
        found.launches.append(LaunchTime(run, row.text("conv"), row.whole("batch"), *work, us))


def _gpu_cell(run: Run, row: Fields, kind: str) -> MeasuredCell:
    times, first = [], ""
    for peer, part in row.groups("peers"):
        first = first or peer
        quartiles = part.numbers("quartiles_ms", 2) if "quartiles_ms" in part.row else None
        away = part.optional("difference")
        times.append(
            PeerTime(
                peer,
                bool(part.row.get("stock", not peer.startswith(OURS))),
                part.positive("ms"),
                part.positive("images_per_s"),
                None if quartiles is None else (quartiles[0], quartiles[1]),
                "" if away is None else "reference" if peer == first else f"{away:.1e} from {first}",
                part.optional("peak_gib"),
            )
        )
    reasons = row.group("skipped").row | row.group("errors").row
    image = row.whole("image") if "image" in row.row else None
    return MeasuredCell(
        run, row.text("case"), kind, row.text("net"), row.text("precision"), row.whole("batch"), image, tuple(times),
        tuple((peer, str(why)) for peer, why in reasons.items()), row.known("at"), row.known("commit"),
    )  # fmt: skip


def _profile(run: Run, row: Fields) -> StepProfile:
    kernels = []
    for entry in row.several("kernels", 1):
        kinds = [type(value) for value in entry] if isinstance(entry, list) else []
        if kinds not in ([str, int, float], [str, int, int]) or entry[2] <= 0:
            raise _broken(row.where, f"expected [name, launches, microseconds] per kernel, got {entry!r:.60}")
        kernels.append((entry[0], entry[1], float(entry[2])))
    where = row.text("net"), row.whole("batch"), row.text("of"), row.text("peer")
    return StepProfile(run, *where, tuple(kernels), row.known("note"))


def _bench_report(report: Fields, name: str, found: ResultSet) -> None:
    """Read what `resnet-fast bench` wrote."""
    origin = report.group("provenance")
    run = _run(name, origin)
    found.runs.append(run)
    cells: dict[tuple[str, str, int], list[Fields]] = {}
    for number, value in enumerate(report.several("rows"), 1):
        if not isinstance(value, dict):
            raise _broken(report.where, f"expected an object as row {number}")
        row = Fields(value, f"{report.where}, row {number}")
        cells.setdefault((row.text("case"), row.text("dtype"), row.whole("batch")), []).append(row)
    for (case, dtype, batch), rows in cells.items():
        kind = "training" if "loss_first" in rows[0].row else "inference"
        times = tuple(_bench_time(row) for row in rows if row.row.get("median_ms") is not None)
        missing = tuple(
            (row.text("provider"), row.known("note") or "did not run")
            for row in rows
            if row.row.get("median_ms") is None
        )
        image = origin.whole("image_size") if "image_size" in origin.row else None
        where = run, f"{case}, {dtype}, batch {batch}", kind, case, dtype, batch, image
        found.cells.append(MeasuredCell(*where, times, missing, run.date, run.commit))


def _bench_time(row: Fields) -> PeerTime:
    quartiles = None if row.optional("q1_ms") is None else (row.number("q1_ms"), row.number("q3_ms"))
    l2, away = row.optional("error_l2"), row.optional("loss_difference")
    error = "" if away is None else f"loss {away:+.1e} from stock's"
    if l2 is not None:
        error = f"{l2:.1e} of fp64's norm"
    note, precision = row.known("note"), row.known("precision")
    if precision not in ("", row.text("dtype")):
        note = "; ".join(filter(None, (f"computes in {precision}", note)))
    mib = row.optional("peak_mib")
    stock = bool(row.row.get("stock"))
    speed = row.positive("median_ms"), row.positive("images_per_s")
    return PeerTime(row.text("provider"), stock, *speed, quartiles, error, None if mib is None else mib / 1024, note)


def _host_instructions(table: Fields, name: str, found: ResultSet) -> None:
    """Read docs/tables/host-instructions.json or a file like it."""
    versions = table.group("versions")
    machine = versions.known("system") or "a host"
    counted = tuple((key, str(value)) for key, value in versions.row.items() if key != "system")
    run = Run(name, machine, counted, source="Written by benchmarks/tables/host_instructions.py.")
    found.runs.append(run)
    steps = []
    for case, sides in table.groups("budget"):
        ours, stock = (_sum(sides.group(side)) for side in ("ours", "stock"))
        steps.append((case, ours, stock))
    found.hosts.append(HostInstructions(run, tuple(steps)))


def _sum(phases: Fields) -> int:
    total = sum(phases.whole(name) for name in phases.row)
    if total <= 0:
        raise _broken(phases.where, f"expected instructions above 0, got {total}")
    return total


def devices_of(cells: Iterable[MeasuredCell]) -> list[str]:
    """Return the devices of cells, each once, in order."""
    return list(dict.fromkeys(cell.run.device for cell in cells))
