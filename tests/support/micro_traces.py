"""Kernels of a few instructions with traces written by hand, for tests of the cycle model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from resnet_fast.simulation.constants import Constants
from resnet_fast.simulation.instruction import Instruction
from resnet_fast.simulation.launches import LaunchSize, SimulatedLaunch, reasons, simulate

STEP = np.dtype([("instruction", "<u4"), ("lanes", "<u4")])
EVENT = np.dtype(
    [
        ("step", "<u4"),
        ("address", "<u8"),
        ("bytes", "<u4"),
        ("wavefronts", "<u2"),
        ("value", "<i8"),
        ("first", "<u4"),
        ("sectors", "<u4"),
    ]
)


def op(
    opcode: str,
    operands: str = "",
    stall: int = 1,
    write: int | None = None,
    read: int | None = None,
    wait: Sequence[int] = (),
    yields: bool = False,
) -> Instruction:
    """Return an instruction with this control word."""
    bits = stall | (not yields) << 4 | (7 if write is None else write) << 5 | (7 if read is None else read) << 8
    bits |= sum(1 << b for b in wait) << 11
    return Instruction(0, "", opcode, operands, (0, bits << 41))


COUNT = 256
"""Instructions of a straight kernel, as of :func:`ffma`."""


def ffma(stall: int = 1, sources: str = "R2, R3, 1") -> list[Instruction]:
    return [op("FFMA", f"R0, {sources}", stall=stall)] * COUNT


@dataclass
class Access:
    """What one executed instruction accesses; ``sectors`` are numbers, of 32 bytes each."""

    sectors: Sequence[int] = ()
    wavefronts: int = 0
    bytes: int = 0
    address: int = 0
    value: int = 0


@dataclass
class Warp:
    """A warp of a hand-made walk."""

    path: int
    events: np.ndarray


@dataclass
class Block:
    """A block of a hand-made walk."""

    index: int
    warps: list[Warp]
    reads: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    writes: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))


@dataclass
class Walk:
    """A hand-made walk."""

    paths: list[np.ndarray]
    blocks: list[Block] = field(default_factory=list)
    sectors: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))


@dataclass
class Micro:
    """A kernel that runs straight through, or along ``path``.

    Attributes:
        code: its instructions; EXIT is added.
        access: (block, warp, place in the path) -> what is accessed there, None for nothing.
        path: places in the code, in the order of execution.
        registers: of a thread.
    """

    code: list[Instruction]
    access: Callable[[int, int, int], Access | None] = lambda block, warp, step: None
    path: Sequence[int] | Callable[[int], Sequence[int]] | None = None
    registers: int = 32

    def __post_init__(self) -> None:
        self.code = [*self.code, op("EXIT")]

    def path_of(self, warp: int) -> list[int]:
        path = self.path(warp) if callable(self.path) else self.path
        return [*(range(len(self.code) - 1) if path is None else path), len(self.code) - 1]

    def walker(self, warps: int) -> Callable[[Sequence[int], bool], Walk]:
        paths = [np.array([(i, 0xFFFFFFFF) for i in self.path_of(w)], STEP) for w in range(warps)]

        def walk(blocks: Sequence[int], only_global: bool) -> Walk:
            out, sectors = Walk(paths), []
            for b in blocks:
                block, first = Block(b, []), len(sectors)
                for w in range(warps):
                    rows = []
                    for step in range(len(paths[w])):
                        one = self.access(b, w, step)
                        if one is None:
                            continue
                        row = (step, one.address, one.bytes, one.wavefronts, one.value, len(sectors), len(one.sectors))
                        rows.append(row)
                        sectors.extend(one.sectors)
                    block.warps.append(Warp(w, np.array(rows, EVENT)))
                block.reads = np.unique(np.array(sectors[first:], np.uint64))
                out.blocks.append(block)
            out.sectors = np.array(sectors, np.uint64)
            return out

        return walk

    def run(
        self, constants: Constants, warps: int = 1, blocks: int = 1, shared: int = 0, **more: Any
    ) -> SimulatedLaunch:
        return simulate(self, LaunchSize(blocks, 32 * warps, shared), self.walker(warps), constants, **more)


def waits(found: SimulatedLaunch) -> Mapping[str, float]:
    """Return by reason how many cycles a launch's warps spent, in all of its simulated blocks."""
    total = found.waits_by_instruction.sum(0)
    return dict(zip(reasons(), total.tolist(), strict=True))
