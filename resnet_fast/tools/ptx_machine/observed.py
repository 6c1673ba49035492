"""Launches that are not executed: what a GPU would be given, as launches of machine code.

    with observed(arch=90) as seen, use_backend("triton"):
        net(images)                                             # plans, packs and launches as on a GPU
    for launch in seen.launches:
        walk(launch, blocks=range(132))                         # resnet_fast.simulation

Nothing is computed: outputs hold whatever their memory held. So launches of real sizes cost no more than planning them.
Contents are kept of integer tensors alone: counters that blocks draw tickets from start at zero, as the launcher left
them. Numbers in floating point decide neither branches nor addresses.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

from ... import flags, native
from ...errors import UserError
from ...simulation import Launch, MemoryRange, read_kernel
from .machine import PtxMachine, ptx_machine

Assemble = Callable[[str, int], bytes]
"""``assemble(text, arch)``: the cubin of a PTX text."""

_INTEGERS = re.compile(r"\((u?int\d+|bool) \(")


class _Given(NamedTuple):
    """What the engine was given for one launch."""

    text: str
    kernel: str
    grid: tuple[int, int, int]
    threads: tuple[int, int, int]
    shared: int
    parameters: tuple[bytes, ...]
    memory: tuple[MemoryRange, ...]


class Observed:
    """See :func:`observed`. ``machine``: the machine that is entered."""

    def __init__(self, machine: PtxMachine, engine: _ObservingEngine, assemble: Assemble | None) -> None:
        self.machine, self._engine, self._assemble = machine, engine, assemble

    @property
    def launches(self) -> list[Launch]:
        """The launches so far, in order.

        Raises:
            UserError: nobody assembled a kernel, and there is no ``assemble``.
        """
        out = []
        for launch, given in zip(self.machine.launches, self._engine.given, strict=True):
            binary = launch.binary or (self._assemble(given.text, self.machine.arch) if self._assemble else b"")
            if not binary:
                raise UserError(f"the cubin of {given.kernel}", "PTX alone", "pass assemble=")
            kernel = read_kernel(binary, given.kernel)
            out.append(Launch(kernel, given.grid, given.threads, given.shared, given.parameters, given.memory))
        return out


@contextmanager
def observed(arch: int, assemble: Assemble | None = None) -> Iterator[Observed]:
    """Enter a machine for ``arch`` that executes nothing, and yield what it is given.

    Args:
        arch: compute capability times ten, 80 or 90.
        assemble: makes a cubin of PTX, for kernels that have none: ``resnet_fast.benchmarks.compiled_cuda.assembled``.

    Raises:
        UserError: as of :func:`.machine.ptx_machine`.
    """
    machine = ptx_machine(arch)
    engine = machine.engine = _ObservingEngine(native.ptx())
    before = os.environ.get(flags.SUBMIT.name)
    os.environ[flags.SUBMIT.name] = "python"  # each temporary of a pass is an allocation of its own, with its dtype
    try:
        with machine:
            yield Observed(machine, engine, assemble)
    finally:
        del os.environ[flags.SUBMIT.name]
        if before is not None:
            os.environ[flags.SUBMIT.name] = before


class _ObservingEngine:
    """In place of the engine ``_ptx``: it reads PTX and keeps launches."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.given: list[_Given] = []
        self.Fault, self.PtxError, self.tensor_map = engine.Fault, engine.PtxError, engine.tensor_map

    def Memory(self) -> _ObservedMemory:
        return _ObservedMemory()

    def Module(self, text: str, name: str) -> _ObservedModule:
        return _ObservedModule(self._engine.Module(text, name), text, self.given)


class _ObservedMemory:
    def __init__(self) -> None:
        self._added: dict[int, tuple[int, str, int]] = {}

    def add(
        self, address: int, nbytes: int, name: str, written: bool = True, writable: bool = True,
        host: int | None = None,
    ) -> None:  # fmt: skip
        self._added[address] = nbytes, name, address if host is None else host

    def write(self, address: int, nbytes: int) -> None:
        """Nothing is kept of what was written."""

    def remove(self, address: int) -> None:
        del self._added[address]

    def ranges(self) -> tuple[MemoryRange, ...]:
        return tuple(
            MemoryRange(at, nbytes, name, ctypes.string_at(host, nbytes) if _INTEGERS.search(name) else None)
            for at, (nbytes, name, host) in self._added.items()
        )


class _ObservedModule:
    def __init__(self, real: Any, text: str, given: list[_Given]) -> None:
        self.kernels, self.target, self.check = real.kernels, real.target, real.check
        self._text, self._given = text, given

    def launch(
        self, kernel: str, grid: Any, threads: Any, shared: int, parameters: Any, memory: _ObservedMemory, **_: Any
    ) -> Any:
        self._given.append(
            _Given(self._text, kernel, tuple(grid), tuple(threads), shared, tuple(parameters), memory.ranges())
        )
        return SimpleNamespace(counters={}, findings=[])
