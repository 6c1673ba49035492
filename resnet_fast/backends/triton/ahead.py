"""Compile ahead of the launches: plan calls on meta tensors, compile what they need, refuse a config that fails.

    calls --launchers, recording--> launches --> jobs --> compiled --------------------------> report
                ^                                            |
                +---- its config is refused, plan again <----+ one failed

A refused config is refused for this process (tuning/tables.py), and the plan's text gives the reason. A kernel without
another config, such as a pass of BatchNorm, is reported; its launch raises what the compiler said.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ... import devices, stand_in
from ...calls import NetCall
from ...current_device import numbered
from ...errors import BackendError
from ...impl import PlannedCall, Warmed
from ...tuning import launches as tuned_launches
from ...tuning import routes, tables
from . import device, net, plan
from .compiling import KernelJob, OnProgress, compile_all, is_stored, jobs_of, worker_count
from .device import Target
from .launch import Launched, recording


def target_of(gpu: str | None, here: torch.device) -> Callable[[], Target]:
    """Return a function that describes the GPU called ``gpu``, or the one that ``here`` is or that is current.

    On a CPU that is the GPU that a stand-in stands for.

    Raises:
        BackendError: no GPU here and none named. UserError: an unknown name.
    """
    if gpu is not None:
        known = devices.gpu(gpu)
        return lambda: Target(known, tables.load(known.name))
    if here.type == "cpu" and stand_in.present() is not None:
        return lambda: Target(device.device_of(here), device.table_of(here), here)
    if not torch.cuda.is_available():
        names = ", ".join(devices.gpus())
        raise BackendError(f"expected a GPU to compile for, got none; name one of {names}")
    present = numbered(here if here.type == "cuda" else torch.device("cuda"))
    return lambda: Target(device.device_of(present), device.table_of(present), present)


def on_meta(t: Tensor) -> Tensor:
    """Return a tensor without memory, of the same shape, strides, dtype and gradient."""
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta", requires_grad=t.requires_grad)


def meta_call(call: Any) -> Any:
    """Return a call, or part of one, with every tensor on ``meta``."""
    if isinstance(call, Tensor):
        return on_meta(call)
    if isinstance(call, tuple):
        parts = [meta_call(part) for part in call]
        return type(call)(*parts) if hasattr(call, "_fields") else tuple(parts)
    return call


def launches_of(planned: PlannedCall) -> list[Launched]:
    """Return the launches of a call, of a training step the backward pass's too. Call it inside ``planned_for``."""
    call, spec = planned.call, planned.spec
    with torch.no_grad(), recording() as found:
        if planned.needs is not None:
            _step(call, spec, planned.save, planned.needs)
        elif isinstance(call, NetCall):
            net.run(call, spec, net.prepare(call, spec, []))  # type: ignore[arg-type]
        else:
            plan.run(call, spec, plan.prepare(call, spec, []))  # type: ignore[arg-type]
    return found


def _step(call: Any, spec: Any, save: str, needs: Sequence[bool]) -> None:
    from .training import step

    y, saved, _ = step.forward(call, spec, save, True)
    if any(needs):
        step.backward(call.with_leaves(call.leaves()), spec, saved, y, torch.empty_like(y), needs)


def compile_ahead(
    calls: Iterable[PlannedCall],
    target_of: Callable[[], Target],
    on_progress: OnProgress | None = None,
    workers: int | None = None,
) -> Warmed:
    """Compile every kernel that the calls launch and Triton's cache lacks.

    Args:
        calls: what will run.
        target_of: returns the GPU to compile for; asked again after a config was refused.
        on_progress: called before the first kernel and after each.
        workers: how many to compile at a time; see :func:`compiling.worker_count`.
    """
    start, planned = time.monotonic(), tuple(calls)
    every: set[str] = set()
    failed: dict[str, tuple[str, str]] = {}
    there = most = 0
    while True:
        target = target_of()
        assert target.device.gpu is not None
        with device.planned_for(target):
            launches = [one for call in planned for one in launches_of(call)]
        jobs = {job.text: (job, made) for job, made in jobs_of(launches, target.device.gpu.arch)}
        new = [job for text, (job, _) in jobs.items() if text not in every]
        every |= {job.text for job in new}
        missing = [job for job in new if not is_stored(job)]
        there += len(new) - len(missing)
        most = max(most, workers or worker_count(len(missing)) if missing else 0)
        errors = compile_all(missing, most, on_progress)
        failed |= {text: (_label(*jobs[text]), error) for text, error in errors.items()}
        refused = [_refuse(target, planned, jobs[text][1], error) for text, error in errors.items()]
        if not any(refused):
            break
        device.forget_tables()
    compiled = len(every) - there - len(failed)
    return Warmed(len(every), compiled, there, tuple(failed.values()), time.monotonic() - start, most)


def _label(job: KernelJob, launches: list[Launched]) -> str:
    tile = launches[0].tile
    return job.name if tile is None else f"{job.name} {tile[1]}"


def _refuse(target: Target, planned: Iterable[PlannedCall], made: list[Launched], reason: str) -> bool:
    """Refuse the config of launches whose kernel failed to compile. Returns whether there is another to take."""
    tiles = {one.tile for one in made if one.tile is not None}
    known = {
        launch
        for call in planned
        for part in call.spec.parts
        for launch in tuned_launches.launches_of(part, target.device)
    }
    found = [(launch, config) for conv, config in tiles for launch in known if launch.last == routes.planned(conv)]
    found = [(launch, config) for launch, config in found if launch.kernel == config.kernel]
    for launch, config in found:
        tables.refuse(target.table.gpu, launch, config, reason)
    return bool(found)
