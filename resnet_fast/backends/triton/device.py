"""Find the ceilings and the tuning table of a torch device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import torch

from ... import devices, stand_in
from ...devices import Device
from ...tuning import tables
from . import proofs
from .launch import INTERPRETED


class Target(NamedTuple):
    """The GPU that launches are planned for, with what was measured on it.

    ``at``: its place in this machine, where configs can be proved; None if it is elsewhere.
    """

    device: Device
    table: tables.Table
    at: torch.device | None = None


_target: ContextVar[tuple[Target, object] | None] = ContextVar("resnet_fast_triton_target", default=None)
_generation = 0


@contextmanager
def planned_for(target: Target) -> Iterator[None]:
    """Answer for tensors on ``meta``, which belong to no GPU, with ``target`` inside the ``with``."""
    before = _target.set((target, object()))
    try:
        yield
    finally:
        _target.reset(before)


def _planned() -> tuple[Target, object]:
    found = _target.get()
    if found is None:
        raise RuntimeError("launches on meta tensors are planned inside planned_for()")
    return found


def table_version(device: torch.device) -> object:
    """Return a value that differs wherever :func:`table_of` may: part of the key of every kept plan."""
    return _planned()[1] if device.type == "meta" else _generation


def forget_tables() -> None:
    """Read the tables again at the next plan, because one was written or a config was refused."""
    global _generation
    _generation += 1
    measured.cache_clear()


def forget_devices() -> None:
    """Ask again which GPU each device is, because a stand-in came or went."""
    present.cache_clear()
    forget_tables()


def place_of(device: torch.device) -> torch.device:
    """Return where launches on ``device`` will run: for ``meta`` the target's place, ``meta`` itself if it has none."""
    return device if device.type != "meta" else _planned()[0].at or device


def device_of(device: torch.device) -> Device:
    """Return the ceilings of ``device``: a known GPU's, or what an unknown one's driver reports.

    The interpreter gets the plans of an H100, so that tests run what an H100 would run, and a stand-in those of the GPU
    that it stands for.
    """
    return _planned()[0].device if device.type == "meta" else present(device)


def table_of(device: torch.device) -> tables.Table:
    """Return what was measured and proved on ``device``; an empty table in the interpreter."""
    return _planned()[0].table if device.type == "meta" else measured(device)


@cache
def present(device: torch.device) -> Device:
    """Return :func:`device_of` of a GPU of this machine."""
    if INTERPRETED:
        return devices.gpu("h100")
    machine = stand_in.present() if device.type == "cpu" else None
    if machine is not None:
        return devices.gpu(machine.gpu)
    properties = torch.cuda.get_device_properties(device)
    known = devices.detect(properties.name)
    return known or devices.unknown_gpu(
        properties.name,
        arch=10 * properties.major + properties.minor,
        sms=properties.multi_processor_count,
        shared_per_sm=properties.shared_memory_per_multiprocessor,
        shared_per_block=properties.shared_memory_per_block_optin,  # type: ignore[attr-defined]
        l2_bytes=properties.L2_cache_size,
        clock_hz=1e3 * getattr(properties, "clock_rate", 0),  # in kHz; versions of PyTorch differ in what they report
        memory_hz=1e3 * getattr(properties, "memory_clock_rate", 0),
        bus_bits=getattr(properties, "memory_bus_width", 0),
    )


@cache
def measured(device: torch.device) -> tables.Table:
    """Return :func:`table_of` of a GPU of this machine."""
    if INTERPRETED:
        return tables.Table("Triton interpreter")
    if device.type == "cpu":
        return tables.load(present(device).name)
    name = torch.cuda.get_device_name(device)
    return replace(tables.load(name), proofs=proofs.load(name))
