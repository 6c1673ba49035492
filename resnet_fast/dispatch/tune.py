"""``tune(model, x)``: measure every way to run the model's launches on this GPU, including PyTorch's own kernels.

    model(x) -> specs -> routes -> launches           each launch once, the most expensive first
    launch   -> candidates + stock                    compiled in parallel, verified on a small batch, timed one by one
    times    -> the user's table                      written after every launch: an interruption loses one launch

A candidate is timed (timing.py) only if its output matches fp64 within the error budget (numerics.py). A candidate that
fails to compile, to match or to run at full size is refused, and the report gives the reason. The fastest one, ours or
PyTorch's, runs from the next call on, so a tuned launch is never slower than stock beyond noise.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import parameter_cache
from ..current_device import numbered, on_device
from ..devices import Device
from ..errors import BackendError, UserError
from ..io import safe_files
from ..spec import LaunchSpec, Spec
from ..tuning import configs, launch_plan, launches, proofs, routes, tables, training_configs
from ..tuning.configs import Config
from ..tuning.shapes import unknown_name
from . import catalog, record, select, timing

OnProgress = Callable[[int, int, str], None]
"""Called with the number of launches done, the total number, and the launch that is measured next."""


@dataclass(frozen=True)
class LaunchRow:
    """One launch of a report: the fastest candidate and PyTorch's fastest, in microseconds; None if not measured."""

    launch: str
    best: str | None
    us: float | None
    stock_us: float | None
    refused: int

    @property
    def speedup(self) -> float | None:
        """Stock time over best time: 1.0 where stock is the best."""
        return self.stock_us / self.us if self.us and self.stock_us else None


@dataclass
class Tuned:
    """The result of a tuning run.

    Attributes:
        table: the measured times.
        path: the file of the table.
        launches: every launch of the model.
        measured: number of launches measured now.
        kept: number of launches known from earlier runs.
        left: number of launches that the time budget did not reach.
        seconds: duration of the run.
        refused: launch, candidate and reason of each refusal.
        net_us: microseconds of the model's fused layers as tuned; None until every launch is measured.
        net_stock_us: the same on PyTorch's kernels alone.
        unsaved: why the file could not be written; empty if it was.
    """

    table: tables.Table
    path: Path
    launches: tuple[LaunchSpec, ...] = ()
    measured: int = 0
    kept: int = 0
    left: int = 0
    seconds: float = 0.0
    refused: list[tuple[str, str, str]] = field(default_factory=list)
    net_us: float | None = None
    net_stock_us: float | None = None
    unsaved: str = ""

    def rows(self) -> tuple[LaunchRow, ...]:
        """Return a row per launch."""
        return tuple(self._row(launch) for launch in self.launches)

    def _row(self, launch: LaunchSpec) -> LaunchRow:
        known = self.table.times(launch)
        times = {name: us for name, us in known.items() if us is not None}
        best = min(times, key=times.__getitem__, default=None)
        stock = min((times[name] for name in configs.STOCK if name in times), default=None)
        return LaunchRow(str(launch), best, None if best is None else times[best], stock, len(known) - len(times))

    def __str__(self) -> str:
        text = f"{self.measured} launches measured, {self.kept} known before, in {self.seconds:.0f} s; {self.path}"
        if self.left:
            text += f"; {self.left} left for the next run: the time budget was used up"
        if self.unsaved:
            text += f"; NOT written: {self.unsaved}"
        return text


def default_device() -> torch.device:
    """Return the device that Triton kernels run on: the GPU, or the CPU in Triton's interpreter.

    Raises:
        BackendError: Triton kernels run nowhere.
    """
    _check_triton()
    return numbered(torch.device("cpu" if "cpu" in _triton_devices() else "cuda"))


def _triton_devices() -> tuple[str, ...]:
    return next(i.devices for i in catalog.impls("conv_bn_act") if i.backend == "triton")


def _check_triton() -> None:
    available = catalog.availability()["triton"]
    if not available:
        raise BackendError(f"tuning needs the Triton backend: {available.reason}")


def check_kernel(name: str) -> None:
    """Raise UserError with close matches if no kernel is called ``name``."""
    if name not in launches.KERNELS:
        raise unknown_name("kernel", name, launches.KERNELS)


def specs_of(model: nn.Module, x: Tensor) -> list[Spec]:
    """Return the specs of ``model(x)`` that run on Triton, in order of execution, with repeats.

    The buffers of a model in training mode are restored.
    """
    if x.numel() == 0:
        raise UserError("an input with elements", f"shape {tuple(x.shape)}", "tune with the batch that will run")
    if x.device.type not in _triton_devices():
        where = " or ".join(_triton_devices())
        raise UserError(f"a model and an input on {where}", f"an input on {x.device}", "move both there")
    try:
        found = _ran(model, x, "triton")
    except BackendError:
        raise
    except Exception:  # what the model chose may be what fails; the reference runs the same problems
        with select.use_backend("reference"):
            found = _ran(model, x.contiguous(memory_format=torch.channels_last), "reference")
    if not found:
        raise UserError(
            "an accelerated model whose convolutions run on Triton",
            "none that did",
            "call resnet_fast.accelerate(model) first; resnet_fast.explain(model, x) says what ran and why",
        )
    return found


def _ran(model: nn.Module, x: Tensor, backend: str) -> list[Spec]:
    before = {name: b.clone() for name, b in model.named_buffers()} if model.training else {}
    try:
        with record.tape() as tape, nullcontext() if model.training else torch.inference_mode():
            model(x)
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name in before:
                    buffer.copy_(before[name])
    return [e.spec for e in tape if isinstance(e, record.Ran) and e.choice.impl.backend == backend]


def launches_of(specs: Iterable[Spec], device: torch.device) -> tuple[LaunchSpec, ...]:
    """Return every launch of every route of ``specs`` that ``device`` has a candidate for, each once."""
    from ..backends.triton import device as gpus

    model = gpus.device_of(device)
    return tuple(dict.fromkeys(launch for spec in specs for launch in launches.launches_of(spec, model)))


def table_file(device: torch.device) -> Path:
    """Return the path of the user's table for ``device``, which calls read in addition to the shipped one."""
    from ..backends.triton.device import table_of

    return tables.user_file(table_of(device).gpu)


def tune(
    model: nn.Module,
    x: Tensor,
    budget_s: float = 170.0,
    on_progress: OnProgress | None = None,
    path: Path | None = None,
    only: str | None = None,
) -> Tuned:
    """Measure the launches of ``model(x)`` and let the next calls use the fastest.

    ::

        resnet_fast.accelerate(model.eval().cuda())
        print(resnet_fast.tune(model, x))

    Args:
        model: an accelerated model on the GPU: in eval mode for inference; in training mode for a training step, under
            the autocast that the training will use.
        x: an input of the shape, dtype and layout to tune for.
        budget_s: seconds to spend; what is left comes first in the next run.
        on_progress: called before each launch with launches done, launches in all, and the launch.
        path: the table to read and write; by default the user's own for this GPU, the only one that calls look into.
        only: the one kernel whose launches are measured, ``conv_bn_act_3x3`` for instance; by default every one.

    Returns:
        A :class:`Tuned`; ``print`` it for a summary, ``rows()`` has a row per launch.

    Raises:
        UserError: a model without convolutions on Triton; an empty input; a kernel that does not exist
            or that the model does not launch; a table that cannot be written. BackendError: no Triton here.
    """
    _check_triton()
    if only is not None:
        check_kernel(only)
    specs = specs_of(model, x)
    every = launches_of(specs, x.device)
    if only is not None:
        there = ", ".join(sorted({launch.kernel for launch in every}))
        every = tuple(launch for launch in every if launch.kernel == only)
        if not every:
            raise UserError(f"a model that launches {only}", f"one that launches {there}", "name one of those")
    result = tune_launches(every, x.device, budget_s, on_progress, path)
    result.net_us, result.net_stock_us = _net_us(specs, x.device, result.table)
    return result


def _net_us(specs: list[Spec], device: torch.device, table: tables.Table) -> tuple[float | None, float | None]:
    """Return microseconds of all ``specs`` as tuned and on stock kernels; None if a launch was not measured."""
    from ..backends.triton import device as gpus

    model = gpus.device_of(device)
    if any(spec.grad or spec.batch_stats for spec in specs):
        return _step_us(specs, model, table)
    tuned = [launch_plan.plan_launches(spec, model, table) for spec in specs]
    stock = [s for s in (launch_plan.stock_seconds(spec, model, table) for spec in specs) if s is not None]
    known = all(c.measured for c in tuned)
    return (
        sum(c.seconds for c in tuned) * 1e6 if known else None,
        sum(stock) * 1e6 if known and len(stock) == len(specs) else None,
    )


def _step_us(specs: list[Spec], model: Device, table: tables.Table) -> tuple[float | None, float | None]:
    """Return the same for a training step, with every direction of each convolution."""
    ours, theirs = ([one for spec in specs for one in _step_launches(spec, model, table, s)] for s in (False, True))
    times, stock = ([_known_times(table, one) for one in every] for every in (ours, theirs))
    least = [min((t[name] for name in configs.STOCK if name in t), default=None) for t in stock]
    return (
        sum(min(t.values()) for t in times) if all(times) else None,
        None if None in least else sum(us for us in least if us is not None),
    )


def _step_launches(spec: Spec, model: Device, table: tables.Table, stock: bool) -> list[LaunchSpec]:
    """Return the launches of a training step: with folded norms the forward pass is one of several routes.

    ``stock``: of the route that PyTorch's kernels can run.
    """
    if spec.batch_stats:
        return list(launches.launches_of(spec, model))
    if stock:
        return [*routes.folded_routes(spec)[0].launches, *training_configs.training_launches(spec)]
    return [launch for launch, _ in launch_plan.plan_folded(spec, model, table, hopeful=True).chosen(spec)]


def _known_times(table: tables.Table, launch: LaunchSpec) -> dict[str, float]:
    return {name: us for name, us in table.times(launch).items() if us is not None}


def tune_launches(
    wanted: Iterable[LaunchSpec],
    device: torch.device,
    budget_s: float = 170.0,
    on_progress: OnProgress | None = None,
    path: Path | None = None,
) -> Tuned:
    """Measure the ``wanted`` launches on ``device``; see :func:`tune`."""
    from ..backends.triton import device as gpus

    start = time.monotonic()
    name, model = gpus.table_of(device).gpu, gpus.device_of(device)
    path = path or tables.user_file(name)
    check_table(path, device)
    result = Tuned(tables.read(path, name), path, tuple(dict.fromkeys(wanted)))
    versions = {"torch": torch.__version__, "triton": _triton_version()}
    todo = []
    for launch in result.launches:
        known = result.table.times(launch).keys()
        missing = [c for c in launches.candidates(launch, model) if str(c) not in known]
        if missing:
            todo.append((launch, missing))
        else:
            result.kept += 1
    todo.sort(key=lambda item: -launches.expected_seconds(item[0], model))
    try:
        for done, (launch, missing) in enumerate(todo):
            if time.monotonic() - start > budget_s:
                result.left = len(todo) - done
                break
            if on_progress is not None:
                on_progress(done, len(todo), str(launch))
            known = result.table.times(launch).keys()  # another run may have measured it meanwhile, into the same file
            missing = [c for c in missing if str(c) not in known]
            if not missing:
                result.kept += 1
                continue
            with on_device(device):
                times = _measure(launch, missing, device, result)
            _keep(result, tables.Table(name, {str(launch): times}, versions))
            result.measured += 1
    finally:  # also after Ctrl-C, so that the times until then are used
        gpus.forget_tables()
        parameter_cache.clear()
    result.seconds = time.monotonic() - start
    return result


def check_table(path: Path, device: torch.device) -> None:
    """Check, before measuring, that the times of ``device`` may be written to ``path``.

    A damaged file in the cache folder is replaced, because it belongs to this package.

    Raises:
        UserError: another file, or the table of another GPU, is there, or the path cannot be written.
    """
    from ..backends.triton import device as gpus

    name = gpus.table_of(device).gpu
    if path != tables.user_file(name):
        tables.check_target(path, name)
        return
    todo = "name another with --table, or set RESNET_FAST_CACHE to another folder"
    safe_files.check_target(path, "a tuning table", lambda content: True, todo=todo, make_folder=True)


def _keep(result: Tuned, new: tables.Table) -> None:
    """Add times to the file and to the result. If the file cannot be written, the result says why."""
    try:
        result.table = tables.add(result.path, result.table.with_times(new) if result.unsaved else new)
        result.unsaved = ""
    except OSError as error:
        result.table = result.table.with_times(new)
        result.unsaved = error.strerror or str(error)


def _measure(
    launch: LaunchSpec, candidates: list[Config], device: torch.device, result: Tuned
) -> dict[str, float | None]:
    """Return the microseconds of each candidate that compiles, matches and runs at full size; None for the others."""
    from ..backends.triton import device as gpus
    from ..backends.triton import proofs as first_use
    from ..backends.triton.training.problem import launch_problem

    proof = launch_problem(proofs.small(launch), device)

    def failure(attempt: Callable[[], Any]) -> str:
        with on_device(device):  # the compilers' threads have a current device of their own
            return first_use.failure(attempt)

    # compilers release the GIL, the interpreter does not
    with ThreadPoolExecutor(1 if device.type == "cpu" else first_use.THREADS) as pool:
        reasons = list(pool.map(lambda config: failure(lambda: proof.check(config)), candidates))
    if device.type == "cuda":
        verdicts = [(launch, config, why) for config, why in zip(candidates, reasons, strict=True)]
        first_use.keep(gpus.table_of(device), [v for v in verdicts if configs.needs_proof(*v[:2])])
    times: dict[str, float | None] = {}
    full = launch_problem(launch, device) if "" in reasons else proof

    def take_time(config: Config) -> None:
        times[str(config)] = round(timing.seconds(full.prepared(config), device) * 1e6, 3)

    for config, found in zip(candidates, reasons, strict=True):
        times[str(config)] = None
        reason = found or failure(lambda config=config: take_time(config))  # type: ignore[misc]
        if reason:
            result.refused.append((str(launch), str(config), reason))
    if None in times.values() and device.type == "cuda":
        torch.cuda.synchronize(device)  # raises if a failure broke the context, so that no time here is valid
    return times


def _triton_version() -> str:
    import triton

    return triton.__version__
