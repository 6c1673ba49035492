"""Launches that are kept with the memory that they were given, to be executed again."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from ... import flags, native
from .machine import PtxMachine, ptx_machine

SCHEDULES = (1, 2)
"""Seeds of the orders of warps whose results must be equal."""


@dataclass(frozen=True)
class RecordedLaunch:
    """A launch with the memory that it was given, to be executed again.

    Attributes:
        text, kernel: PTX, and the name of the kernel in it.
        given: grid, threads, bytes of shared memory, parameters.
        cluster: blocks of a cluster.
        ranges: address, bytes, name, written (a flag per byte), writable.
        instructions: of warps, that the real launch took.
    """

    text: str
    kernel: str
    given: tuple[Any, ...]
    cluster: tuple[int, int, int]
    ranges: tuple[tuple[int, bytes, str, np.ndarray, bool], ...]
    instructions: int

    @cached_property
    def outcome(self) -> MutantOutcome:
        """What it leaves as it is, which every mutant is compared with."""
        return execute(self)


@dataclass
class MutantOutcome:
    """What a launch left: its finding, or memory, bytes that nobody wrote, and counters."""

    finding: str = ""
    memory: tuple[bytes, ...] = ()
    unwritten: dict[str, int] = field(default_factory=dict)
    counters: dict[str, Any] = field(default_factory=dict)

    def same_memory(self, other: MutantOutcome) -> bool:
        return self.memory == other.memory and self.unwritten == other.unwritten


def execute(launch: RecordedLaunch, text: str | None = None, seed: int = 0, fill: int = 0xFF) -> MutantOutcome:
    """Execute a recorded launch again, with its own PTX or another.

    Args:
        launch: the launch.
        text: PTX in place of its own.
        seed: of the order in which warps run.
        fill: what bytes hold that nobody has written.

    Raises:
        PtxError: of ``_ptx``: the text is no PTX that the machine understands.
    """
    engine = native.ptx()
    memory, held = engine.Memory(), []
    for n, (address, content, name, written, writable) in enumerate(launch.ranges):
        own = np.frombuffer(content, np.uint8).copy()
        own[~written] = fill
        held.append(own)
        label = f"{n}: {name}"  # counters are by name, and launches of a pass use names again
        memory.add(address, len(content), label, written=bool(written.all()), writable=writable, host=own.ctypes.data)
        if written.any() and not written.all():
            edges = np.flatnonzero(np.diff(np.concatenate(([False], written, [False])).astype(np.int8)))
            for start, end in edges.reshape(-1, 2).tolist():
                memory.write(address + start, end - start)
    limit = 20 * launch.instructions + 10_000
    try:
        report = engine.Module(launch.text if text is None else text, launch.kernel).launch(
            launch.kernel, *launch.given, memory, seed=seed, cluster=launch.cluster, limit=limit, strict=True
        )
    except engine.Fault as fault:
        return MutantOutcome(fault.what)
    return MutantOutcome("", tuple(own.tobytes() for own in held), memory.unwritten(), report.counters)


def expect_same_on_every_schedule(launches: Iterable[RecordedLaunch]) -> None:
    """Execute each launch under two other schedules of its warps.

    Raises:
        AssertionError: a schedule ends in a finding, or the two leave other bytes.
    """
    for n, launch in enumerate(launches):
        one, other = (execute(launch, seed=seed) for seed in SCHEDULES)
        if one.finding or other.finding:
            raise AssertionError(f"{launch.kernel}, launch {n}, another schedule: {one.finding or other.finding}")
        if not one.same_memory(other):
            raise AssertionError(f"{launch.kernel}, launch {n}: two schedules leave other bytes")


class _RecordingEngine:
    """The engine ``_ptx``, which also keeps each launch before it is executed."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.launches: list[RecordedLaunch] = []
        self.Fault, self.PtxError, self.tensor_map = engine.Fault, engine.PtxError, engine.tensor_map

    def Memory(self) -> _RecordedMemory:
        return _RecordedMemory(self._engine.Memory())

    def Module(self, text: str, name: str) -> _RecordedModule:
        return _RecordedModule(self._engine.Module(text, name), text, self.launches)


class _RecordedMemory:
    def __init__(self, real: Any) -> None:
        self.real = real
        self.added: dict[int, tuple[int, str, bool, int]] = {}

    def add(
        self, address: int, nbytes: int, name: str, written: bool = True, writable: bool = True,
        host: int | None = None,
    ) -> None:  # fmt: skip
        self.real.add(address, nbytes, name, written=written, writable=writable, host=host)
        self.added[address] = nbytes, name, writable, address if host is None else host

    def write(self, address: int, nbytes: int) -> None:
        self.real.write(address, nbytes)

    def remove(self, address: int) -> None:
        self.real.remove(address)
        del self.added[address]

    def ranges(self) -> Iterator[tuple[int, bytes, str, np.ndarray, bool]]:
        """Yield the ranges as they are now. Bytes of memory that is partly written count as written if not 0xFF."""
        unwritten = self.real.unwritten()
        for address, (nbytes, name, writable, host) in self.added.items():
            content = ctypes.string_at(host, nbytes)
            missing = unwritten.get(name, 0)
            written = np.full(nbytes, missing == 0)
            if 0 < missing < nbytes:
                written = np.frombuffer(content, np.uint8) != 0xFF
            yield address, content, name, written, writable


class _RecordedModule:
    def __init__(self, real: Any, text: str, launches: list[RecordedLaunch]) -> None:
        self._real, self._text, self._launches = real, text, launches
        self.kernels, self.target, self.check = real.kernels, real.target, real.check

    def launch(self, kernel: str, *given: Any, **options: Any) -> Any:
        *rest, memory = given
        before = tuple(memory.ranges())
        report = self._real.launch(kernel, *rest, memory.real, **options)
        instructions = report.counters["instructions"]
        cluster = tuple(options["cluster"])
        self._launches.append(RecordedLaunch(self._text, kernel, tuple(rest), cluster, before, instructions))
        return report


@contextmanager
def recorded(arch: int, seed: int = 0, tf32: bool = False) -> Iterator[tuple[PtxMachine, list[RecordedLaunch]]]:
    """Enter a machine for ``arch`` and yield it with the launches that it executes, each with its memory."""
    machine = ptx_machine(arch, seed, tf32=tf32)
    recorder = machine.engine = _RecordingEngine(native.ptx())
    name = flags.SUBMIT.name
    before = os.environ.get(name)
    os.environ[name] = "python"  # each temporary of a pass is an allocation of its own
    try:
        with machine:
            yield machine, recorder.launches
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before
