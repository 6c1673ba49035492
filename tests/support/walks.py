"""Launches of the PTX machine, walked in machine code, and what both count."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from resnet_fast.simulation import Launch, MemoryRange, Walk, read_kernel, walk
from resnet_fast.tools.ptx_machine import PtxLaunch
from resnet_fast.tools.ptx_machine.recorded import RecordedLaunch, recorded

Assemble = Callable[[str, int], bytes]

KINDS = {
    "ld.global": "load", "st.global": "store", "cp.async.c": "copy", "ld.shared": "shared load",
    "st.shared": "shared store", "ldmatrix": "matrix load", "stmatrix": "matrix store", "atom.global": "update",
    "red.global": "update",
}  # fmt: skip
CODE_KINDS = {
    "LDG": "load", "STG": "store", "LDGSTS": "copy", "LDS": "shared load", "STS": "shared store", "LDSM": "matrix load",
    "STSM": "matrix store", "ATOMG": "update", "RED": "update", "UTMALDG": "box", "UTMASTG": "box",
}  # fmt: skip
LOADS = ("load", "shared load", "matrix load")
"""What an assembler may leave out: a load of what a register already has, or of what nobody uses."""


class Accesses(NamedTuple):
    """Accesses of one kind: instructions, sectors of global memory, wavefronts of shared memory."""

    instructions: int
    sectors: int
    wavefronts: int


class Pair(NamedTuple):
    """A launch as the PTX machine ran it, and its machine code's walk."""

    launch: PtxLaunch
    recorded: RecordedLaunch
    walk: Walk


def launch_of(launch: PtxLaunch, kept: RecordedLaunch, binary: bytes) -> Launch:
    """Return the same launch of machine code, with the memory that it was given."""
    grid, threads, shared, parameters = kept.given
    memory = tuple(MemoryRange(at, len(content), name, content) for at, content, name, _, _ in kept.ranges)
    return Launch(
        read_kernel(binary, kept.kernel), tuple(grid), tuple(threads), shared, tuple(parameters), memory
    )  # fmt: skip


def pairs(arch: int, run: Callable[[Any], Any], assemble: Assemble | None = None) -> list[Pair]:
    """Run ``run(machine)`` in the PTX machine and walk every launch; ``assemble`` makes a cubin of PTX without one."""
    found = []
    with recorded(arch) as (machine, launches):
        run(machine)
    for launch, kept in zip(machine.launches, launches, strict=True):
        binary = launch.binary or (assemble(kept.text, arch) if assemble else b"")
        found.append(Pair(launch, kept, walk(launch_of(launch, kept, binary))))
    return found


def ptx_accesses(pair: Pair) -> dict[str, Accesses]:
    """Count what the PTX machine executed, by kind."""
    lines = pair.recorded.text.splitlines()
    counts: dict[str, Counter[str]] = {}
    for number, one in pair.launch.report.counters["lines"].items():
        words = lines[number - 1].split()
        opcode = next((w for w in words if w.startswith(tuple(KINDS))), None)
        if opcode is None:
            continue
        kind = KINDS[max((k for k in KINDS if opcode.startswith(k)), key=len)]
        counts.setdefault(kind, Counter()).update({k: one[k] for k in Accesses._fields})
    return {kind: Accesses(*(c[k] for k in Accesses._fields)) for kind, c in counts.items()}


def walked_accesses(pair: Pair) -> dict[str, Accesses]:
    """Count what the walk executed, by kind."""
    code, counts = pair.walk.launch.kernel.code, dict[str, Counter[str]]()
    for block in pair.walk.blocks:
        for warp in block.warps:
            path = pair.walk.paths[warp.path]
            for event, place in zip(warp.events, path["instruction"][warp.events["step"]], strict=True):
                if (kind := CODE_KINDS.get(code[place].name)) is None:
                    continue
                banks = 0 if kind in ("load", "store", "update") else int(event["wavefronts"])
                one = {"instructions": 1, "sectors": int(event["sectors"]), "wavefronts": banks}
                counts.setdefault(kind, Counter()).update(one)
    return {kind: Accesses(*(c[k] for k in Accesses._fields)) for kind, c in counts.items()}


def distinct_sectors(pair: Pair, names: tuple[str, ...]) -> dict[str, set[int]]:
    """Count the distinct sectors of each allocation that instructions of these names touch, by the allocation's name.

    Several allocations may have one name; the name then has the count of each.
    """
    code, found = pair.walk.launch.kernel.code, set[int]()
    for block in pair.walk.blocks:
        for warp in block.warps:
            path = pair.walk.paths[warp.path]
            for event, place in zip(warp.events, path["instruction"][warp.events["step"]], strict=True):
                if code[place].name in names:
                    found.update(pair.walk.sectors[event["first"] : event["first"] + event["sectors"]].tolist())
    ordered = np.array(sorted(found), np.int64)
    counts: dict[str, set[int]] = {}
    for one in pair.walk.launch.memory:
        ends = np.searchsorted(ordered, [one.address // 32, (one.address + one.nbytes - 1) // 32 + 1])
        counts.setdefault(one.name, set()).add(int(np.diff(ends)[0]))
    return counts


def ptx_distinct_sectors(pair: Pair, way: str) -> dict[str, set[int]]:
    """Count the same in the PTX machine: ``way`` is read or written. It may have only the last of several of a name."""
    counts: dict[str, set[int]] = {}
    for name, one in pair.launch.report.counters["allocations"].items():
        counts.setdefault(name.partition(" #")[0], set()).add(one[f"unique_sectors_{way}"])
    return counts


def executed(walked: Walk) -> Counter[str]:
    """Count the instructions of warps of which a lane executes them, by opcode."""
    counts: Counter[str] = Counter()
    warps = Counter(warp.path for block in walked.blocks for warp in block.warps)
    for number, n in warps.items():
        path = walked.paths[number]
        places, times = np.unique(path["instruction"][path["lanes"] != 0], return_counts=True)
        for place, count in zip(places, times, strict=True):
            counts[walked.launch.kernel.code[place].opcode] += n * int(count)
    return counts


def products(pair: Pair) -> tuple[Counter[str], Counter[str]]:
    """Count multiply-adds of tensor cores by kind of instruction: in PTX and in machine code, where an instruction may
    be issued with a guard that is false, in place of a branch around it."""
    ptx: Counter[str] = Counter()
    for opcode, n in pair.launch.report.counters["opcodes"].items():
        if m := re.match(r"(wgmma\.mma_async|mma)\.sync\.aligned\.m(\d+)n(\d+)k(\d+)\.", opcode):
            ptx["group" if "wgmma" in opcode else "warp"] += n * int(m[2]) * int(m[3]) * int(m[4])
    code: Counter[str] = Counter()
    for opcode, n in executed(pair.walk).items():
        if m := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)\.", opcode):
            code["group"] += n * int(m[1]) * int(m[2]) * int(m[3])
        elif m := re.match(r"HMMA\.(16)(8)(\d+)\.", opcode):
            code["warp"] += n * int(m[1]) * int(m[2]) * int(m[3])
    return ptx, code
