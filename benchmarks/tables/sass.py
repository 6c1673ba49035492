"""What machine code costs: global accesses, tensor-core work, and the main loops.

A main loop is an innermost natural loop with tensor-core instructions in it. Natural: its head dominates the branch
back to it. Looking for a branch to a lower address alone finds loops that are none: the compiler puts the retries of a
barrier wait after the kernel's last instruction, and they branch back into the middle of the code. What belongs to the
loop is what can run between two passes of its head, retries included, each counted once.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise

from resnet_fast.simulation.instruction import Instruction

_NEVER_RETURNS = ("EXIT", "RET", "BRX", "JMX", "KILL")
_WIDTHS = {"U8": 1, "S8": 1, "8": 1, "U16": 2, "S16": 2, "16": 2, "64": 8, "128": 16, "256": 32}
_GLOBAL = ("LDG", "LDGSTS", "STG", "RED", "REDG", "ATOM", "ATOMG")
_BULK = ("UTMALDG", "UTMASTG", "UTMAREDG", "UBLKCP", "UTMAPF")


def accesses(code: Iterable[Instruction]) -> dict[str, int]:
    """Count global memory instructions by name and bytes per lane (``LDG.16``: 16 bytes), bulk copies by name alone."""
    counts: Counter[str] = Counter()
    for i in code:
        if i.name in _GLOBAL:
            width = next((_WIDTHS[m] for m in i.opcode.split(".")[1:] if m in _WIDTHS), 4)
            counts[f"{i.name}.{width}"] += 1
        elif i.name in _BULK:
            counts[i.name] += 1
    return dict(sorted(counts.items()))


def is_narrow(access: str) -> bool:
    """Return whether an access has fewer than 16 bytes per lane."""
    width = access.partition(".")[2]
    return bool(width) and int(width) < 16


def tensor_ops(code: Iterable[Instruction]) -> dict[str, int]:
    """Count tensor-core instructions by opcode."""
    return dict(sorted(Counter(i.opcode for i in code if i.is_tensor).items()))


def local_accesses(code: Iterable[Instruction]) -> int:
    """Count loads and stores of local memory: spilled registers, or arrays indexed at run time."""
    return sum(i.name in ("LDL", "STL") for i in code)


def tensor_work(code: Sequence[Instruction], part: Iterable[Instruction], warps: int) -> tuple[int, float]:
    """Return (multiply-adds, the same in units of 16-bit ones) of a block of ``warps`` in ``part`` of its ``code``.

    TF32 operands take the tensor cores twice as long as 16-bit ones, 8-bit ones half as long.
    """
    macs, weighted = 0, 0.0
    for i in part:
        if not i.is_tensor:
            continue
        n, weight = _macs(code, i, warps)
        macs, weighted = macs + n, weighted + n * weight
    return macs, weighted


def _macs(code: Sequence[Instruction], i: Instruction, warps: int) -> tuple[int, float]:
    weight = 2.0 if "TF32" in i.opcode else 0.5 if i.name[0] in "IQ" else 1.0
    if i.name.startswith("UTC"):  # one thread issues for the whole block; the shape is in the instruction descriptor
        return _tcgen05_macs(code, i)
    if m := re.search(r"\.(\d+)x(\d+)x(\d+)\b", i.opcode):  # HGMMA.64x128x16: per warpgroup
        return int(m[1]) * int(m[2]) * int(m[3]) * warps // 4, weight
    if m := re.search(r"\.(16)(8)(\d+)\b", i.opcode):  # HMMA.16816, HMMA.1688: per warp
        return int(m[1]) * int(m[2]) * int(m[3]) * warps, weight
    raise ValueError(f"unknown tensor-core instruction {i.opcode}")


def _tcgen05_macs(code: Sequence[Instruction], i: Instruction) -> tuple[int, float]:
    """M and N from the descriptor's bits 24-28 and 17-22 (PTX ISA, tcgen05 instruction descriptor); K is 32 bytes."""
    register = re.search(r"idesc\[(UR\d+)\]", i.operands)
    value = None
    for earlier in code:
        if earlier.address >= i.address:
            break
        if register and earlier.name == "UMOV" and (m := re.match(rf"{register[1]}, 0x([0-9a-f]+)$", earlier.operands)):
            value = int(m[1], 16)
    if value is None:
        raise ValueError(f"no constant instruction descriptor for {i.opcode} {i.operands}")
    m_size, n_size = (value >> 24 & 0x1F) * 16, (value >> 17 & 0x3F) * 8
    if i.name != "UTCHMMA":
        return m_size * n_size * 32, 0.5
    tf32 = (value >> 7 & 7) == 2
    return m_size * n_size * (8 if tf32 else 16), 2.0 if tf32 else 1.0


def main_loops(code: Sequence[Instruction]) -> list[tuple[Instruction, ...]]:
    """Return the innermost natural loops that contain tensor-core instructions, in program order."""
    blocks, successors = _flow(code)
    dominators = _dominators(successors)
    predecessors: list[list[int]] = [[] for _ in blocks]
    for b, targets in enumerate(successors):
        for t in targets:
            predecessors[t].append(b)
    bodies: dict[int, set[int]] = {}
    for b, targets in enumerate(successors):
        for head in targets:
            if not dominators[b] >> head & 1:
                continue
            body = bodies.setdefault(head, {head})
            stack = [b]
            while stack:
                if (n := stack.pop()) not in body:
                    body.add(n)
                    stack += predecessors[n]
    busy = [body for body in bodies.values() if any(i.is_tensor for b in body for i in blocks[b])]
    innermost = [body for body in busy if not any(other < body for other in busy)]
    return [tuple(i for b in sorted(body) for i in blocks[b]) for body in sorted(innermost, key=min)]


def _flow(code: Sequence[Instruction]) -> tuple[list[list[Instruction]], list[list[int]]]:
    """Basic blocks and their successors. Calls return; a BSYNC goes to what the last BSSY of its register announced:
    registers are used again, in a loop and after it."""
    announced: dict[str, int] = {}
    joins: dict[int, int] = {}
    for i in code:
        if i.name == "BSSY" and (m := re.search(r"(B\d+), .*0x([0-9a-f]+)", i.operands)):
            announced[m[1]] = int(m[2], 16)
        elif i.name == "BSYNC" and (register := i.operands.split(",")[0].strip()) in announced:
            joins[i.address] = announced[register]
    ends = ("BRA", "BSYNC", *_NEVER_RETURNS)
    starts = {code[0].address} | {i.target for i in code if i.target is not None} | set(joins.values())
    starts |= {b.address for a, b in pairwise(code) if a.name in ends}
    blocks: list[list[Instruction]] = []
    for i in code:
        if i.address in starts:
            blocks.append([])
        blocks[-1].append(i)
    at = {block[0].address: n for n, block in enumerate(blocks)}
    successors: list[list[int]] = []
    for n, block in enumerate(blocks):
        last = block[-1]
        to = [at[last.target]] if last.target in at else []
        if last.name == "BSYNC":
            to = [at[a] for a in (joins.get(last.address),) if a in at]
        stops = last.name in (*_NEVER_RETURNS, "BRA") and not last.conditional
        if n + 1 < len(blocks) and not stops and not (last.name == "BSYNC" and to and not last.predicate):
            to.append(n + 1)
        successors.append(to)
    return blocks, successors


def _dominators(successors: list[list[int]]) -> list[int]:
    """For each block the set, as bits, of blocks that every way from the entry passes; none for unreachable ones."""
    everything = (1 << len(successors)) - 1
    dominators = [everything] * len(successors)
    dominators[0] = 1
    order, changed = list(range(len(successors))), True
    predecessors: list[list[int]] = [[] for _ in successors]
    for b, targets in enumerate(successors):
        for t in targets:
            predecessors[t].append(b)
    while changed:
        changed = False
        for b in order[1:]:
            new = everything if predecessors[b] else 0
            for p in predecessors[b]:
                new &= dominators[p]
            new |= 1 << b
            changed |= new != dominators[b]
            dominators[b] = new
    return dominators
