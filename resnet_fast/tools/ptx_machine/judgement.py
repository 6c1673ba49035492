"""Judge mutants: say how the machine notices, or why there is nothing to notice.

A mutant is executed on the memory that the real launch was given. It is CAUGHT if the machine reports a finding, if a
byte of memory differs from the unchanged kernel's, if two schedules differ, or if it counts other accesses. Everything
else is a survivor. A survivor is EQUIVALENT if the machine shows why, on the launch and on its relatives (launches of
the same text with other values):

    no access needs it  a barrier, wait, fence or commit is removed, moved, or for others, and no two accesses of these
                        launches need it: the machine orders all of them by its vector clocks, and reports each pair
                        that it cannot order
    guard always true   for every lane that comes there
    same value          the changed instruction is executed beside the real one, and never gives another result
    same effect         what is computed from its result is computed beside the real values, too, loaded from the
                        address that follows and exchanged between lanes, up to each store, branch and wgmma: no value
                        there differs
    bits that TF32      no other bits of the result differ, and memory is equal with all of these turned over
    drops
    same value by the   the branch that hangs on the changed predicate computes the same on both of its sides
    other branch
    dead value          where the result differs it is made undefined, or what follows from it and is stored in shared
                        memory: no store to global memory, address or branch depends on it; or what it copies to shared
                        memory is left out, and nobody misses it
    rounded away        the least number above 0 in place of 0; one 255 times as large, of either sign, gives the same
    multiplied by zeros memory is equal with either of two other numbers in the operand of a product that changes
    same address        an access has another address register or offset, of equal value wherever it reads or writes
    copies all bytes    zero fill is left out of a copy that never fills
    same bytes          a store is changed, and memory is equal with either of two contents of what nobody wrote before
    same work by        a branch or the guard of stores changes, and memory is equal likewise: of several blocks or
    others              lanes that compute the same bytes others store them, and every access is made as often

All of that is executed, by PTX with instructions added. A survivor without such a reason stays a survivor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .mutants import REGISTER, SYNCHRONISES, Mutant, replaced, writes
from .recorded import MutantOutcome, RecordedLaunch, execute
from .witnesses import (
    beside,
    bits,
    low_bits,
    only_guards_stores,
    other_branch,
    same_address,
    shadowed,
    unset,
    whole_copies,
    with_operand,
)

SEEDS = (0, 1, 2)

PAIRS = (0x42284228, -0x3D563D56)
"""Two operands of a product, pairs of numbers of 16 bits, far from each other in either format."""

LEAST, LARGER = "0f00000001", ("0f000000FF", "0f800000FF")
"""The least fp32 number above 0, and two of 255 times its size."""


@dataclass(frozen=True)
class MutantVerdict:
    """How a mutant was ``caught`` (finding, result, schedules, counts), or why it is ``equivalent``, in words.

    It is a survivor if both are empty. ``said``: the machine's finding.
    """

    caught: str = ""
    equivalent: str = ""
    said: str = ""

    @property
    def survived(self) -> bool:
        return not self.caught and not self.equivalent


def judge(launch: RecordedLaunch, mutant: Mutant, relatives: Sequence[RecordedLaunch] = ()) -> MutantVerdict:
    """Execute a mutant on a launch, and if it survives on the launch's relatives, and say what came of it."""
    text = mutant(launch.kernel, launch.text)
    for one in (launch, *relatives):
        ends: list[MutantOutcome] = []
        real = one.outcome
        for seed in SEEDS:
            end = execute(one, text, seed)
            if end.finding:
                return MutantVerdict("finding", said=end.finding)
            if not end.same_memory(real):
                alone = seed == SEEDS[0] or ends[0].same_memory(end)
                return MutantVerdict("result" if alone or not ends[0].same_memory(real) else "schedules")
            ends.append(end)
        if plan_of(end, mutant) != plan_of(real, mutant):
            return MutantVerdict("counts")
    return MutantVerdict(equivalent=reason(mutant, text, [launch, *relatives]))


def plan_of(end: MutantOutcome, mutant: Mutant) -> Any:
    """Return the counters that a kernel's plan fixes: accesses of each allocation, wavefronts, products and copies.

    Barriers are left out, and of a changed store what it writes: that it is missing is no broken plan if the bytes are
    there.
    """
    events = {k: n for k, n in end.counters["events"].items() if k != "barriers"}
    reads = mutant.kind == "store"
    allocations = {
        name: {k: n for k, n in counts.items() if not (reads and "written" in k)}
        for name, counts in end.counters["allocations"].items()
    }
    return allocations, events, 0 if reads else sum(one["wavefronts"] for one in end.counters["lines"].values())


def reason(mutant: Mutant, text: str, launches: Sequence[RecordedLaunch]) -> str:
    """Return why a mutant that survived computes the same, or nothing."""
    s = mutant.was
    if mutant.kind == "order" or (
        s.opcode.startswith(SYNCHRONISES) and mutant.kind in ("barrier", "wait", "fence", "commit or arrive")
    ):
        return "no access needs it"
    if mutant.kind == "guard" and mutant.new is not None and not mutant.new.guard:
        never = f"@{s.guard[2:]}" if s.guard.startswith("@!") else f"@!{s.guard[1:]}"
        if all(not execute(one, replaced(one.text, s, f"{never} trap; {s}")).finding for one in launches):
            return "guard always true"
    if mutant.new is not None and writes(s) and s.operands[0] == mutant.new.operands[0]:
        if all(not execute(one, beside(one, mutant, "trap;")).finding for one in launches):
            return "same value"
        if (doubled := shadowed(launches[0], mutant)) and not any(execute(o, doubled).finding for o in launches):
            return "same effect"
        if (both := other_branch(launches[0], mutant)) and not any(execute(one, both).finding for one in launches):
            return "same value by the other branch"
        if turned := low_bits(launches[0], mutant):
            ends = [(execute(one, turned), one.outcome) for one in launches]
            if all(not end.finding and end.same_memory(real) for end, real in ends):
                return "bits that TF32 drops"
        if blanked := shadowed(launches[0], mutant, blank=True):
            ends = [(execute(one, blanked), one.outcome) for one in launches]
            if all(not end.finding and end.same_memory(real) for end, real in ends):
                return "dead value"
        blank = " ".join(f"mov.{bits(r)} {r}, {unset(r)};" for r in REGISTER.findall(s.operands[0]))
        ends = [(execute(one, beside(one, mutant, blank)), one.outcome) for one in launches]
        if all(not end.finding and end.same_memory(real) for end, real in ends):
            return "dead value"
    if mutant.new is not None and LEAST in mutant.new.operands and LEAST not in s.operands:
        larger = [str(mutant.new).replace(LEAST, number) for number in LARGER]
        texts = [(one, replaced(one.text, s, number)) for one in launches for number in larger]
        ends = [(execute(one, number), one.outcome) for one, number in texts]
        if all(not end.finding and end.same_memory(real) for end, real in ends):
            return "rounded away"
    if mutant.new is not None and (others := [with_operand(mutant, pairs) for pairs in PAIRS]) and all(others):
        texts = [(one, replaced(one.text, s, other)) for one in launches for other in others]
        ends = [(execute(one, other), one.outcome) for one, other in texts]
        if all(not end.finding and end.same_memory(real) for end, real in ends):
            return "multiplied by zeros"
    whole = "" if mutant.new is None else whole_copies(s, mutant.new)
    if whole and not any(execute(one, replaced(one.text, s, whole)).finding for one in launches):
        return "copies all bytes"
    checked = "" if mutant.new is None else same_address(s, mutant.new)
    if checked and not any(execute(one, replaced(one.text, s, checked)).finding for one in launches):
        return "same address"
    if s.opcode.startswith("cp.async."):
        ends = [(execute(one, replaced(one.text, s, "")), one.outcome) for one in launches]
        if all(not end.finding and end.same_memory(real) for end, real in ends):
            return "dead value"
    stores = s.opcode.startswith(("st.", "stmatrix"))
    if stores or s.opcode.startswith("bra") or only_guards_stores(launches[0], s):
        fills = [(execute(one, text, fill=0), execute(one, fill=0)) for one in launches]
        as_often = all(end.counters.get("lines") == real.counters["lines"] for end, real in fills)
        if all(not end.finding and end.same_memory(real) for end, real in fills):
            if stores:
                return "same bytes"
            if as_often:
                return "same work by others"
    return ""
