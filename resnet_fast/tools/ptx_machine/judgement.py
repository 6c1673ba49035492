"""Judge mutants: say how the machine notices, or why there is nothing to notice.

A mutant is executed on the memory that the real launch was given. It is CAUGHT if the machine reports a finding, if a
byte of memory differs from the unchanged kernel's, if two schedules differ, or if it counts other accesses. Everything
else is a survivor. A survivor is EQUIVALENT if the machine shows why, on the launch and on its relatives (launches of
the same text with other values):

    no access needs it  a barrier, wait, fence or commit is removed, and no two accesses of these launches need it: the
                        machine orders all of them by its vector clocks, and reports each pair that it cannot order
    guard always true   for every lane that comes there
    same value          the changed instruction is executed beside the real one, and never gives another result
    same effect         what is computed from its result is computed beside the real values, too, up to each store,
                        address, branch, shuffle and wgmma: no value there differs
    dead value          where the result differs it is made undefined: no store, address or branch depends on it; or
                        what it stores or copies to shared memory is left out there, and nobody misses it
    same address        an access has another address register or offset, of equal value wherever it reads or writes
    same bytes          a store is changed, and memory is equal with either of two contents of what nobody wrote before
    same work by other  a branch is turned, and memory is equal likewise: of several blocks that compute the same bytes
    blocks              others store them, and every access is made as often

All of that is executed, by PTX with instructions added. A survivor without such a reason stays a survivor.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from .mutants import REGISTER, SYNCHRONISES, Mutant, PtxStatement, replaced, statements, type_of, writes
from .recorded import MutantOutcome, RecordedLaunch, execute

SEEDS = (0, 1, 2)


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
        real = execute(one)
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
    if s.opcode.startswith(SYNCHRONISES) and mutant.kind in ("barrier", "wait", "fence", "commit or arrive"):
        return "no access needs it"
    if mutant.kind == "guard" and mutant.new is not None and not mutant.new.guard:
        never = f"@{s.guard[2:]}" if s.guard.startswith("@!") else f"@!{s.guard[1:]}"
        if all(not execute(one, replaced(one.text, s, f"{never} trap; {s}")).finding for one in launches):
            return "guard always true"
    if mutant.new is not None and writes(s) and s.operands[0] == mutant.new.operands[0]:
        if all(not execute(one, _beside(one, mutant, "trap;")).finding for one in launches):
            return "same value"
        if (shadowed := _shadowed(launches[0], mutant)) and not any(execute(o, shadowed).finding for o in launches):
            return "same effect"
        if skipping := _shadowed(launches[0], mutant, skip=True):
            ends = [(execute(one, skipping), execute(one)) for one in launches]
            if all(not end.finding and end.same_memory(real) for end, real in ends):
                return "dead value"
        blank = " ".join(f"mov.{_move(r)} {r}, {_unset(r)};" for r in REGISTER.findall(s.operands[0]))
        ends = [(execute(one, _beside(one, mutant, blank)), execute(one)) for one in launches]
        if all(not end.finding and end.same_memory(real) for end, real in ends):
            return "dead value"
    checked = "" if mutant.new is None else _same_address(s, mutant.new)
    if checked and not any(execute(one, replaced(one.text, s, checked)).finding for one in launches):
        return "same address"
    if s.opcode.startswith("cp.async."):
        ends = [(execute(one, replaced(one.text, s, "")), execute(one)) for one in launches]
        if all(not end.finding and end.same_memory(real) for end, real in ends):
            return "dead value"
    if s.opcode.startswith(("st.", "stmatrix", "bra")):
        fills = [(execute(one, text, fill=0), execute(one, fill=0)) for one in launches]
        as_often = all(end.counters.get("lines") == real.counters["lines"] for end, real in fills)
        if all(not end.finding and end.same_memory(real) for end, real in fills):
            if not s.opcode.startswith("bra"):
                return "same bytes"
            if as_often:
                return "same work by other blocks"
    return ""


def _beside(launch: RecordedLaunch, mutant: Mutant, then: str) -> str:
    """Return PTX in which the mutant's statement is executed before the real one, into registers of its own; ``then``
    (statements) is executed by lanes in which a result differs."""
    s, new = mutant.was, mutant.new
    assert new is not None
    results = REGISTER.findall(s.operands[0])
    own = {r: f"%mutant_is{i}" for i, r in enumerate(results)}
    declared = [f".reg .{_move(r)} {own[r]};" for r in own]
    declared += [f".reg .{_move(r)} {_unset(r)};" for r in own]
    declared += [".reg .pred %mutant_differs, %mutant_one;"]
    first = replace(new, operands=(REGISTER.sub(lambda m: own[m[0]], new.operands[0]), *new.operands[1:]))
    body = ["mov.pred %mutant_differs, 0;"]
    body += [f"mov.{_move(r)} {own[r]}, {r};" for r in results] if new.guard else []
    body += [str(first), str(s)]
    for r in results:
        differ = "xor.pred" if _move(r) == "pred" else f"setp.ne.{_move(r)}"
        body += [f"{differ} %mutant_one, {own[r]}, {r};", "or.pred %mutant_differs, %mutant_differs, %mutant_one;"]
    body += [f"@%mutant_differs {one.strip()};" for one in then.split(";") if one.strip()]
    return replaced(launch.text, s, "{ " + " ".join([*dict.fromkeys(declared), *body]) + " }")


_ADDRESS = re.compile(r"\[\s*(%\w+)\s*(?:\+\s*(-?\d+))?\s*\]")


def _same_address(was: PtxStatement, new: PtxStatement) -> str:
    """Return statements that trap in a lane in which one address of an access differs, and then ``was``; empty if that
    is not what was changed. A copy that fills with zeros reads nothing."""
    changed = [n for n, (a, b) in enumerate(zip(was.operands, new.operands, strict=False)) if a != b]
    if len(changed) != 1 or was.guard != new.guard or was.opcode != new.opcode:
        return ""
    places = [_ADDRESS.fullmatch(one.operands[changed[0]]) for one in (was, new)]
    if None in places:
        return ""
    wide = {_move(place[1]) for place in places if place}
    if len(wide) != 1:
        return ""
    bits = wide.pop()
    body = ["{ .reg .pred %mutant_differs, %mutant_reads;", f".reg .{bits} %mutant_at0, %mutant_at1;"]
    body += [f"add.s{bits[1:]} %mutant_at{n}, {place[1]}, {place[2] or 0};" for n, place in enumerate(places) if place]
    body += [f"setp.ne.{bits} %mutant_differs, %mutant_at0, %mutant_at1;"]
    if was.opcode.startswith("cp.async") and changed == [1] and len(was.operands) == 4:
        body += [f"setp.ne.b32 %mutant_reads, {was.operands[3]}, 0;"]
        body += ["and.pred %mutant_differs, %mutant_differs, %mutant_reads;"]
    if was.guard:
        body += [f"selp.b32 %mutant_lane, 1, 0, {was.guard.strip('@!')};", "setp.eq.b32 %mutant_reads, %mutant_lane, "]
        body[-1] += "0;" if was.guard.startswith("@!") else "1;"
        body[1] += " .reg .b32 %mutant_lane;"
        body += ["and.pred %mutant_differs, %mutant_differs, %mutant_reads;"]
    return " ".join([*body, "@%mutant_differs trap;", str(was), "}"])


_COMPUTES = re.compile(
    r"(mov|add|sub|mul|mad|fma|setp|selp|and|or|xor|not|shl|shr|min|max|cvt|neg|abs|bfe|bfi|prmt|div|rem|mul24|lop3|mma)\."
)


def _shadowed(launch: RecordedLaunch, mutant: Mutant, skip: bool = False) -> str:
    """Return PTX that also computes what follows from the mutant's result, in registers of its own, and traps where an
    instruction that does more than compute would read another value. Empty if that cannot be written.

    A register follows from the result if any instruction computes it from one that does. Every instruction that writes
    such a register has a double, so real and shadow are equal wherever the mutant's result has no part in them.
    ``skip``: a store to shared memory does not trap, but is left out in the lanes in which it differs.
    """
    s, new = mutant.was, mutant.new
    assert new is not None
    if not _COMPUTES.match(s.opcode):
        return ""
    all_of_it = statements(launch.text, launch.kernel)
    follows: set[str] = set(REGISTER.findall(s.operands[0]))
    doubled: set[int] = set()
    while True:
        before = len(follows), len(doubled)
        for one in all_of_it:
            if not writes(one):
                continue
            written = set(REGISTER.findall(one.operands[0]))
            sources = set(REGISTER.findall(" ".join((one.guard, *one.operands[1:]))))
            if written & follows or (_COMPUTES.match(one.opcode) and sources & follows):
                doubled.add(one.line)
                if _COMPUTES.match(one.opcode):
                    follows |= written
        if before == (len(follows), len(doubled)):
            break
    names = {r: f"%mutant_of_{r[1:]}" for r in follows}

    def shadow(text: str) -> str:
        return REGISTER.sub(lambda m: names.get(m[0], m[0]), text)

    lines = launch.text.split("\n")
    known = {one.line for one in all_of_it}
    for at in range(all_of_it[0].line, all_of_it[-1].line):
        if at + 1 in known or lines[at].lstrip().startswith((".", "//", "$")):
            continue
        # Several instructions on a line: all that they name must be equal before, and is taken over after.
        named = sorted(set(REGISTER.findall(lines[at])) & follows)
        checks, copies = [_differs(r, names[r]) for r in named], [f"mov.{_move(r)} {names[r]}, {r};" for r in named]
        if named:
            lines[at] = " ".join(["{ .reg .pred %mutant_differs;", *checks, lines[at].partition("//")[0], *copies, "}"])
    for one in all_of_it:
        changed = new if one.line == s.line else one
        results = REGISTER.findall(one.operands[0]) if writes(one) else []
        read = set(REGISTER.findall(" ".join((one.guard, *one.operands[len(results) > 0 :])))) & follows
        if _COMPUTES.match(one.opcode) and results:
            if one.line in doubled:
                lines[one.line - 1] = f"{one.indent}{shadow(str(changed))} {one}"
            continue
        checks = []
        for r in sorted(read):
            guard, before_it = _guard_of(one, r)
            checks += [before_it, _differs(r, names[r], guard)]
        copies = [f"mov.{_move(r)} {names[r]}, {r};" for r in results if r in follows]
        if checks and skip and one.opcode.startswith("st.shared") and not one.guard:
            differ = [_differs(r, names[r], then="") for r in sorted(read)]
            body = ["{ .reg .pred %mutant_differs, %mutant_any;", "mov.pred %mutant_any, 0;"]
            body += [f"{test} or.pred %mutant_any, %mutant_any, %mutant_differs;" for test in differ]
            lines[one.line - 1] = one.indent + " ".join([*body, f"@!%mutant_any {one}", "}"])
            continue
        if checks or copies:
            lines[one.line - 1] = one.indent + " ".join(
                ["{ .reg .pred %mutant_differs, %mutant_any;", *checks, str(one), *copies, "}"]
            )
    declared = " ".join(f".reg .{_move(r)} {name};" for r, name in sorted(names.items()))
    first = next(i for i in range(all_of_it[0].line - 1, 0, -1) if lines[i].strip() == "{")
    lines[first] += " " + declared
    return "\n".join(lines)


def _differs(real: str, shadow: str, guard: str = "", then: str = "@%mutant_differs trap;") -> str:
    """Return statements that compare two registers where ``guard`` holds, and trap where they differ. If either is
    undefined, the machine reports that, and nothing is shown."""
    compare = "xor.pred" if _move(real) == "pred" else f"setp.ne.{_move(real)}"
    return f"mov.pred %mutant_differs, 0; {guard} {compare} %mutant_differs, {real}, {shadow}; {then}".rstrip()


def _guard_of(s: PtxStatement, register: str) -> tuple[str, str]:
    """Return the guard under which a statement reads a register, and a statement that computes the guard, if any.

    A guarded one reads in the lanes of its guard, and ``cp.async`` of no bytes reads at no address.
    """
    reads = [n for n, operand in enumerate(s.operands) if register in REGISTER.findall(operand)]
    if s.opcode.startswith("cp.async") and len(s.operands) == 4 and not s.guard and reads == [1]:
        return "@%mutant_any", f"setp.ne.b32 %mutant_any, {s.operands[3]}, 0;"
    return ("" if register in REGISTER.findall(s.guard) else s.guard), ""


def _move(register: str) -> str:
    """Return the type of a register by its name, as both compilers choose it."""
    types = {"%p": "pred", "%rs": "b16", "%h": "b16", "%rd": "b64", "%fd": "b64"}
    return types.get(type_of(register), "b32")


def _unset(register: str) -> str:
    return f"%mutant_unset_{_move(register)}"
