"""A kernel's machine code and what it needs of a launch, from a cubin."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ..errors import UserError
from . import cubin, listing
from .instruction import Instruction

ARCHS = range(80, 100)
"""Architectures whose instructions are understood: the encoding of sm_70 to sm_90, the opcodes of sm_80 to sm_90."""


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel.

    Attributes:
        name: of the kernel in the cubin.
        arch: compute capability times ten.
        code: its instructions, those of its subroutines included.
        registers: of a thread.
        shared: bytes of shared memory that it declares, with what the system keeps at its start.
        barriers: named barriers of a block.
        parameter_base: where parameters begin in constant bank 0.
        parameters: (offset, bytes) of each parameter, from ``parameter_base`` on.
        constants: the bytes of constant banks 2 and 3, by bank.
        routines: address of each subroutine in ``code`` -> its name.
    """

    name: str
    arch: int
    code: tuple[Instruction, ...]
    registers: int
    shared: int
    barriers: int
    parameter_base: int
    parameters: tuple[tuple[int, int], ...]
    constants: tuple[tuple[int, bytes], ...] = ()
    routines: tuple[tuple[int, str], ...] = ()

    @cached_property
    def index(self) -> dict[int, int]:
        """Address of each instruction -> its place in ``code``."""
        return {one.address: n for n, one in enumerate(self.code)}

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Places in ``code`` where a basic block starts: the entry, targets of branches and calls, what follows one."""
        found = {0}
        for n, one in enumerate(self.code):
            if one.name in ("BRA", "CALL", "BSSY", "WARPSYNC") and (place := self.index.get(one.last_number or 0)):
                found.add(place)
            if one.name in ("BRA", "BRX", "JMX", "CALL", "RET", "EXIT", "BSYNC", "KILL") and n + 1 < len(self.code):
                found.add(n + 1)
        return tuple(sorted(found))


def read_kernel(binary: bytes, name: str | None = None) -> Kernel:
    """Return a kernel of a cubin.

    Args:
        binary: the cubin.
        name: of the kernel; may be left out where there is only one.

    Raises:
        UserError: no cubin, no such kernel, or one of an architecture whose code is not understood.
    """
    elf = cubin.CubinFile(binary)
    if elf.arch not in ARCHS:
        raise UserError(f"machine code of sm_{ARCHS[0]} to sm_90", f"sm_{elf.arch}", "compile for sm_80 or sm_90")
    if name is None and len(elf.kernels) == 1:
        name = elf.kernels[0]
    if name not in elf.kernels:
        raise UserError(f"one of the kernels {', '.join(elf.kernels)}", repr(name), "name it")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(binary)
        text = listing.cuobjdump("-sass", "-fun", name, path)
    about = elf.about(name)
    return Kernel(
        name, elf.arch, listing.parse(text, name), about.registers, about.shared, about.barriers,
        about.parameter_base, about.parameters, about.constants, about.routines,
    )  # fmt: skip
