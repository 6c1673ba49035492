"""One comparison from options to rows: inputs, fp64 reference, every provider prepared, checked, then timed together.

A cell is one case of a suite in one dtype at one batch size. Within a cell all providers run interleaved; a provider
that has to pass, or fails, keeps its row with the reason.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

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
class Options:
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
        """UserError for the first option that cannot be used."""
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
        """UserError for a suite or a provider that is not there."""
        if not self.providers:
            raise UserError(f"providers among {', '.join(providers.NAMES)}", "none", "correct --providers")
        providers.select(self.providers)
        if self.suite not in suites.NAMES:
            known = ", ".join((*suites.NAMES, suites.TRAIN))
            raise UserError(f"a suite among {known}", repr(self.suite), "correct --suite")


def native_dtypes(device: str) -> tuple[str, ...]:
    """float32, and bfloat16 where ``device`` computes in it and does not emulate it."""
    devices.check_device(device)
    return ("float32", "bfloat16") if device != "cpu" or providers.cpu_has_bf16() else ("float32",)


def _listed(values: Any) -> str:
    return ", ".join(map(repr, values)) or "none"


@dataclass(frozen=True)
class Timed:
    """What a line of every suite's table begins with. Times in milliseconds per batch; ``ratio`` is the speed relative
    to the best stock path. Figures are None where the provider did not run.
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
class Row(Timed):
    """One line of an inference suite.

    ``error_l2`` is ``‖out - ref‖ / ‖ref‖``, ``error_max`` the largest ``|out - ref|`` over the largest ``|ref|``, both
    against fp64 on the same rounded weights and inputs. ``samples`` counts the raw times.
    """

    error_l2: float | None = None
    error_max: float | None = None
    samples: int = 0
    note: str = ""


@dataclass
class Report:
    """Rows, raw samples (nanoseconds, by ``case dtype batch provider``) and provenance of one run.

    ``row_type`` is the type of all rows; it decides which columns are printed.
    """

    row_type: ClassVar[type[Timed]] = Row

    rows: list[Timed] = field(default_factory=list)
    samples: dict[str, list[int]] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {"rows": [asdict(r) for r in self.rows], "samples_ns": self.samples, "provenance": self.provenance}

    def cells(self) -> dict[tuple[str, str, int], list[Timed]]:
        """Rows grouped by case, dtype and batch, in the order measured."""
        grouped: dict[tuple[str, str, int], list[Timed]] = {}
        for row in self.rows:
            grouped.setdefault((row.case, row.dtype, row.batch), []).append(row)
        return grouped


def errors(out: Tensor, reference: Tensor) -> tuple[float, float]:
    """``error_l2`` and ``error_max`` of :class:`Row` for an output and the fp64 reference of its first images.

    The reference may hold more or fewer images than the output. ValueError for a wrong shape, or where one of the two
    is finite and the other is not.
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
    """Output of an fp64 copy of ``module`` on the CPU; weights and input keep the rounding of their present dtype."""
    return copy.deepcopy(module).cpu().double()(x.cpu().double())


@contextlib.contextmanager
def thread_count(n: int | None) -> Iterator[None]:
    """``torch.set_num_threads(n)`` for a while; None leaves it alone."""
    before = torch.get_num_threads()
    if n is not None:
        torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def network(name: str, photos: list[images.Photo], path: Path | None, size: int, seed: int) -> nn.Module:
    """The stock model in eval mode: with the user's weights, or seeded random ones calibrated on the photographs."""
    if path is not None:
        return trained.load(path, name).net
    model = weights.seeded(lambda: registry.build(name), seed)
    return weights.calibrate(model, images.batch(photos, max(4, len(photos)), size, seed)).eval()


def origin(options: Options, photos: list[images.Photo], size: int) -> dict[str, Any]:
    """Provenance of a run's numbers: machine and versions, pictures, weights, and the side of the input in pixels."""
    return provenance.collect(options.device) | {
        "images": [p.name for p in photos],
        "weights": str(options.weights) if options.weights else f"random, seed {options.seed}, calibrated",
        "image_size": size,
    }


def speeds(
    timed: Mapping[str, harness.Samples], stock: Collection[str], batch: int
) -> dict[str, dict[str, float | int | None]]:
    """The fields of :class:`Timed` that the samples of one cell come to, and their number, by competitor.

    ``stock`` names the competitors that are the yardstick. A competitor without samples has no entry.
    """
    medians = {name: s.quartiles_ms()[1] for name, s in timed.items() if s.ns}
    best = min((ms for name, ms in medians.items() if name in stock), default=None)
    found: dict[str, dict[str, float | int | None]] = {}
    for name in medians:
        q1, median, q3 = timed[name].quartiles_ms()
        found[name] = {"q1_ms": q1, "median_ms": median, "q3_ms": q3, "samples": len(timed[name].ns)}
        found[name] |= {"images_per_s": batch * 1e3 / median, "ratio": best / median if best else None}
    return found


def run(
    options: Options,
    progress: Progress = lambda done, total, what: None,
    model: nn.Module | None = None,
    report: Report | None = None,
) -> Report:
    """Measure every cell of ``options``. UserError for options that cannot be used, before anything is measured.

    ``model``: a stock net in eval mode, float32, CPU, to measure in place of the one that the options build.
    ``report``: an empty one to fill; after an error or an interrupt it holds the cells that were measured until then.
    """
    report = Report() if report is None else report
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
        steps = Steps(progress, len(cells), len(competitors) * (1 + options.rounds))
        start = time.monotonic()
        references: dict[tuple[str, str], Tensor] = {}
        for number, (case, dtype, batch) in enumerate(cells):
            module = copy.deepcopy(case.module).to(options.device, DTYPES[dtype])
            x = case.x.to(options.device, DTYPES[dtype])
            if (case.name, dtype) not in references:
                references[case.name, dtype] = fp64(module, x[:REFERENCE_IMAGES])
            cell = _Cell(case.name, dtype, batch, options, start + options.budget * (number + 1) / len(cells))
            cell.run(module, x[:batch], references[case.name, dtype], competitors, report, steps)
            steps.finish_cell(number)
            gc.collect()  # compiled graphs hold their weights in cycles
    return report


class Steps:
    """Counts steps for the progress bar; a cell that ends early jumps to its end."""

    def __init__(self, progress: Progress, cells: int, per_cell: int):
        self.progress, self.per_cell, self.total, self.done = progress, per_cell, cells * per_cell, 0

    def step(self, what: str) -> None:
        self.progress(self.done, self.total, what)
        self.done += 1

    def finish_cell(self, number: int) -> None:
        self.done = (number + 1) * self.per_cell
        self.progress(self.done, self.total, "done")


@dataclass
class _Cell:
    case: str
    dtype: str
    batch: int
    options: Options
    deadline: float

    def run(
        self,
        module: nn.Module,
        x: Tensor,
        reference: Tensor,
        competitors: tuple[providers.Provider, ...],
        report: Report,
        steps: Steps,
    ) -> None:
        """Prepare, check and time all competitors on ``x``, and append their rows and samples to ``report``."""
        label = f"{self.case} {self.dtype} batch {self.batch}"
        ready: dict[str, providers.Prepared] = {}
        found: dict[str, tuple[float, float]] = {}
        notes: dict[str, str] = {}
        for provider in competitors:
            steps.step(f"{label}: preparing {provider.name}")
            verdict = provider.supports(module, DTYPES[self.dtype], self.batch, torch.device(self.options.device).type)
            notes[provider.name] = verdict.reason
            if not verdict:
                continue
            try:
                prepared = provider.prepare(module, x)
                found[provider.name] = errors(prepared.call(), reference)
                ready[provider.name] = prepared
                notes[provider.name] = "; ".join(filter(None, (verdict.reason, prepared.note)))
            except Exception as error:  # a peer's failure of any kind is a row, not the end of the run
                notes[provider.name] = harness.first_line(error)
        plan = harness.Plan(rounds=self.options.rounds, seed=self.options.seed)
        timed = harness.measure(
            {name: prepared.call for name, prepared in ready.items()},
            plan,
            self.options.device,
            self.deadline,
            lambda name, number: steps.step(f"{label}: round {number + 1}, {name}"),
        )
        measured = speeds(timed, {p.name for p in competitors if p.stock}, self.batch)
        for provider in competitors:
            name = provider.name
            row: dict[str, Any] = {}
            if name in ready:
                row.update(precision=ready[name].precision)
                row.update(error_l2=found[name][0], error_max=found[name][1])
            if name in measured:
                row.update(measured[name])
                report.samples[f"{label.replace(' batch ', ' ')} {name}"] = timed[name].ns
            elif name in timed:
                notes[name] = timed[name].error
            report.rows.append(
                Row(
                    self.case,
                    name,
                    self.dtype,
                    self.batch,
                    self.options.device,
                    provider.stock,
                    note=notes[name],
                    **row,
                )
            )
