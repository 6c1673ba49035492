"""Cases of whole nets: every competitor of a net and batch in one interleaved run, and what the model says of each."""

from __future__ import annotations

import gc
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

from .. import harness
from . import cases as launches
from . import timing
from .common import Row, Settings, Skipped
from .peers import Peer

GIB = 1024**3
FULL = harness.Plan(rounds=10, calls=2, turn_ms=20.0, warmup=3)
QUICK = harness.Plan(rounds=1, calls=1, turn_ms=0.0, warmup=0)


class Net:
    """A net at a batch size with some competitors. ``training``: a step instead of a forward pass."""

    def __init__(
        self, settings: Settings, net: str, batch: int, peers: Iterable[Peer], *, dtype: str = "bfloat16",
        image: int | None = None, training: bool = False, limit_s: float = 20.0,
    ) -> None:  # fmt: skip
        self.settings, self.net, self.batch, self.peers = settings, net, batch, tuple(peers)
        self.dtype, self.image, self.training, self.limit_s = dtype, image, training, limit_s

    def __call__(self) -> Row:
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = True
        try:
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
            try:
                call, row, out = self._ready(peer, model, x)
            except Skipped as reason:
                skipped[peer.name] = str(reason)
                continue
            except Exception as error:  # one competitor's failure is its own, unless the GPU is gone with it
                errors[peer.name] = harness.first_line(error)
                self._still_answers(peer.name, errors[peer.name])
                continue
            if not self.training:
                reference = out if reference is None else reference
                row["difference"] = _difference(out, reference)
            calls[peer.name], rows[peer.name] = call, row
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

    def _ready(self, peer: Peer, model: Any, x: Tensor) -> tuple[Callable[[], Tensor], Row, Tensor]:
        """The callable, its first result, and for training the peak of memory above what was there before."""
        start, on_gpu = time.perf_counter(), self.settings.on_gpu
        if on_gpu:
            gc.collect()
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        call = peer.make(model, x)
        out = call().clone()
        row: Row = {}
        if on_gpu:
            call()  # the first step also allocates the optimizer's state
            torch.cuda.synchronize()
            row["peak_gib"] = round((torch.cuda.max_memory_allocated() - before) / GIB, 3)
        return call, row | {"ready_s": round(time.perf_counter() - start, 2)}, out

    def _still_answers(self, name: str, error: str) -> None:
        if not self.settings.on_gpu:
            return
        try:
            torch.cuda.synchronize()
        except Exception as gone:
            raise RuntimeError(f"{name}: {error}") from gone

    def _timed(self, name: str, samples: harness.Samples) -> Row:
        q1, median, q3 = samples.quartiles_ms()
        row: Row = {"ms": round(median, 4), "quartiles_ms": [round(q1, 4), round(q3, 4)]}
        row |= {"images_per_s": round(self.batch / median * 1e3, 1), "ns": samples.ns}
        seconds, how = self._model(next(peer for peer in self.peers if peer.name == name))
        row |= {"modelled_ms": round(seconds * 1e3, 4), "model": how}
        return row | {"model_error": round(seconds * 1e3 / median - 1, 3)}

    def _model(self, peer: Peer) -> tuple[float, str]:
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
    """Norm of the difference from the first competitor's output over its norm: is it the same net?"""
    a, b = out.double(), reference.double()
    return float(f"{((a - b).norm() / b.norm()).item():.3g}")


def conv_case(settings: Settings, batch: int, name: str, times: int, dtype: str, net: str, image: int | None) -> Row:
    """One convolution of a net as a launch: our kernel against cuDNN's two forms, cold, and its floor.

    Ours is what dispatch would take among our own kernels.
    """
    from resnet_fast.backends.triton import device as gpus
    from resnet_fast.backends.triton.problem import problem

    torch.backends.cudnn.benchmark = True
    at = torch.device(settings.device)
    device, table = gpus.device_of(at), gpus.table_of(at)
    spec = shapes.problems(net, batch, image, dtype)[name]
    launch = routes.launch(spec)
    config, source = _ours(launch, device, table)
    work = problem(launch, at)
    calls = {stock.kernel: work.prepared(stock) for stock in configs.stock_candidates(launch)}
    if config is not None:
        calls = {"ours": work.prepared(config)} | calls
    errors: dict[str, str] = {}
    with torch.inference_mode():
        for stock_name in [n for n in calls if n != "ours"]:
            try:
                calls[stock_name]()
            except Exception as error:
                errors[stock_name] = harness.first_line(error)
                del calls[stock_name]
        found = timing.cold(calls, settings.on_gpu, rounds=2 if settings.quick else 40)
    us = {n: timing.quartiles(samples) for n, samples in found.items()}
    floor = floors.floor_seconds(spec, device, "conv")
    row: Row = {"status": "measured", "batch": batch, "conv": name, "times": times, "launch": str(launch)}
    row |= {"config": str(config or "none admitted"), "config_from": source, "us": us, "errors": errors}
    row |= {"floor_us": round(floor.seconds * 1e6, 3), "bound": floor.bound, "floor_origin": floor.origin}
    said = ", ".join(f"{n} {q[1]:.1f}" for n, q in us.items()) + f" us; floor {row['floor_us']:.1f}"
    if config is not None:
        modelled, ours = time_model.predict_seconds(launch, config, device) * 1e6, us["ours"][1]
        row |= {"modelled_us": round(modelled, 3), "model_error": round(modelled / ours - 1, 3)}
        said += f", modelled {modelled:.1f}"
    row["samples_us"] = {n: [round(s * 1e6, 3) for s in samples] for n, samples in found.items()}
    return row | {"note": said}


def _ours(launch: LaunchSpec, device: Device, table: Table) -> tuple[Config | None, str]:
    """The fastest measured one of our kernels' configs, or the heuristic's; and which of the two it is."""
    assert device.gpu is not None
    legal = {str(c): c for c in configs.candidates(launch, device.gpu)}
    known = {n: us for n, us in table.times(launch).items() if us is not None and n in legal}
    if known:
        return legal[min(known, key=lambda n: known[n])], "measured"
    chosen = launch_plan.fastest_modelled(launch, device, table)
    return (chosen[0] if chosen else None), "modelled"
