"""Mutants: compiled kernels with one thing changed, to see whether the machine notices.

    with recorded(arch=90) as (machine, launches):
        net(x).sum().backward()                       # any launches, on CPU tensors; each is kept with its memory
    for launch in launches:
        for mutant in draw(launch, seed=0):           # a barrier less, another register, a comparison turned ...
            print(mutant, judge(launch, mutant))

recorded.py keeps launches, judgement.py says how a mutant is judged.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from ... import native
from ...errors import UserError
from .recorded import RecordedLaunch, execute

_STATEMENT = re.compile(r"^(\s*)(@!?[%\w$]+\s+)?([a-z][\w.:]*)(?:\s+([^;]*))?;\s*(?://.*)?$")
REGISTER = re.compile(r"%[a-z]+\d+\b")
SYNCHRONISES = (
    "bar.sync", "barrier.sync", "cp.async.wait", "cp.async.bulk.wait", "cp.async.commit", "cp.async.bulk.commit",
    "wgmma.fence", "wgmma.wait", "wgmma.commit", "fence", "membar", "mbarrier",
)  # fmt: skip


@dataclass(frozen=True)
class PtxStatement:
    """An instruction on a line of PTX: guard ("" or "@%p1"), opcode, operands as written.

    ``before``: statements that compute an operand of a changed one, in a scope of their own.
    """

    line: int
    indent: str
    guard: str
    opcode: str
    operands: tuple[str, ...]
    before: str = ""

    def __str__(self) -> str:
        guard = f"{self.guard} " if self.guard else ""
        text = f"{guard}{self.opcode} {', '.join(self.operands)}".rstrip() + ";"
        return f"{{ {self.before} {text} }}" if self.before else text


@dataclass(frozen=True)
class Mutant:
    """A change of one statement of a kernel. It can be given to ``ptx_machine(rewrite=...)``.

    Attributes:
        kernel: name of the kernel.
        kind: one of ``KINDS``.
        was: the statement.
        new: what stands in its place: a statement, or None if it is left out.
        behind: a later statement behind which it stands instead, or None.
    """

    kernel: str
    kind: str
    was: PtxStatement
    new: PtxStatement | None
    behind: PtxStatement | None = None

    def __call__(self, name: str, text: str) -> str:
        """Return the PTX with the change, if ``name`` is the mutant's kernel.

        Raises:
            UserError: ``text`` has another statement on the mutant's line, because it was compiled otherwise.
        """
        if name != self.kernel:
            return text
        for s in (self.was, self.behind):
            line = "" if s is None else next(iter(text.split("\n")[s.line - 1 : s.line]), "")
            if s is not None and _statement(s.line - 1, line) != replace(s, before=""):
                todo = "take the statement from the text that is launched"
                raise UserError(f"`{s}` at line {s.line} of {name}", repr(line.strip()), todo)
        if self.behind is not None:
            text = replaced(text, self.behind, f"{self.behind} {self.was}")
        return replaced(text, self.was, "" if self.new is None else str(self.new))

    @property
    def becomes(self) -> str:
        """The change in words."""
        if self.behind is not None:
            return f"behind `{self.behind}`"
        return "nothing" if self.new is None else f"`{self.new}`"

    def __str__(self) -> str:
        return f"{self.kernel}, PTX line {self.was.line}, {self.kind}: `{self.was}` becomes {self.becomes}"


def replaced(text: str, was: PtxStatement, new: str) -> str:
    """Return ``text`` with other statements, on one line, in the place of ``was``."""
    lines = text.split("\n")
    lines[was.line - 1] = was.indent + new
    return "\n".join(lines)


def statements(text: str, kernel: str) -> list[PtxStatement]:
    """Return the instructions of a kernel that stand on a line of their own.

    Raises:
        UserError: the text has no such kernel.
    """
    lines = text.split("\n")
    entry = re.compile(rf"\.entry\s+{re.escape(kernel)}\b")
    start = next((i for i, line in enumerate(lines) if entry.search(line)), None)
    if start is None:
        names = ", ".join(re.findall(r"\.entry\s+([\w$]+)", text)) or "no kernel"
        raise UserError(f"PTX with the kernel {kernel}", f"one with {names}", "name a kernel of the text")
    found = []
    for i in range(start, len(lines)):
        if lines[i].startswith("}") and i > start:
            after = next((line for line in lines[i + 1 :] if line.strip()), "")
            if lines[i].strip() == "}" and "end inline asm" not in after:
                break
        if one := _statement(i, lines[i]):
            found.append(one)
    return found


def _statement(at: int, line: str) -> PtxStatement | None:
    """Return the instruction that stands on the line with index ``at``."""
    match = _STATEMENT.match(line)
    if match is None:
        return None
    indent, guard, opcode, operands = match.groups()
    return PtxStatement(at + 1, indent, (guard or "").strip(), opcode, _split(operands or ""))


def _split(operands: str) -> tuple[str, ...]:
    """Split operands at the commas that stand outside of braces and brackets."""
    parts, depth = [""], 0
    for c in operands:
        depth += (c in "{[(") - (c in "}])")
        if c == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    return tuple(p.strip() for p in parts if p.strip())


@dataclass(frozen=True)
class PtxSurroundings:
    """What stands before a statement: registers, and operands that are vectors. ``next``: the next statement of its
    block that synchronises or reaches memory, if there is one."""

    registers: tuple[str, ...]
    vectors: tuple[str, ...]
    next: PtxStatement | None


Changed = PtxStatement | None
Changes = Callable[[PtxStatement, PtxSurroundings, random.Random], list[Changed]]

_OWN = "%mutant_own"
"""A register of a changed statement's own."""


def _with(s: PtxStatement, at: int, operand: str) -> PtxStatement:
    return replace(s, operands=(*s.operands[:at], operand, *s.operands[at + 1 :]))


def writes(s: PtxStatement) -> int:
    """Return how many operands of a statement come before its sources: 1 if it has a destination."""
    none = ("st.", "cp.", "bar.", "barrier.", "bra", "ret", "red.", "stmatrix", "fence", "membar", "wgmma", "exit")
    return int(not s.opcode.startswith(none) and bool(s.operands) and not s.operands[0].startswith("["))


def _removed(*names: str) -> Changes:
    return lambda s, near, rng: [None] if s.opcode.startswith(names) else []


def _barriers(s: PtxStatement, near: PtxSurroundings, rng: random.Random) -> list[Changed]:
    """Leave out a barrier, or wait at another one, or for a warp more or less."""
    if not s.opcode.startswith(("bar.sync", "barrier.sync")):
        return []
    found: list[Changed] = [None]
    for at, operand in enumerate(s.operands):
        if operand.isdecimal():
            n = int(operand)
            found += [_with(s, at, str(m)) for m in ([(n + 1) % 16] if at == 0 else [n - 32, n + 32]) if m > 0]
    return found


def _computed(s: PtxStatement, at: int, kind: str, operation: str, operand: str) -> PtxStatement:
    """Return a statement whose operand is ``operation`` of what it was."""
    before = f".reg .{kind} {_OWN}; {operation.format(own=_OWN, was=operand)};"
    return replace(_with(s, at, s.operands[at].replace(operand, _OWN)), before=before)


def _waits(s: PtxStatement, near: PtxSurroundings, rng: random.Random) -> list[Changed]:
    if s.opcode.startswith("mbarrier.try_wait"):
        passed: Changed = replace(s, opcode="mov.pred", operands=(s.operands[0], "1"))
        other = _computed(s, 2, "b32", "xor.b32 {own}, {was}, 1", s.operands[2]) if ".parity" in s.opcode else None
        return [passed, *([other] if other else [])]
    if ".wait_group" not in s.opcode:
        return []
    return [None, _with(s, 0, str(int(s.operands[0]) + 1))]


def _guards(s: PtxStatement, near: PtxSurroundings, rng: random.Random) -> list[Changed]:
    if not s.guard:
        return []
    other = s.guard.replace("@!", "@") if s.guard.startswith("@!") else s.guard.replace("@", "@!")
    others = [r for r in near.registers if type_of(r) == "%p" and r not in s.guard]
    another = [replace(s, guard=s.guard.replace(s.guard.lstrip("@!"), rng.choice(others)))] if others else []
    return [replace(s, guard=""), replace(s, guard=other), *another]


def _immediates(s: PtxStatement, near: PtxSurroundings, rng: random.Random) -> list[Changed]:
    if s.opcode.startswith(("bar.", "mov.pred", "wgmma", "cp.async.wait", "ld.param", "ret", "mma")):
        return []
    found: list[Changed] = []
    for at, operand in enumerate(s.operands):
        if re.fullmatch(r"-?\d+", operand):
            n = int(operand)
            if s.opcode.startswith("cp.async") or (s.opcode.startswith("shfl") and at == 3):
                continue
            near_by = [n + 1, n - 1, 2 * n] if "shfl" not in s.opcode else [n ^ 1, n ^ 3]
            near_by += [n ^ (1 << bit) for bit in range(4, n.bit_length())] if n >= 1 << 16 else []
            found += [_with(s, at, str(m)) for m in near_by if m != n and (m >= 0 or n < 0)]
        elif re.fullmatch(r"0f[0-9A-Fa-f]{8}", operand):
            n = int(operand[2:], 16)
            found += [_with(s, at, f"0f{m:08X}") for m in (0, 0x3F800000, n ^ 1) if m != n]
        elif match := re.fullmatch(r"(\[\s*%\w+\s*)(?:\+\s*(-?\d+)\s*)?\]", operand):
            n = int(match[2] or 0)
            found += [_with(s, at, f"{match[1].rstrip()}+{n + step}]") for step in _steps(s.opcode)]
    return found


def _steps(opcode: str) -> tuple[int, ...]:
    """Return by how much an address may be off and still be aligned."""
    width = 16
    if match := re.search(r"\.[busf](8|16|32|64)$", opcode):
        many = re.search(r"\.v([24])\.", opcode)
        width = int(match[1]) // 8 * (int(many[1]) if many else 1)
    return (width, 2 * width, -width)


def _operands(s: PtxStatement, near: PtxSurroundings, rng: random.Random) -> list[Changed]:
    """Swap two sources, or read another register of the same type that is used nearby."""
    if s.opcode.startswith(("mma", "wgmma", "ldmatrix", "bar", "ld.", "cp.", "bra", "mbarrier")):
        return []
    found: list[Changed] = []
    sources = [i for i in range(writes(s), len(s.operands)) if REGISTER.fullmatch(s.operands[i])]
    commutes = s.opcode.startswith(("add", "mul", "and", "or", "xor", "max", "min", "setp.eq", "setp.ne"))
    for a, b in pairwise(sources):
        if not commutes and s.operands[a] != s.operands[b] and type_of(s.operands[a]) == type_of(s.operands[b]):
            found.append(_with(_with(s, a, s.operands[b]), b, s.operands[a]))
    for at in sources:
        if others := [r for r in near.registers if type_of(r) == type_of(s.operands[at]) and r not in s.operands]:
            found.append(_with(s, at, rng.choice(others)))
    return found


def _addresses(s: PtxStatement, near: PtxSurroundings, rng: random.Random) -> list[Changed]:
    found: list[Changed] = []
    for at, operand in enumerate(s.operands):
        match = REGISTER.search(operand) if operand.startswith("[") else None
        others = [r for r in near.registers if match and type_of(r) == type_of(match[0]) and r != match[0]]
        if match and others:
            found.append(_with(s, at, operand.replace(match[0], rng.choice(others))))
        if match and "shared" in s.opcode and type_of(match[0]) == "%r":
            bit = rng.choice((16, 32, 64))  # as the bits that a swizzle turns
            found.append(_computed(s, at, "b32", f"xor.b32 {{own}}, {{was}}, {bit}", match[0]))
    return found


def _fragments(s: PtxStatement, near: PtxSurroundings, rng: random.Random) -> list[Changed]:
    """Give a product other registers, or another place in shared memory."""
    if not s.opcode.startswith(("mma.", "wgmma.mma")):
        return []
    found: list[Changed] = []
    for at, operand in enumerate(s.operands):
        elements = operand.count(",") + 1
        others = [v for v in near.vectors if v.count(",") + 1 == elements and v not in s.operands]
        if operand[0] == "{" and elements > 1 and others and not (at == 0 and s.opcode.startswith("mma")):
            found.append(_with(s, at, rng.choice(others)))
        if re.fullmatch(r"%rd\d+", operand):
            other_places = [r for r in near.registers if type_of(r) == "%rd" and r not in s.operands]
            found += [_with(s, at, rng.choice(other_places))] if other_places else []
            # a start off by 16 or 64 bytes, another distance of the groups of rows, another swizzle; not the leading
            # dimension, which a swizzled operand does not read
            bit = rng.choice((0, 2, 32, 62))
            found.append(_computed(s, at, "b64", f"xor.b64 {{own}}, {{was}}, {1 << bit}", operand))
    return found


def _copies(s: PtxStatement, near: PtxSurroundings, rng: random.Random) -> list[Changed]:
    """Copy without zero fill, fewer bytes, or count other bytes than arrive."""
    if s.opcode.startswith("cp.async.c") and len(s.operands) > 2:
        size = int(s.operands[2], 0)
        fewer = [_with(s, 2, str(size // 2))] if ".ca." in s.opcode and size > 4 else []
        return [None, *fewer, *([replace(s, operands=s.operands[:3])] if len(s.operands) == 4 else [])]
    if "expect_tx" in s.opcode:
        at = len(s.operands) - 1
        return [_computed(s, at, "b32", f"add.u32 {{own}}, {{was}}, {n}", s.operands[at]) for n in (16, -16)]
    return [None] if s.opcode.startswith("cp.async.bulk.tensor") else []


_ORDERED = (
    *SYNCHRONISES, "st.", "ld.shared", "ld.global", "ldmatrix", "stmatrix", "cp.async", "wgmma", "red.", "atom.",
)  # fmt: skip
"""Statements whose order matters where one of two synchronises."""


def _order(s: PtxStatement, near: PtxSurroundings, rng: random.Random) -> list[Changed]:
    """Say whether a statement can stand behind the next one: both reach memory or synchronise, and one does that."""
    if near.next is None or writes(s) or not s.opcode.startswith(_ORDERED):
        return []
    return [None] if any(one.opcode.startswith(SYNCHRONISES) for one in (s, near.next)) else []


_COMPARISONS = {"lt": ("le", "ge"), "le": ("lt", "gt"), "gt": ("ge", "le"), "ge": ("gt", "lt"), "eq": ("ne",),
                "ne": ("eq",), "neu": ("equ",)}  # fmt: skip


def _comparisons(s: PtxStatement, near: PtxSurroundings, rng: random.Random) -> list[Changed]:
    name, _, rest = s.opcode.partition(".")
    comparison, _, kind = rest.partition(".")
    if name != "setp" or comparison not in _COMPARISONS:
        return []
    return [replace(s, opcode=f"setp.{other}.{kind}") for other in _COMPARISONS[comparison]]


_MODIFIERS = (
    (r"^(cvt)\.rn\.", ("cvt.rz.",)),
    (r"^(max)\.", ("min.",)),
    (r"^(min)\.", ("max.",)),
    (r"^(add)\.", ("sub.",)),
    (r"^(sub)\.", ("add.",)),
    (r"^(or)\.", ("xor.", "and.")),
    (r"^(and)\.", ("or.",)),
    (r"^(xor)\.", ("or.",)),
    (r"^(shr)\.s32", ("shr.u32",)),
    (r"^(shfl\.sync)\.bfly", ("shfl.sync.down",)),
    (r"^(ldmatrix\S*)\.trans", (r"\1",)),
    (r"^(ldmatrix\.sync\.aligned\.m8n8\.x\d)(?!\.trans)", (r"\1.trans",)),
    (r"^(stmatrix\.sync\.aligned\.m8n8\.x\d)(?!\.trans)", (r"\1.trans",)),
    (r"^(div)\.", ("mul.",)),
    (r"^(max|min)\.NaN\.", (r"\1.",)),
    (r"^(fma)\.rn\.(f32|f64)$", (r"fma.rz.\2",)),
    (r"^(add|sub|mul|fma\.rn)\.f32$", (r"\1.ftz.f32",)),
    (r"^(cvt\S*?|fma\S*?)\.relu", (r"\1",)),
    (r"^(atom|red)(\S*)\.(acq_rel|release|acquire)\.", (r"\1\2.relaxed.",)),
    (r"^(ld|st)(\S*)\.(acquire|release)\.", (r"\1\2.relaxed.",)),
    (r"^(atom\S*|red\S*)\.add\.", (r"\1.max.", r"\1.exch.")),
)


def _modifiers(s: PtxStatement, near: PtxSurroundings, rng: random.Random) -> list[Changed]:
    found: list[Changed] = []
    for pattern, others in _MODIFIERS:
        for other in others:
            opcode = re.sub(pattern, other, s.opcode)
            if opcode != s.opcode:
                found.append(replace(s, opcode=opcode))
    if s.opcode.startswith(("mma", "ldmatrix", "stmatrix")):
        for at in range(len(s.operands) - s.opcode.startswith("mma")):
            found += [_with(s, at, _turned(s.operands[at]))] if "," in s.operands[at] else []
    if s.opcode.startswith(("ld.", "st.", "mov.b32", "mov.b64")):
        found += [_with(s, at, _turned(o)) for at, o in enumerate(s.operands) if o.startswith("{") and "," in o]
    if s.opcode.startswith("wgmma.mma_async"):
        found += [_with(s, at, "-" + s.operands[at]) for at in range(len(s.operands)) if s.operands[at] == "1"][:1]
        found += [_with(_with(s, 1, s.operands[2]), 2, s.operands[1])] if s.operands[1][0] == "%" else []
    return found


def _turned(vector: str) -> str:
    """Return a vector operand with its first two elements exchanged."""
    first, second, *rest = [e.strip() for e in vector.strip("{} ").split(",")]
    return "{" + ", ".join([second, first, *rest]) + "}"


def type_of(register: str) -> str:
    return register.rstrip("0123456789")


KINDS: dict[str, Changes] = {
    "barrier": _barriers,
    "wait": _waits,
    "fence": _removed("wgmma.fence", "fence.", "membar"),
    "commit or arrive": _removed(
        "cp.async.commit", "wgmma.commit", "cp.async.bulk.commit", "mbarrier.arrive", "mbarrier.init"
    ),
    "guard": _guards,
    "immediate": _immediates,
    "operand": _operands,
    "address": _addresses,
    "comparison": _comparisons,
    "modifier": _modifiers,
    "store": _removed("st.", "stmatrix", "red."),
    "fragment": _fragments,
    "copy": _copies,
    "order": _order,
}
"""Kinds of changes -> the changes of a statement of that kind."""

NEAR = 40
"""Statements before one, from which another register is drawn."""


def draw(launch: RecordedLaunch, seed: int, kinds: Sequence[str] = tuple(KINDS), each: int = 1) -> Iterator[Mutant]:
    """Yield up to ``each`` mutants of a launch's kernel for each kind: the same for the same seed.

    Each is PTX that the machine understands, and changes a statement that the launch executes.
    """
    found = statements(launch.text, launch.kernel)
    code = " ".join(s.opcode for s in found)  # not the name, into which nvcc puts a hash of the file's path
    for kind in kinds:
        rng = random.Random(f"{seed} {kind} {code}")
        order = rng.sample(range(len(found)), len(found))
        left = each
        for at in order:
            if left == 0:
                break
            s = found[at]
            before = found[max(0, at - NEAR) : at + 1]
            registers = {r for n in before for o in (n.guard, *n.operands) for r in REGISTER.findall(o)}
            vectors = {o for n in before for o in n.operands if o.startswith("{")}
            behind = _next(launch.text, found, at) if kind == "order" else None
            changes = KINDS[kind](s, PtxSurroundings(tuple(sorted(registers)), tuple(sorted(vectors)), behind), rng)
            if not changes:
                continue
            mutant = Mutant(launch.kernel, kind, s, rng.choice(changes), behind)
            if _is_ptx(launch, mutant) and reached(launch, s):
                left -= 1
                yield mutant


def _next(text: str, found: Sequence[PtxStatement], at: int) -> PtxStatement | None:
    """Return the next statement of the same block that synchronises or reaches memory."""
    lines = text.split("\n")
    for one in found[at + 1 :]:
        between = lines[found[at].line : one.line]
        if one.opcode.startswith(("bra", "ret")) or any(re.match(r"\s*(\$L__BB|\{|\})", line) for line in between):
            return None
        if one.opcode.startswith(_ORDERED):
            return one
    return None


def _is_ptx(launch: RecordedLaunch, mutant: Mutant) -> bool:
    engine = native.ptx()
    try:
        engine.Module(mutant(launch.kernel, launch.text), launch.kernel).check(launch.kernel)
    except engine.PtxError:
        return False
    return True


def reached(launch: RecordedLaunch, s: PtxStatement) -> bool:
    """Return whether any lane executes a statement."""
    return execute(launch, replaced(launch.text, s, f"{s.guard} trap; {s}")).finding == "traps"
