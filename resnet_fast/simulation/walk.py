"""What each warp of a launch executes, from the machine code and the launch's parameters.

The module ``_sass`` (csrc/sass) executes the code as far as it decides branches and addresses: whole numbers,
predicates, special registers, constants, float32 where it comes to an address, and loads whose values are given.
Everything else, products above all, leaves its results unknown. An unknown value in a branch, an address or the guard
of an access is an error: no figure rests on a guess.

A walk has no time. A copy's bytes are there as it is issued, a barrier opens when its warps have come, and a wait for
a phase of an mbarrier appears once, as passed.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np

from .. import native
from ..errors import UserError
from .instruction import Instruction
from .kernel import Kernel
from .touched import destinations

STEP = np.dtype([("instruction", "<u4"), ("lanes", "<u4")])
"""One executed instruction: its place in the code, and the lanes whose guard is true (or unknown)."""

MOST_INSTRUCTIONS = 2_000_000_000
"""Warp instructions after which a walk counts as one that never ends."""

_STACK = 0x2000  # where a lane's local memory ends; kernels subtract their frame from it
_STACK_AT, _PARAMETERS_AT = 0x28, 0x198  # in bank 0; the second on sm_90, where descriptors are read by address
_SLOW = ("slowpath", "mediumpath")


@dataclass(frozen=True)
class MemoryRange:
    """Global memory that a launch may touch.

    Attributes:
        address, nbytes: where it is.
        name: of the tensor.
        content: its bytes; None where they decide neither branches nor addresses, so that they need not be known.
    """

    address: int
    nbytes: int
    name: str = ""
    content: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Launch:
    """A launch of machine code.

    Attributes:
        kernel: the code.
        grid: blocks along each axis.
        threads: threads of a block along each axis.
        shared: bytes of dynamic shared memory.
        parameters: the bytes of each parameter.
        memory: the global memory that it may touch.
    """

    kernel: Kernel
    grid: tuple[int, int, int]
    threads: tuple[int, int, int]
    shared: int
    parameters: tuple[bytes, ...]
    memory: tuple[MemoryRange, ...]

    @property
    def blocks(self) -> int:
        """Blocks of the grid."""
        return self.grid[0] * self.grid[1] * self.grid[2]


@dataclass(frozen=True)
class WarpWalk:
    """What one warp executed.

    Attributes:
        path: number of its sequence of instructions in ``Walk.paths``.
        events: a record for each executed access, barrier and wait, in order: ``step`` of the path; ``address``
            (global: of the first lane; shared memory: its byte; of an mbarrier or of a copy that one counts: the
            mbarrier's byte; a named barrier: its number); ``bytes`` of all lanes or of the box; ``first`` and
            ``sectors``, a slice of
            ``Walk.sectors``; ``wavefronts``, rounds through 32 banks of 4 bytes, and ``least``, the rounds without
            conflicts; ``value`` (BAR: number | threads << 8; SYNCS: the count, the bytes expected, or the parity).
    """

    path: int
    events: np.ndarray


@dataclass(frozen=True)
class BlockWalk:
    """What the warps of one block executed.

    Attributes:
        index: of the block, x first.
        warps: in order; empty records where only sectors were asked for.
        reads, writes: the distinct sectors, where only those were asked for.
    """

    index: int
    warps: tuple[WarpWalk, ...]
    reads: np.ndarray
    writes: np.ndarray


@dataclass(frozen=True)
class Walk:
    """What the walked blocks of a launch executed.

    Attributes:
        launch: the launch.
        paths: sequences of executed instructions (``STEP``); equal ones are shared.
        blocks: the blocks, in the order in which they were walked.
        sectors: numbers of 32-byte sectors of global memory (address / 32), by ``first`` and ``sectors`` of the events.
            Those of local memory lie from 2**52 on.
        executed: how often each instruction of the code was issued, with a true guard or not.
        assumed: what was taken for granted where a value is unknown, and how often.
    """

    launch: Launch
    paths: tuple[np.ndarray, ...]
    blocks: tuple[BlockWalk, ...]
    sectors: np.ndarray
    executed: np.ndarray
    assumed: dict[str, int]

    @property
    def instructions(self) -> int:
        """Issued warp instructions."""
        return int(self.executed.sum())

    @cached_property
    def opcodes(self) -> dict[str, int]:
        """How often each opcode was issued."""
        counts: Counter[str] = Counter()
        for one, n in zip(self.launch.kernel.code, self.executed.tolist(), strict=True):
            counts[one.opcode] += n
        return {name: n for name, n in sorted(counts.items()) if n}


def walk(
    launch: Launch,
    blocks: Iterable[int] | None = None,
    *,
    only_global: bool = False,
    limit: int = MOST_INSTRUCTIONS,
) -> Walk:
    """Walk blocks of a launch.

    Args:
        launch: the launch.
        blocks: their numbers, x first; all by default. They are walked in this order, each to its end.
        only_global: keep nothing but the sectors of global memory that each block reads and writes.
        limit: warp instructions after which the walk counts as one that never ends.

    Raises:
        UserError: an opcode that is not understood; an unknown value in a branch, an address or the guard of an access;
            an access outside of the launch's memory; parameters of other sizes than the kernel's.
        BackendError: the package was built without ``_sass``.
    """
    engine = native.sass()
    numbers = list(range(launch.blocks)) if blocks is None else list(blocks)
    if outside := [n for n in numbers if not 0 <= n < launch.blocks]:
        raise UserError(f"blocks from 0 to {launch.blocks - 1}", str(outside[:5]), "name blocks of the grid")
    kernel = launch.kernel
    results = [destinations(one.opcode, one.parsed) for one in kernel.code]
    memory = [(m.address, m.nbytes, m.name, m.content) for m in launch.memory]
    packed = _packed(launch)
    try:
        found = engine.walk(
            list(kernel.code), results, _slow_sides(kernel), launch.grid, launch.threads,
            kernel.shared + launch.shared, _constants(launch, packed, engine), packed, memory, numbers,
            not only_global, limit,
        )  # fmt: skip
    except engine.WalkError as error:
        raise UserError(
            f"machine code of {kernel.name} (sm_{kernel.arch}) that can be followed", str(error),
            "give the content of the memory that decides it, or teach csrc/sass the instruction",
        ) from None  # fmt: skip
    walked = tuple(
        BlockWalk(index, tuple(WarpWalk(path, events) for path, events in warps), reads, writes)
        for index, warps, reads, writes in found["blocks"]
    )
    return Walk(launch, tuple(found["paths"]), walked, found["sectors"], found["executed"], found["assumed"])


def _packed(launch: Launch) -> bytes:
    """Return the parameters as they lie in bank 0."""
    declared, given = launch.kernel.parameters, launch.parameters
    if [size for _, size in declared] != [len(one) for one in given]:
        raise UserError(
            f"parameters of {[size for _, size in declared]} bytes, as {launch.kernel.name} declares them",
            f"{[len(one) for one in given]}", "pass the launch's own",
        )  # fmt: skip
    out = bytearray(max((offset + size for offset, size in declared), default=0))
    for (offset, size), one in zip(declared, given, strict=True):
        out[offset : offset + size] = one
    return bytes(out)


def _constants(launch: Launch, packed: bytes, engine: Any) -> dict[int, tuple[bytes, bytes]]:
    """Return the constant banks, each with a byte that says what of it is known."""
    kernel = launch.kernel
    bank, known = bytearray(kernel.parameter_base + len(packed)), bytearray(kernel.parameter_base + len(packed))

    def put(at: int, content: bytes) -> None:
        bank[at : at + len(content)] = content
        known[at : at + len(content)] = b"\1" * len(content)

    put(0, struct.pack("<6I", *launch.threads, *launch.grid))
    put(_STACK_AT, struct.pack("<I", _STACK))
    if kernel.arch >= 90:
        put(_PARAMETERS_AT, struct.pack("<Q", engine.PARAMETERS))
    put(kernel.parameter_base, packed)
    banks = {0: (bytes(bank), bytes(known))}
    return banks | {n: (content, b"\1" * len(content)) for n, content in kernel.constants}


def _slow_sides(kernel: Kernel) -> list[int]:
    """For each instruction: 1 if it branches to a slow path of a quotient or a root, 2 if not branching leads there."""
    slow = {address for address, name in kernel.routines if any(word in name for word in _SLOW)}
    places = {kernel.index[address] for address in slow if address in kernel.index}
    sides = []
    for n, one in enumerate(kernel.code):
        side = 0
        if one.name == "BRA" and places:
            taken, other = (_calls(kernel, at, places) for at in (kernel.index.get(one.target or 0, -1), n + 1))
            side = 1 if taken and not other else 2 if other and not taken else 0
        sides.append(side)
    return sides


def _calls(kernel: Kernel, start: int, routines: set[int]) -> bool:
    """Whether the straight code from ``start`` calls one of the routines."""
    if start < 0:
        return False
    for one in islice(kernel.code, start, start + 32):
        if one.name == "CALL":
            return kernel.index.get(one.last_number or -1, -1) in routines
        if _leaves(one):
            return False
    return False


def _leaves(one: Instruction) -> bool:
    return one.name in ("EXIT", "RET", "BSYNC") or (one.name == "BRA" and not one.conditional)


def touched_sectors(walked: Walk, block: BlockWalk, writes: bool) -> Sequence[int]:
    """Return the distinct sectors of global memory that a block's events read or write."""
    code, found = walked.launch.kernel.code, set()
    for warp in block.warps:
        path = walked.paths[warp.path]
        for event in warp.events[warp.events["sectors"] > 0]:
            name = code[path["instruction"][event["step"]]].name
            if writes == (name in ("STG", "ST", "UTMASTG", "RED", "REDG")) or name in ("ATOMG", "ATOM"):
                found.update(walked.sectors[event["first"] : event["first"] + event["sectors"]].tolist())
    return sorted(found)
