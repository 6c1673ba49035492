"""Run whole nets: every competitor of a net and batch in one interleaved run, with the model's prediction for each."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from resnet_fast.devices import Device
from resnet_fast.roofline import floors
from resnet_fast.spec import LaunchSpec
from resnet_fast.tuning import configs, launch_plan, routes, shapes, time_model
from resnet_fast.tuning.configs import Config
from resnet_fast.tuning.tables import Table

from .. import harness, memory
from ..harness import US, TimingPlan, TimingSamples
from ..providers import PreparedCall, Provider
from . import cases as launches
from .session import Row, Settings

GIB = 1024**3
FULL = TimingPlan(rounds=10, calls=2, turn_ms=20.0, warmup=3)
QUICK = TimingPlan(rounds=1, calls=1, turn_ms=0.0, warmup=0)


class NetCase:
    """Run a net at a batch size with some competitors. ``training``: a step instead of a forward pass."""

    def __init__(
        self, settings: Settings, net: str, batch: int, peers: Iterable[Provider], *, dtype: str = "bfloat16",
        image: int | None = None, training: bool = False, limit_s: float = 20.0,
    ) -> None:  # fmt: skip
        self.settings, self.net, self.batch, self.peers = settings, net, batch, tuple(peers)
        self.dtype, self.image, self.training, self.limit_s = dtype, image, training, limit_s

    def __call__(self) -> Row:
        torch.backends.cudnn.benchmark = True
        try:
            with launches.cudnn_tf32(True):
                return self._measured()
        finally:
            gc.collect()
            if self.settings.on_gpu:
                torch.cuda.empty_cache()

    def _measured(self) -> Row:
        image = self.image or shapes.arch(self.net).image
        kept_dtype = "float32" if self.training else self.dtype  # autocast keeps float32 parameters
        model, x = launches.calibrated(self.net, self.batch, image, self.settings.device, kept_dtype)
        calls: dict[str, Callable[[], Tensor]] = {}
        rows: dict[str, Row] = {}
        skipped: dict[str, str] = {}
        errors: dict[str, str] = {}
        reference: Tensor | None = None
        for peer in self.peers:
            verdict = peer.supports(model, x.dtype, self.batch, self.settings.device)
            if not verdict:
                skipped[peer.name] = verdict.reason
                continue
            try:
                prepared, row, out = self._ready(peer, model, x)
                if not self.training:
                    reference = out if reference is None else reference
                    row["difference"] = _difference(out, reference)
            except Exception as error:  # one competitor's failure is its own, unless the GPU is gone with it
                errors[peer.name] = harness.first_line(error)
                self._still_answers(peer.name, errors[peer.name])
                continue
            calls[peer.name], rows[peer.name] = prepared.call, row
        plan = QUICK if self.settings.quick else FULL
        deadline = time.monotonic() + self.limit_s
        for name, samples in harness.measure(calls, plan, self.settings.device, deadline).items():
            if samples.error:
                errors[name] = samples.error
                self._still_answers(name, samples.error)
            else:
                rows[name] |= self._timed(name, samples)
        timed = {name: row for name, row in rows.items() if "ms" in row}
        return self._row(timed, skipped, errors)

    def _ready(self, peer: Provider, model: Any, x: Tensor) -> tuple[PreparedCall, Row, Tensor]:
        """Prepare a competitor; return it with the beginning of its row and its first result.

        ``peak_gib``: the most memory above what was there before, until the second call, which has all of an
        optimizer's state.
        """
        start, found = time.perf_counter(), []

        def prepare() -> None:
            prepared = peer.prepare(model, x)
            found.append((prepared, prepared.call().clone()))
            if self.settings.on_gpu:
                prepared.call()

        row: Row = {"stock": peer.stock}
        if self.settings.on_gpu:
            row["peak_gib"] = round(memory.peak(prepare, self.settings.device) / GIB, 3)
        else:
            prepare()
        ((prepared, out),) = found
        return prepared, row | {"ready_s": round(time.perf_counter() - start, 2)}, out

    def _still_answers(self, name: str, error: str) -> None:
        if not self.settings.on_gpu:
            return
        try:
            torch.cuda.synchronize()
        except Exception as gone:
            raise RuntimeError(f"{name}: {error}") from gone

    def _timed(self, name: str, samples: TimingSamples) -> Row:
        q1, median, q3 = samples.quartiles()
        row: Row = {"ms": round(median, 4), "quartiles_ms": [round(q1, 4), round(q3, 4)]}
        row |= {"images_per_s": round(self.batch / median * 1e3, 1), "ns": samples.ns}
        seconds, how = self._model(next(peer for peer in self.peers if peer.name == name))
        row |= {"modelled_ms": round(seconds * 1e3, 4), "model": how}
        return row | {"model_error": round(seconds * 1e3 / median - 1, 3)}

    def _model(self, peer: Provider) -> tuple[float, str]:
        """Predicted seconds, and where they come from."""
        from resnet_fast.backends.triton import device as gpus

        at = torch.device(self.settings.device)
        device, table = gpus.device_of(at), gpus.table_of(at)
        if peer.plan is None:
            specs = launches.specs(self.net, self.batch, self.dtype, self.image).values()
            chosen = [launch_plan.plan_launches(spec, device, table) for spec in specs]
            known = sum(c.measured for c in chosen)
            how = f"chosen launches, {known} of {len(chosen)} parts from measurements; without pooling and fc"
            return sum(c.seconds for c in chosen), how
        problems = shapes.problems(self.net, self.batch, self.image, self.dtype).values()
        floor = floors.net_floor(problems, device, peer.plan).seconds
        if self.training:  # forward, gradients of inputs and gradients of weights move about the same bytes
            return 3 * floor, f"roofline, three times the forward pass by plan {peer.plan}"
        return floor, f"roofline, plan {peer.plan}"

    def _row(self, rows: dict[str, Row], skipped: dict[str, str], errors: dict[str, str]) -> Row:
        kind = "training" if self.training else "inference"
        row: Row = {"status": "measured", "net": self.net, "batch": self.batch, "kind": kind}
        row["image"] = self.image or shapes.arch(self.net).image
        row |= {"precision": f"AMP {self.dtype}" if self.training else self.dtype}
        row |= {"peers": rows, "skipped": skipped, "errors": errors}
        row["note"] = ", ".join(f"{name} {part['images_per_s']:,.0f}" for name, part in rows.items()) + " img/s"
        ours = [name for name in errors if name.startswith("resnet_fast")]
        if ours:
            return row | {"status": "failed", "error": f"{ours[0]}: {errors[ours[0]]}"}
        if not rows:
            return row | {"status": "skipped", "reason": "; ".join(skipped.values() or errors.values())}
        return row


def _difference(out: Tensor, reference: Tensor) -> float:
    """Norm of the difference from the first competitor's output, over that output's norm.

    Raises:
        ValueError: the output has another shape, or values that are not finite: a time of it would mean nothing.
    """
    if out.shape != reference.shape:
        raise ValueError(f"expected an output of shape {tuple(reference.shape)}, got {tuple(out.shape)}")
    a, b = out.double(), reference.double()
    difference = ((a - b).norm() / b.norm()).item()
    if not math.isfinite(difference):
        raise ValueError(f"expected a finite output, got a difference of {difference} from the first competitor")
    return float(f"{difference:.3g}")


def conv_case(settings: Settings, batch: int, name: str, times: int, dtype: str, net: str, image: int | None) -> Row:
    """Time one convolution of a net as a launch with a cold L2: our kernel, cuDNN's two forms, and the floor.

    Ours is the config that dispatch would take among our own kernels.

    Args:
        name: the convolution's name in :mod:`resnet_fast.tuning.shapes`.
        times: how often the net has it.
        image: side of the input; None for the net's own.
    """
    from resnet_fast.backends.triton import device as gpus

    torch.backends.cudnn.benchmark = True
    at = torch.device(settings.device)
    device, table = gpus.device_of(at), gpus.table_of(at)
    spec = shapes.problems(net, batch, image, dtype)[name]
    launch = routes.launch(spec)
    config, source = _ours(launch, device, table)
    found, errors = _conv_times(settings, launch, config)
    us = {n: [round(q, 3) for q in samples.quartiles(US)] for n, samples in found.items()}
    floor = floors.floor_seconds(spec, device, "conv")
    row: Row = {"status": "measured", "batch": batch, "conv": name, "times": times, "launch": str(launch)}
    row |= {"config": str(config or "none admitted"), "config_from": source, "us": us, "errors": errors}
    row |= {"floor_us": round(floor.seconds * 1e6, 3), "bound": floor.bound, "floor_origin": floor.origin}
    row |= {"flops": floor.flops, "nbytes": floor.nbytes}
    said = ", ".join(f"{n} {q[1]:.1f}" for n, q in us.items()) + f" us; floor {row['floor_us']:.1f}"
    if config is not None:
        modelled, ours = time_model.predict_seconds(launch, config, device) * 1e6, us["ours"][1]
        row |= {"modelled_us": round(modelled, 3), "model_error": round(modelled / ours - 1, 3)}
        said += f", modelled {modelled:.1f}"
    row["samples_us"] = {n: [round(t / US, 3) for t in samples.ns] for n, samples in found.items()}
    return row | {"note": said}


def _conv_times(
    settings: Settings, launch: LaunchSpec, config: Config | None
) -> tuple[dict[str, TimingSamples], dict[str, str]]:
    """Samples of our kernel and of cuDNN's forms, and the errors of those forms that do not run."""
    from resnet_fast.backends.triton.problem import problem

    work = problem(launch, torch.device(settings.device))
    calls = {} if config is None else {"ours": work.prepared(config)}
    errors: dict[str, str] = {}
    with torch.inference_mode():
        for stock in configs.stock_candidates(launch):
            call = work.prepared(stock)
            try:
                call()
            except Exception as error:
                errors[stock.kernel] = harness.first_line(error)
            else:
                calls[stock.kernel] = call
        return harness.cold(calls, settings.device, rounds=2 if settings.quick else 40), errors


def _ours(launch: LaunchSpec, device: Device, table: Table) -> tuple[Config | None, str]:
    """The fastest measured one of our kernels' configs, or the heuristic's; and which of the two it is."""
    assert device.gpu is not None
    legal = {str(c): c for c in configs.candidates(launch, device.gpu)}
    known = {n: us for n, us in table.times(launch).items() if us is not None and n in legal}
    if known:
        return legal[min(known, key=lambda n: known[n])], "measured"
    chosen = launch_plan.fastest_modelled(launch, device, table)
    return (chosen[0] if chosen else None), "modelled"
