"""Compare providers in inference: prepare inputs and an fp64 reference, check every provider, time all together.

A cell is one case of a suite in one dtype at one batch size. Within a cell all providers run interleaved. A provider
that does not support the cell, or fails, keeps its row with the reason.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fast import devices, limits, numerics
from resnet_fast.errors import UserError
from resnet_fast.io import images, weights
from resnet_fast.models import registry
from resnet_fast.tools import trained

from . import harness, provenance, providers, suites

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
REFERENCE_IMAGES = 3
"""fp64 runs on this many images at most: enough to judge an error, and fp64 is slow."""

Progress = Callable[[int, int, str], None]
"""``progress(done, total, what)``: steps done so far, steps in all, what runs now."""


@dataclass(frozen=True)
class BenchOptions:
    """What to compare. ``budget`` in seconds for the whole run, preparation included; at least one round is run."""

    model: str = "resnet50"
    suite: str = "models"
    batches: tuple[int, ...] = (1, 16)
    dtypes: tuple[str, ...] = ("float32",)
    providers: tuple[str, ...] = providers.NAMES
    images: tuple[Path, ...] = ()
    weights: Path | None = None
    size: int | None = None  # the net's own
    rounds: int = 10
    budget: float = 300.0
    device: str = "cpu"
    threads: int | None = None
    seed: int = 0

    def check(self) -> None:
        """Check all options before anything is measured.

        Raises:
            UserError: for the first option that cannot be used.
        """
        if not self.batches or min(self.batches) < 1:
            raise UserError("batch sizes >= 1", _listed(self.batches), "correct --batch, for instance --batch 1,16")
        unknown = [d for d in self.dtypes if d not in DTYPES]
        if unknown or not self.dtypes:
            raise UserError(f"dtypes among {', '.join(DTYPES)}", _listed(unknown), "correct --dtype")
        self._check_competitors()
        if self.rounds < 1:
            raise UserError("--rounds >= 1", str(self.rounds), "correct --rounds")
        limits.check_threads(self.threads)
        side = registry.image_size(self.model) if self.size is None else self.size
        limits.check_input(max(self.batches), side, names=("--batch", "--size"))
        if not self.budget > 0:
            raise UserError("--budget > 0 seconds", str(self.budget), "correct --budget")
        devices.check_device(self.device)

    def _check_competitors(self) -> None:
        """Raise a UserError for a suite or a provider that does not exist."""
        if not self.providers:
            raise UserError(f"providers among {', '.join(providers.NAMES)}", "none", "correct --providers")
        providers.select(self.providers)
        if self.suite not in suites.NAMES:
            known = ", ".join((*suites.NAMES, suites.TRAIN))
            raise UserError(f"a suite among {known}", repr(self.suite), "correct --suite")


def native_dtypes(device: str) -> tuple[str, ...]:
    """Return float32, and bfloat16 where ``device`` computes in it and does not emulate it."""
    devices.check_device(device)
    return ("float32", "bfloat16") if device != "cpu" or providers.cpu_has_bf16() else ("float32",)


def _listed(values: Any) -> str:
    return ", ".join(map(repr, values)) or "none"


@dataclass(frozen=True)
class BenchRow:
    """The first columns of every suite's table. Times in milliseconds per batch; ``ratio`` is the speed relative to the
    best stock path. Figures are None where the provider did not run.
    """

    case: str
    provider: str
    dtype: str
    batch: int
    device: str
    stock: bool
    precision: str = ""
    median_ms: float | None = None
    q1_ms: float | None = None
    q3_ms: float | None = None
    images_per_s: float | None = None
    ratio: float | None = None


@dataclass(frozen=True)
class InferenceRow(BenchRow):
    """One line of an inference suite.

    ``error_l2`` is ``‖out - ref‖ / ‖ref‖``, ``error_max`` the largest ``|out - ref|`` over the largest ``|ref|``, both
    against fp64 on the same rounded weights and inputs. ``samples`` counts the raw times.
    """

    error_l2: float | None = None
    error_max: float | None = None
    samples: int = 0
    note: str = ""


@dataclass
class BenchReport:
    """Rows, raw samples (nanoseconds, by ``case dtype batch provider``) and provenance of one run.

    ``row_type`` is the type of all rows; it decides which columns are printed.
    """

    rows: list[BenchRow] = field(default_factory=list)
    samples: dict[str, list[int]] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    row_type: type[BenchRow] = InferenceRow

    def to_dict(self) -> dict[str, Any]:
        return {"rows": [asdict(r) for r in self.rows], "samples_ns": self.samples, "provenance": self.provenance}

    def cells(self) -> dict[tuple[str, str, int], list[BenchRow]]:
        """Return rows grouped by case, dtype and batch, in the order measured."""
        grouped: dict[tuple[str, str, int], list[BenchRow]] = {}
        for row in self.rows:
            grouped.setdefault((row.case, row.dtype, row.batch), []).append(row)
        return grouped


def errors(out: Tensor, reference: Tensor) -> tuple[float, float]:
    """Return ``error_l2`` and ``error_max`` of :class:`InferenceRow`.

    Args:
        out: an output, one row per image.
        reference: the output of fp64 for the same images; it may hold more or fewer of them.

    Raises:
        ValueError: for a wrong shape, or where one of the two is finite and the other is not.
    """
    n = min(len(out), len(reference))
    if out.shape[1:] != reference.shape[1:]:
        raise ValueError(f"expected an output of shape (N, *{tuple(reference.shape[1:])}), got {tuple(out.shape)}")
    found = numerics.compare(out[:n], reference[:n])
    if found.mismatched:
        raise ValueError(f"expected finite outputs, got {found.mismatched} that are not where fp64 is")
    return found.rel, found.max_abs / found.peak if found.peak else found.max_abs


@torch.no_grad()
def fp64(module: nn.Module, x: Tensor) -> Tensor:
    """Run an fp64 copy of ``module`` on the CPU; weights and input keep the rounding of their present dtype."""
    return copy.deepcopy(module).cpu().double()(x.cpu().double())


@contextlib.contextmanager
def thread_count(n: int | None) -> Iterator[None]:
    """Set the number of torch's threads inside the ``with``; None leaves it alone."""
    before = torch.get_num_threads()
    if n is not None:
        torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def network(name: str, photos: list[images.Photo], path: Path | None, size: int, seed: int) -> nn.Module:
    """Build the stock model in eval mode, with weights from ``path`` or seeded random ones calibrated on the photos."""
    if path is not None:
        return trained.load(path, name).net
    model = weights.seeded(lambda: registry.build(name), seed)
    return weights.calibrate(model, images.batch(photos, max(4, len(photos)), size, seed)).eval()


def origin(options: BenchOptions, photos: list[images.Photo], size: int) -> dict[str, Any]:
    """Return a run's provenance: machine and versions, pictures, weights, and the side of the input in pixels."""
    return provenance.collect(options.device) | {
        "images": [p.name for p in photos],
        "weights": str(options.weights) if options.weights else f"random, seed {options.seed}, calibrated",
        "image_size": size,
    }


def speeds(
    timed: Mapping[str, harness.TimingSamples], stock: Collection[str], batch: int
) -> dict[str, dict[str, float | int | None]]:
    """Return the fields of :class:`BenchRow` that the samples of one cell give, and their number, by competitor.

    Args:
        timed: samples by competitor; one without samples has no entry in the result.
        stock: names of the competitors that ratios are relative to.
        batch: images per call.
    """
    quartiles = {name: s.quartiles() for name, s in timed.items() if s.ns}
    best = min((q[1] for name, q in quartiles.items() if name in stock), default=None)
    found: dict[str, dict[str, float | int | None]] = {}
    for name, (q1, median, q3) in quartiles.items():
        found[name] = {"q1_ms": q1, "median_ms": median, "q3_ms": q3, "samples": len(timed[name].ns)}
        found[name] |= {"images_per_s": batch * 1e3 / median, "ratio": best / median if best else None}
    return found


def cost_of_invariance(name: str, measured: Mapping[str, Mapping[str, float | int | None]]) -> str:
    """Return what batch-invariant mode costs, as the note of its row; empty for other rows, and if one is missing.

    Args:
        name: the competitor of the row.
        measured: of :func:`speeds`.
    """
    mode, plain = (measured.get(one, {}).get("median_ms") for one in (name, providers.OURS))
    if name != providers.OURS_INVARIANT or mode is None or plain is None:
        return ""
    return f"the mode takes {mode / plain:.2f} x the time of {providers.OURS}"


def run(
    options: BenchOptions,
    progress: Progress = lambda done, total, what: None,
    model: nn.Module | None = None,
    report: BenchReport | None = None,
) -> BenchReport:
    """Measure every cell of ``options``.

    Args:
        options: what to compare.
        progress: called at every step.
        model: a stock net in eval mode, float32, CPU, to measure in place of the one that the options build.
        report: an empty one to fill; after an error or an interrupt it holds the cells that were measured until then.

    Raises:
        UserError: for options that cannot be used, before anything is measured.
    """
    report = BenchReport() if report is None else report
    options.check()
    competitors = providers.select(options.providers)
    size = options.size or registry.image_size(options.model)
    photos = images.load(options.images, limit=max(REFERENCE_IMAGES, *options.batches))
    with thread_count(options.threads):
        if model is None:
            model = network(options.model, photos, options.weights, size, options.seed)
        largest = max(*options.batches, min(REFERENCE_IMAGES, len(photos)))
        x = images.batch(photos, largest, size, options.seed)
        cases = suites.cases(options.suite, options.model, model, x)
        report.provenance.update(origin(options, photos, size))
        cells = [(c, d, b) for c in cases for d in options.dtypes for b in options.batches]
        steps = StepCounter(progress, len(cells), len(competitors) * (1 + options.rounds))
        start = time.monotonic()
        references: dict[tuple[str, str], Tensor] = {}
        for number, (case, dtype, batch) in enumerate(cells):
            module = copy.deepcopy(case.module).to(options.device, DTYPES[dtype])
            x = case.x.to(options.device, DTYPES[dtype])
            if (case.name, dtype) not in references:
                references[case.name, dtype] = fp64(module, x[:REFERENCE_IMAGES])
            deadline = start + options.budget * (number + 1) / len(cells)
            cell = _InferenceCell(case.name, dtype, batch, options, competitors, deadline, steps, report)
            cell.run(module, x[:batch], references[case.name, dtype])
            steps.finish_cell(number)
            gc.collect()  # compiled graphs hold their weights in cycles
    return report


class StepCounter:
    """Count steps for the progress bar; a cell that ends early jumps to its end."""

    def __init__(self, progress: Progress, cells: int, per_cell: int):
        self.progress, self.per_cell, self.total, self.done = progress, per_cell, cells * per_cell, 0

    def step(self, what: str) -> None:
        """Say what runs now."""
        self.progress(self.done, self.total, what)
        self.done += 1

    def finish_cell(self, number: int) -> None:
        """Go to the end of the cell with this number, from 0."""
        self.done = (number + 1) * self.per_cell
        self.progress(self.done, self.total, "done")


@dataclass
class BenchCell:
    """One case in one dtype at one batch size; ``notes`` by competitor."""

    case: str
    dtype: str
    batch: int
    options: BenchOptions
    competitors: Sequence[providers.Provider | providers.Trainer]
    deadline: float
    steps: StepCounter
    report: BenchReport
    notes: dict[str, list[str]] = field(default_factory=dict)

    def step(self, what: str) -> None:
        """Say what runs now."""
        self.steps.step(f"{self.case} {self.dtype} batch {self.batch}: {what}")

    def measure(self, calls: Mapping[str, harness.Call], device: str, warmup: int) -> dict[str, harness.TimingSamples]:
        """Time the competitors that are ready, interleaved; the report keeps their samples."""
        plan = harness.TimingPlan(rounds=self.options.rounds, warmup=warmup, seed=self.options.seed)
        timed = harness.measure(
            calls, plan, device, self.deadline, lambda name, number: self.step(f"round {number + 1}, {name}")
        )
        for name, samples in timed.items():
            if samples.ns:
                self.report.samples[f"{self.case} {self.dtype} {self.batch} {name}"] = samples.ns
        return timed

    def add_rows(self, timed: Mapping[str, harness.TimingSamples], figures: Mapping[str, dict[str, Any]]) -> None:
        """Append a row per competitor: its times, its other figures by name, its notes."""
        measured = speeds(timed, {one.name for one in self.competitors if one.stock}, self.batch)
        for one in self.competitors:
            where = (self.case, one.name, self.dtype, self.batch, self.options.device, one.stock)
            row: dict[str, Any] = measured.get(one.name, {}) | figures.get(one.name, {})
            row["note"] = "; ".join(filter(None, [*self.notes[one.name], cost_of_invariance(one.name, measured)]))
            self.report.rows.append(self.report.row_type(*where, **row))


class _InferenceCell(BenchCell):
    def run(self, module: nn.Module, x: Tensor, reference: Tensor) -> None:
        """Prepare, check and time all competitors on ``x``."""
        ready: dict[str, harness.Call] = {}
        figures: dict[str, dict[str, Any]] = {}
        for provider in providers.select(self.options.providers):
            name = provider.name
            self.step(f"preparing {name}")
            verdict = provider.supports(module, DTYPES[self.dtype], self.batch, torch.device(self.options.device).type)
            self.notes[name] = [verdict.reason]
            if not verdict:
                continue
            try:
                prepared = provider.prepare(module, x)
                l2, largest = errors(prepared.call(), reference)
            except Exception as error:  # a peer's failure of any kind is a row, not the end of the run
                self.notes[name] = [harness.first_line(error)]
                continue
            self.notes[name].append(prepared.note)
            ready[name] = prepared.call
            figures[name] = {"precision": prepared.precision, "error_l2": l2, "error_max": largest}
        timed = self.measure(ready, self.options.device, warmup=2)
        self.notes |= {name: [samples.error] for name, samples in timed.items() if samples.error}
        self.add_rows(timed, figures)
