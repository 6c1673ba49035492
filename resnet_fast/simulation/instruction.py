"""Machine code as records: what one instruction is, which registers it touches, and what its control word asks for.

A 128-bit instruction of sm_70 to sm_90 carries its schedule. Bits 105-125 hold stall cycles, the yield bit, two
scoreboards that it sets, those that it waits for, and the reuse flags of its operands. :class:`Control` has them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

from .operands import Operand, Registers, operands
from .touched import touched

_TENSOR = re.compile(r"^(?:[HIDQO]G?MMA|UTC[HQIO]M+A)$")


@dataclass(frozen=True)
class Control:
    """The control word of one instruction.

    Attributes:
        stall: cycles before the same warp may issue again, 0-15.
        yields: whether the scheduler is asked to turn to another warp (the bit is 0 then).
        write_barrier: scoreboard that is released when the result is written, 0-5, or None.
        read_barrier: scoreboard that is released when the operands have been read, or None.
        wait: scoreboards that must be released first, a bit for each.
        reuse: operand slots whose register stays in the operand cache, a bit for each.
    """

    stall: int
    yields: bool
    write_barrier: int | None
    read_barrier: int | None
    wait: int
    reuse: int

    @classmethod
    def of(cls, high: int) -> Control:
        """Return the control word in the upper 64 bits of an instruction."""
        bits = high >> 41
        write, read = bits >> 5 & 7, bits >> 8 & 7
        return cls(
            stall=bits & 15,
            yields=not bits >> 4 & 1,
            write_barrier=None if write == 7 else write,
            read_barrier=None if read == 7 else read,
            wait=bits >> 11 & 63,
            reuse=bits >> 17 & 15,
        )


@dataclass(frozen=True)
class Instruction:
    """One machine instruction.

    Attributes:
        address: bytes from the start of the function.
        predicate: the guard as it is written: ``P0``, ``!P0``, ``UP1`` or empty.
        opcode: with its modifiers: ``LDG.E.128``.
        operands: as they are written, separated by commas.
        words: the two 64-bit words, lower first; zeros where the listing has none.
    """

    address: int
    predicate: str
    opcode: str
    operands: str
    words: tuple[int, int] = (0, 0)

    @property
    def name(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.partition(".")[0]

    @cached_property
    def parsed(self) -> tuple[Operand, ...]:
        """The operands, taken apart.

        Raises:
            UserError: one of a form that is not understood.
        """
        return operands(self.opcode, self.operands, self.words[0])

    @cached_property
    def _touched(self) -> tuple[tuple[Registers, ...], tuple[Registers, ...]]:
        return touched(self.opcode, self.predicate, self.parsed)

    @property
    def writes(self) -> tuple[Registers, ...]:
        """The registers that it writes.

        Raises:
            UserError: an opcode that is not understood.
        """
        return self._touched[0]

    @property
    def reads(self) -> tuple[Registers, ...]:
        """The registers that it reads, in the order of its operands, a guard last. Errors as of ``writes``."""
        return self._touched[1]

    @property
    def last_number(self) -> int | None:
        """The last hexadecimal number among the operands: where a branch, call or convergence point is."""
        found = re.findall(r"0x([0-9a-f]+)", self.operands)
        return int(found[-1], 16) if found else None

    @property
    def is_tensor(self) -> bool:
        """Whether tensor cores execute it."""
        return bool(_TENSOR.match(self.name))

    @property
    def target(self) -> int | None:
        """Where a branch goes."""
        return self.last_number if self.name == "BRA" else None

    @property
    def conditional(self) -> bool:
        """Whether control may also go on with the next instruction."""
        return bool(self.predicate) or "," in self.operands or ".DIV" in self.opcode

    @property
    def control(self) -> Control:
        """The control word."""
        return Control.of(self.words[1])
