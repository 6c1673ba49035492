"""PTX that shows why a mutant computes the same: the real kernel, with instructions added that trap where it does not.

judgement.py executes it. Each function returns the text of a kernel or of statements, or nothing where the mutant is of
another form.
"""

from __future__ import annotations

import re
from dataclasses import replace

from .mutants import REGISTER, Mutant, PtxStatement, replaced, statements, type_of, writes
from .recorded import RecordedLaunch


def beside(launch: RecordedLaunch, mutant: Mutant, then: str) -> str:
    """Return PTX in which the mutant's statement is executed before the real one, into registers of its own; ``then``
    (statements) is executed by lanes in which a result differs."""
    s, new = mutant.was, mutant.new
    assert new is not None
    results = REGISTER.findall(s.operands[0])
    own = {r: f"%mutant_is{i}" for i, r in enumerate(results)}
    declared = [f".reg .{bits(r)} {own[r]};" for r in own]
    declared += [f".reg .{bits(r)} {unset(r)};" for r in own]
    declared += [".reg .pred %mutant_differs, %mutant_one;"]
    first = replace(new, operands=(REGISTER.sub(lambda m: own[m[0]], new.operands[0]), *new.operands[1:]))
    body = ["mov.pred %mutant_differs, 0;"]
    body += [f"mov.{bits(r)} {own[r]}, {r};" for r in results] if new.guard else []
    body += [str(first), str(s)]
    for r in results:
        differ = "xor.pred" if bits(r) == "pred" else f"setp.ne.{bits(r)}"
        body += [f"{differ} %mutant_one, {own[r]}, {r};", "or.pred %mutant_differs, %mutant_differs, %mutant_one;"]
    body += [f"@%mutant_differs {one.strip()};" for one in then.split(";") if one.strip()]
    return replaced(launch.text, s, "{ " + " ".join([*dict.fromkeys(declared), *body]) + " }")


TF32_DROPS = 0x1FFF
"""Bits of an fp32 operand that a product in TF32 does not read."""


def low_bits(launch: RecordedLaunch, mutant: Mutant) -> str:
    """Return PTX that traps where more than the bits that TF32 drops of a result differ, and turns all of those bits
    over; empty if the result is not one fp32 number."""
    result = mutant.was.operands[0]
    if not mutant.was.opcode.endswith(".f32") or not REGISTER.fullmatch(result) or bits(result) != "b32":
        return ""
    text = beside(launch, mutant, "trap;")
    differs = f"setp.ne.b32 %mutant_one, %mutant_is0, {result};"
    assert differs in text
    kept = f"xor.b32 %mutant_is0, %mutant_is0, {result}; and.b32 %mutant_is0, %mutant_is0, {~TF32_DROPS};"
    text = text.replace(differs, f"{kept} setp.ne.b32 %mutant_one, %mutant_is0, 0;")
    return text.replace("@%mutant_differs trap;", f"@%mutant_differs trap; xor.b32 {result}, {result}, {TF32_DROPS};")


_ADDRESS = re.compile(r"\[\s*(%\w+)\s*(?:\+\s*(-?\d+))?\s*\]")


def same_address(was: PtxStatement, new: PtxStatement) -> str:
    """Return statements that trap in a lane in which one address of an access differs, and then ``was``; empty if that
    is not what was changed. A copy that fills with zeros reads nothing."""
    changed = [n for n, (a, b) in enumerate(zip(was.operands, new.operands, strict=False)) if a != b]
    if len(changed) != 1 or was.guard != new.guard or was.opcode != new.opcode:
        return ""
    places = [_ADDRESS.fullmatch(one.operands[changed[0]]) for one in (was, new)]
    if None in places:
        return ""
    kinds = {bits(place[1]) for place in places if place}
    if len(kinds) != 1:
        return ""
    wide = kinds.pop()
    body = ["{ .reg .pred %mutant_differs, %mutant_reads;", f".reg .{wide} %mutant_at0, %mutant_at1;", new.before]
    body += [f"add.s{wide[1:]} %mutant_at{n}, {place[1]}, {place[2] or 0};" for n, place in enumerate(places) if place]
    body += [f"setp.ne.{wide} %mutant_differs, %mutant_at0, %mutant_at1;"]
    if was.opcode.startswith("cp.async") and changed == [1] and len(was.operands) == 4:
        body += [f"setp.ne.b32 %mutant_reads, {was.operands[3]}, 0;"]
        body += ["and.pred %mutant_differs, %mutant_differs, %mutant_reads;"]
    if was.guard:
        body += [f"selp.b32 %mutant_lane, 1, 0, {was.guard.strip('@!')};", "setp.eq.b32 %mutant_reads, %mutant_lane, "]
        body[-1] += "0;" if was.guard.startswith("@!") else "1;"
        body[1] += " .reg .b32 %mutant_lane;"
        body += ["and.pred %mutant_differs, %mutant_differs, %mutant_reads;"]
    return " ".join([*body, "@%mutant_differs trap;", str(was), "}"])


def whole_copies(was: PtxStatement, new: PtxStatement) -> str:
    """Return ``was``, a copy that may fill with zeros, with a trap in each lane in which it fills; empty if that is not
    what ``new`` leaves out."""
    if not was.opcode.startswith("cp.async.c") or new.operands != was.operands[:3]:
        return ""
    fills = f"setp.ne.b32 %mutant_fills, {was.operands[3]}, {was.operands[2]};"
    return f"{{ .reg .pred %mutant_fills; {fills} @%mutant_fills trap; {was} }}"


_COMPUTES = re.compile(
    r"(mov|add|sub|mul|mad|fma|setp|selp|and|or|xor|not|shl|shr|min|max|cvt|neg|abs|bfe|bfi|prmt|div|rem|mul24|lop3|mma)\."
)

_LOADS = re.compile(r"(ld\.(shared|global|param|const)|ldmatrix)\b(?!\S*\.(acquire|relaxed|volatile))")
"""Loads that only read: all stores until then were equal, so another address shows what the mutant would find there."""


_EXCHANGES = re.compile(r"(shfl|redux|vote|match)\b")


def _has_double(s: PtxStatement) -> bool:
    """Return whether an instruction does no more than fill its registers, so that it can be executed twice."""
    return any(kind.match(s.opcode) for kind in (_COMPUTES, _LOADS, _EXCHANGES))


def shadowed(launch: RecordedLaunch, mutant: Mutant, blank: bool = False) -> str:
    """Return PTX that also computes what follows from the mutant's result, in registers of its own, and traps where an
    instruction that does more than compute, load or exchange would read another value. Empty if that cannot be written.

    A register follows from the result if any instruction computes it from one that does. Every instruction that writes
    such a register has a double, so real and shadow are equal wherever the mutant's result has no part in them.
    ``blank``: where what is stored in shared memory differs it does not trap, but stores an undefined value.
    """
    s, new = mutant.was, mutant.new
    assert new is not None
    if not _has_double(s):
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
            if written & follows or (_has_double(one) and sources & follows):
                doubled.add(one.line)
                if _has_double(one):
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
        checks, copies = [_differs(r, names[r]) for r in named], [f"mov.{bits(r)} {names[r]}, {r};" for r in named]
        if named:
            lines[at] = " ".join(["{ .reg .pred %mutant_differs;", *checks, lines[at].partition("//")[0], *copies, "}"])
    for one in all_of_it:
        changed = new if one.line == s.line else one
        results = REGISTER.findall(one.operands[0]) if writes(one) else []
        read = set(REGISTER.findall(" ".join((one.guard, *one.operands[len(results) > 0 :])))) & follows
        if _has_double(one) and results:
            if one.line in doubled:
                lines[one.line - 1] = f"{one.indent}{shadow(str(changed))} {one}"
            continue
        checks = []
        for r in sorted(read):
            guard, before_it = _guard_of(one, r)
            checks += [before_it, _differs(r, names[r], guard)]
        copies = [f"mov.{bits(r)} {names[r]}, {r};" for r in results if r in follows]
        stored = set(REGISTER.findall(one.operands[1])) & read if len(one.operands) == 2 else set()
        if stored and blank and one.opcode.startswith(("st.shared", "stmatrix")) and not one.guard:
            lines[one.line - 1] = one.indent + _blanked(one, {r: names[r] for r in sorted(read)}, stored)
            continue
        if checks or copies:
            lines[one.line - 1] = one.indent + " ".join(
                ["{ .reg .pred %mutant_differs, %mutant_any;", *checks, str(one), *copies, "}"]
            )
    declared = " ".join(f".reg .{bits(r)} {name};" for r, name in sorted(names.items()))
    return "\n".join(_with_declared(lines, all_of_it[0].line, declared))


def only_guards_stores(launch: RecordedLaunch, s: PtxStatement) -> bool:
    """Return whether all that follows from a result is whether lanes store something."""
    if not writes(s) or not _COMPUTES.match(s.opcode):
        return False
    follows, before = set(REGISTER.findall(s.operands[0])), 0
    all_of_it = statements(launch.text, launch.kernel)
    while before != len(follows):
        before = len(follows)
        for one in all_of_it:
            if follows & set(REGISTER.findall(" ".join((one.guard, *one.operands[writes(one) :])))):
                if _COMPUTES.match(one.opcode) and writes(one):
                    follows |= set(REGISTER.findall(one.operands[0]))
                elif not one.opcode.startswith("st.") or follows & set(REGISTER.findall(" ".join(one.operands))):
                    return False
    return True


def with_operand(mutant: Mutant, pairs: int) -> str:
    """Return a product whose changed operand is registers that hold ``pairs``; empty if that is not what changed."""
    s, new = mutant.was, mutant.new
    assert new is not None
    changed = [n for n, (a, b) in enumerate(zip(s.operands, new.operands, strict=False)) if a != b]
    last = 1 if s.opcode.startswith("wgmma") else 2  # not the sums
    if not s.opcode.startswith(("mma.", "wgmma.mma")) or len(changed) != 1 or not 1 <= changed[0] <= last:
        return ""
    at = changed[0]
    if not s.operands[at].startswith("{"):
        return ""
    own = "{" + ", ".join(["%mutant_own"] * (s.operands[at].count(",") + 1)) + "}"
    product = replace(s, operands=(*s.operands[:at], own, *s.operands[at + 1 :]))
    return f"{{ .reg .b32 %mutant_own; mov.b32 %mutant_own, {pairs}; {product} }}"


def _blanked(s: PtxStatement, names: dict[str, str], stored: set[str]) -> str:
    """Return a store of undefined values where what is stored differs from its shadow; it traps at another address."""
    body = ["{ .reg .pred %mutant_differs;"]
    body += [_differs(r, name) for r, name in names.items() if r in REGISTER.findall(s.operands[0])]
    own = {r: f"%mutant_stored{i}" for i, r in enumerate(sorted(stored))}
    for r, name in own.items():
        body += [f".reg .{bits(r)} {name};", f"mov.{bits(r)} {name}, {r};"]
        body += [f".reg .{bits(r)} {unset(r)};"] if f".reg .{bits(r)} {unset(r)};" not in body else []
        body += [_differs(r, names[r], then=f"@%mutant_differs mov.{bits(r)} {name}, {unset(r)};")]
    source = REGISTER.sub(lambda m: own.get(m[0], m[0]), s.operands[1])
    return " ".join([*body, str(replace(s, operands=(s.operands[0], source))), "}"])


def _differs(real: str, shadow: str, guard: str = "", then: str = "@%mutant_differs trap;") -> str:
    """Return statements that compare two registers where ``guard`` holds, and trap where they differ. If either is
    undefined, the machine reports that, and nothing is shown."""
    compare = "xor.pred" if bits(real) == "pred" else f"setp.ne.{bits(real)}"
    return f"mov.pred %mutant_differs, 0; {guard} {compare} %mutant_differs, {real}, {shadow}; {then}".rstrip()


def _guard_of(s: PtxStatement, register: str) -> tuple[str, str]:
    """Return the guard under which a statement reads a register, and a statement that computes the guard, if any.

    A guarded one reads in the lanes of its guard, and ``cp.async`` of no bytes reads at no address.
    """
    reads = [n for n, operand in enumerate(s.operands) if register in REGISTER.findall(operand)]
    if s.opcode.startswith("cp.async") and len(s.operands) == 4 and not s.guard and reads == [1]:
        return "@%mutant_any", f"setp.ne.b32 %mutant_any, {s.operands[3]}, 0;"
    return ("" if register in REGISTER.findall(s.guard) else s.guard), ""


def bits(register: str) -> str:
    """Return the type of a register by its name, as both compilers choose it."""
    types = {"%p": "pred", "%rs": "b16", "%h": "b16", "%rd": "b64", "%fd": "b64"}
    return types.get(type_of(register), "b32")


def unset(register: str) -> str:
    return f"%mutant_unset_{bits(register)}"


_TARGET = re.compile(r"^(\$?\w+):")


def other_branch(launch: RecordedLaunch, mutant: Mutant) -> str:
    """Return PTX that computes both sides of a branch that hangs on the mutant's result alone, in registers of their
    own, and traps behind the branch in lanes in which the side that the mutant takes gives other values. Empty if that
    cannot be written: a side may only compute, as the two ways that compilers divide 64-bit integers."""
    s, new = mutant.was, mutant.new
    assert new is not None
    all_of_it = statements(launch.text, launch.kernel)
    uses = [one for one in all_of_it if s.operands[0] in REGISTER.findall(" ".join((one.guard, *one.operands)))]
    if len(uses) != 2 or uses[1].opcode.partition(".")[0] != "bra" or s.operands[0] not in uses[1].guard:
        return ""
    branch, lines = uses[1], launch.text.split("\n")
    labels = {match[1]: n for n, line in enumerate(lines, 1) if (match := _TARGET.match(line.strip()))}
    marks = {n: label for label, n in labels.items() if not label.startswith("$L__tmp")}
    after = [one for one in all_of_it if one.line > branch.line]
    leave = next((one for one in after if one.opcode.startswith("bra")), None)
    if leave is None or leave.guard or any(n in marks for n in range(branch.line, leave.line)):
        return ""
    second, join = labels[branch.operands[0]], labels[leave.operands[0]]
    if [n for n in sorted(marks) if leave.line < n <= join] != [second, join]:
        return ""
    sides = [
        [one for one in all_of_it if branch.line < one.line < leave.line],
        [one for one in all_of_it if second < one.line < join],
    ]
    if any(one.guard or not _COMPUTES.match(one.opcode) for side in sides for one in side):
        return ""
    written = [{r for one in side for r in REGISTER.findall(one.operands[0])} for side in sides]
    inside = {one.line for side in sides for one in side}
    read = {r for one in all_of_it if one.line not in inside for r in REGISTER.findall(" ".join(one.operands))}
    if (written[0] ^ written[1]) & read:
        return ""
    chosen = "%mutant_chosen"
    declared, copies = [f".reg .pred {chosen}, %mutant_differs;"], []
    for n, (side, registers) in enumerate(zip(sides, written, strict=True)):
        own = {r: f"%mutant_side{n}_{r[1:]}" for r in registers}
        declared += [f".reg .{bits(r)} {name};" for r, name in sorted(own.items())]
        for one in side:
            copies.append(REGISTER.sub(lambda m, own=own: own.get(m[0], m[0]), str(one)))  # type: ignore[misc]
    takes = branch.guard.replace(s.operands[0], chosen)
    stays = f"@{takes[2:]}" if takes.startswith("@!") else f"@!{takes[1:]}"
    checks = [
        _differs(r, f"%mutant_side{n}_{r[1:]}", guard)
        for n, guard in enumerate((stays, takes))
        for r in sorted(written[0] & written[1])
    ]
    lines[s.line - 1] = f"{s.indent}{replace(new, operands=(chosen, *new.operands[1:]))} {s}"
    lines[branch.line - 1] = f"{branch.indent}{' '.join(copies)} {branch}"
    lines[join - 1] = " ".join([lines[join - 1].partition("//")[0], *checks])
    return "\n".join(_with_declared(lines, all_of_it[0].line, " ".join(declared)))


def _with_declared(lines: list[str], first: int, declared: str) -> list[str]:
    """Return the lines of a kernel whose first statement is at line ``first`` with further registers declared."""
    at = next(i for i in range(first - 1, 0, -1) if lines[i].strip() == "{")
    return [*lines[:at], f"{lines[at]} {declared}", *lines[at + 1 :]]
