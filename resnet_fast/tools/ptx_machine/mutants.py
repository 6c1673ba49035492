"""Mutants: compiled kernels with one thing changed, to see whether the machine notices.

    with recorded(arch=90) as (machine, launches):
        net(x).sum().backward()                       # any launches, on CPU tensors; each is kept with its memory
    for launch in launches:
        for mutant in draw(launch, seed=0):           # a barrier less, another register, a comparison turned ...
            print(mutant, judge(launch, mutant))

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

import ctypes
import os
import random
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np

from ... import flags, native
from .machine import PtxMachine, ptx_machine

# --------------------------------------------------------------------------------------------------- recorded launches


@dataclass(frozen=True)
class RecordedLaunch:
    """A launch with the memory that it was given, to be executed again.

    Attributes:
        text, kernel: PTX, and the name of the kernel in it.
        given: grid, threads, bytes of shared memory, parameters.
        cluster: blocks of a cluster.
        ranges: address, bytes, name, written (a flag per byte), writable.
        instructions: of warps, that the real launch took.
    """

    text: str
    kernel: str
    given: tuple[Any, ...]
    cluster: tuple[int, int, int]
    ranges: tuple[tuple[int, bytes, str, np.ndarray, bool], ...]
    instructions: int


@dataclass
class MutantOutcome:
    """What a launch left: its finding, or memory, bytes that nobody wrote, and counters."""

    finding: str = ""
    memory: tuple[bytes, ...] = ()
    unwritten: dict[str, int] = field(default_factory=dict)
    counters: dict[str, Any] = field(default_factory=dict)

    def same_memory(self, other: MutantOutcome) -> bool:
        return self.memory == other.memory and self.unwritten == other.unwritten


def execute(launch: RecordedLaunch, text: str | None = None, seed: int = 0, fill: int = 0xFF) -> MutantOutcome:
    """Execute a recorded launch again, with its own PTX or another.

    Args:
        launch: the launch.
        text: PTX in place of its own.
        seed: of the order in which warps run.
        fill: what bytes hold that nobody has written.

    Raises:
        PtxError: of ``_ptx``: the text is no PTX that the machine understands.
    """
    engine = native.ptx()
    memory, held = engine.Memory(), []
    for n, (address, content, name, written, writable) in enumerate(launch.ranges):
        own = np.frombuffer(content, np.uint8).copy()
        own[~written] = fill
        held.append(own)
        label = f"{n}: {name}"  # counters are by name, and launches of a pass use names again
        memory.add(address, len(content), label, written=bool(written.all()), writable=writable, host=own.ctypes.data)
        if written.any() and not written.all():
            edges = np.flatnonzero(np.diff(np.concatenate(([False], written, [False])).astype(np.int8)))
            for start, end in edges.reshape(-1, 2).tolist():
                memory.write(address + start, end - start)
    limit = 20 * launch.instructions + 10_000
    try:
        report = engine.Module(launch.text if text is None else text, launch.kernel).launch(
            launch.kernel, *launch.given, memory, seed=seed, cluster=launch.cluster, limit=limit, strict=True
        )
    except engine.Fault as fault:
        return MutantOutcome(fault.what)
    return MutantOutcome("", tuple(own.tobytes() for own in held), memory.unwritten(), report.counters)


class _RecordingEngine:
    """The engine ``_ptx``, which also keeps each launch before it is executed."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.launches: list[RecordedLaunch] = []
        self.Fault, self.PtxError, self.tensor_map = engine.Fault, engine.PtxError, engine.tensor_map

    def Memory(self) -> _RecordedMemory:
        return _RecordedMemory(self._engine.Memory())

    def Module(self, text: str, name: str) -> _RecordedModule:
        return _RecordedModule(self._engine.Module(text, name), text, self.launches)


class _RecordedMemory:
    def __init__(self, real: Any) -> None:
        self.real = real
        self.added: dict[int, tuple[int, str, bool, int]] = {}

    def add(
        self, address: int, nbytes: int, name: str, written: bool = True, writable: bool = True,
        host: int | None = None,
    ) -> None:  # fmt: skip
        self.real.add(address, nbytes, name, written=written, writable=writable, host=host)
        self.added[address] = nbytes, name, writable, address if host is None else host

    def write(self, address: int, nbytes: int) -> None:
        self.real.write(address, nbytes)

    def remove(self, address: int) -> None:
        self.real.remove(address)
        del self.added[address]

    def ranges(self) -> Iterator[tuple[int, bytes, str, np.ndarray, bool]]:
        """Yield the ranges as they are now. Bytes of memory that is partly written count as written if not 0xFF."""
        unwritten = self.real.unwritten()
        for address, (nbytes, name, writable, host) in self.added.items():
            content = ctypes.string_at(host, nbytes)
            missing = unwritten.get(name, 0)
            written = np.full(nbytes, missing == 0)
            if 0 < missing < nbytes:
                written = np.frombuffer(content, np.uint8) != 0xFF
            yield address, content, name, written, writable


class _RecordedModule:
    def __init__(self, real: Any, text: str, launches: list[RecordedLaunch]) -> None:
        self._real, self._text, self._launches = real, text, launches
        self.kernels = real.kernels

    def launch(self, kernel: str, *given: Any, **options: Any) -> Any:
        *rest, memory = given
        before = tuple(memory.ranges())
        report = self._real.launch(kernel, *rest, memory.real, **options)
        instructions = report.counters["instructions"]
        cluster = tuple(options["cluster"])
        self._launches.append(RecordedLaunch(self._text, kernel, tuple(rest), cluster, before, instructions))
        return report


@contextmanager
def recorded(arch: int, seed: int = 0) -> Iterator[tuple[PtxMachine, list[RecordedLaunch]]]:
    """Enter a machine for ``arch`` and yield it with the launches that it executes, each with its memory."""
    machine = ptx_machine(arch, seed)
    recorder = machine.engine = _RecordingEngine(native.ptx())
    name = flags.SUBMIT.name
    before = os.environ.get(name)
    os.environ[name] = "python"  # each temporary of a pass is an allocation of its own
    try:
        with machine:
            yield machine, recorder.launches
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


# ------------------------------------------------------------------------------------------------------------ mutants

_STATEMENT = re.compile(r"^(\s*)(@!?[%\w$]+\s+)?([a-z][\w.:]*)(?:\s+([^;]*))?;\s*(?://.*)?$")
_REGISTER = re.compile(r"%[a-z]+\d+\b")
_SYNCHRONISES = (
    "bar.sync", "barrier.sync", "cp.async.wait", "cp.async.bulk.wait", "cp.async.commit", "cp.async.bulk.commit",
    "wgmma.fence", "wgmma.wait", "wgmma.commit", "fence", "membar", "mbarrier",
)  # fmt: skip


@dataclass(frozen=True)
class PtxStatement:
    """An instruction on a line of PTX: guard ("" or "@%p1"), opcode, operands as written."""

    line: int
    indent: str
    guard: str
    opcode: str
    operands: tuple[str, ...]

    def __str__(self) -> str:
        guard = f"{self.guard} " if self.guard else ""
        return f"{guard}{self.opcode} {', '.join(self.operands)}".rstrip() + ";"


@dataclass(frozen=True)
class Mutant:
    """A change of one statement of a kernel. It can be given to ``ptx_machine(rewrite=...)``.

    Attributes:
        kernel: name of the kernel.
        kind: one of ``KINDS``.
        was: the statement.
        new: what stands in its place: a statement, or None if it is left out.
    """

    kernel: str
    kind: str
    was: PtxStatement
    new: PtxStatement | None

    def __call__(self, name: str, text: str) -> str:
        """Return the PTX with the change, if ``name`` is the mutant's kernel."""
        return text if name != self.kernel else replaced(text, self.was, "" if self.new is None else str(self.new))

    def __str__(self) -> str:
        new = "nothing" if self.new is None else f"`{self.new}`"
        return f"{self.kernel}, PTX line {self.was.line}, {self.kind}: `{self.was}` becomes {new}"


def replaced(text: str, was: PtxStatement, new: str) -> str:
    """Return ``text`` with other statements, on one line, in the place of ``was``."""
    lines = text.split("\n")
    lines[was.line - 1] = was.indent + new
    return "\n".join(lines)


def statements(text: str, kernel: str) -> list[PtxStatement]:
    """Return the instructions of a kernel that stand on a line of their own."""
    lines = text.split("\n")
    start = next(i for i, line in enumerate(lines) if re.search(rf"\.entry\s+{re.escape(kernel)}\b", line))
    found = []
    for i in range(start, len(lines)):
        if lines[i].startswith("}") and i > start:
            after = next((line for line in lines[i + 1 :] if line.strip()), "")
            if lines[i].strip() == "}" and "end inline asm" not in after:
                break
        match = _STATEMENT.match(lines[i])
        if match:
            indent, guard, opcode, operands = match.groups()
            found.append(PtxStatement(i + 1, indent, (guard or "").strip(), opcode, _split(operands or "")))
    return found


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


Changes = Callable[[PtxStatement, Sequence[str], random.Random], list[PtxStatement | None]]


def _with(s: PtxStatement, at: int, operand: str) -> PtxStatement:
    return replace(s, operands=(*s.operands[:at], operand, *s.operands[at + 1 :]))


def _writes(s: PtxStatement) -> int:
    """Return how many operands of a statement come before its sources: 1 if it has a destination."""
    none = ("st.", "cp.", "bar.", "barrier.", "bra", "ret", "red.", "stmatrix", "fence", "membar", "wgmma", "exit")
    return int(not s.opcode.startswith(none) and bool(s.operands) and not s.operands[0].startswith("["))


def _removed(*names: str) -> Changes:
    return lambda s, near, rng: [None] if s.opcode.startswith(names) else []


def _waits(s: PtxStatement, near: Sequence[str], rng: random.Random) -> list[PtxStatement | None]:
    if s.opcode.startswith("mbarrier.try_wait"):
        return [replace(s, opcode="mov.pred", operands=(s.operands[0], "1"))]
    if ".wait_group" not in s.opcode:
        return []
    return [None, _with(s, 0, str(int(s.operands[0]) + 1))]


def _guards(s: PtxStatement, near: Sequence[str], rng: random.Random) -> list[PtxStatement | None]:
    if not s.guard:
        return []
    other = s.guard.replace("@!", "@") if s.guard.startswith("@!") else s.guard.replace("@", "@!")
    return [replace(s, guard=""), replace(s, guard=other)]


def _immediates(s: PtxStatement, near: Sequence[str], rng: random.Random) -> list[PtxStatement | None]:
    if s.opcode.startswith(("bar.", "mov.pred", "wgmma", "cp.async.wait", "ld.param", "ret", "mma")):
        return []
    found: list[PtxStatement | None] = []
    for at, operand in enumerate(s.operands):
        if re.fullmatch(r"-?\d+", operand):
            n = int(operand)
            if s.opcode.startswith("cp.async") or (s.opcode.startswith("shfl") and at == 3):
                continue
            near_by = [n + 1, n - 1, 2 * n] if "shfl" not in s.opcode else [n ^ 1, n ^ 3]
            found += [_with(s, at, str(m)) for m in near_by if m != n and (m >= 0 or n < 0)]
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


def _operands(s: PtxStatement, near: Sequence[str], rng: random.Random) -> list[PtxStatement | None]:
    """Swap two sources, or read another register of the same type that is used nearby."""
    if s.opcode.startswith(("mma", "wgmma", "ldmatrix", "bar", "ld.", "cp.", "bra", "mbarrier")):
        return []
    found: list[PtxStatement | None] = []
    sources = [i for i in range(_writes(s), len(s.operands)) if _REGISTER.fullmatch(s.operands[i])]
    commutes = s.opcode.startswith(("add", "mul", "and", "or", "xor", "max", "min", "setp.eq", "setp.ne"))
    for a, b in pairwise(sources):
        if not commutes and s.operands[a] != s.operands[b] and _type(s.operands[a]) == _type(s.operands[b]):
            found.append(_with(_with(s, a, s.operands[b]), b, s.operands[a]))
    for at in sources:
        if others := [r for r in near if _type(r) == _type(s.operands[at]) and r not in s.operands]:
            found.append(_with(s, at, rng.choice(others)))
    return found


def _addresses(s: PtxStatement, near: Sequence[str], rng: random.Random) -> list[PtxStatement | None]:
    found: list[PtxStatement | None] = []
    for at, operand in enumerate(s.operands):
        match = _REGISTER.search(operand) if operand.startswith("[") else None
        others = [r for r in near if match and _type(r) == _type(match[0]) and r != match[0]]
        if match and others:
            found.append(_with(s, at, operand.replace(match[0], rng.choice(others))))
    return found


_COMPARISONS = {"lt": ("le", "ge"), "le": ("lt", "gt"), "gt": ("ge", "le"), "ge": ("gt", "lt"), "eq": ("ne",),
                "ne": ("eq",), "neu": ("equ",)}  # fmt: skip


def _comparisons(s: PtxStatement, near: Sequence[str], rng: random.Random) -> list[PtxStatement | None]:
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
)


def _modifiers(s: PtxStatement, near: Sequence[str], rng: random.Random) -> list[PtxStatement | None]:
    found: list[PtxStatement | None] = []
    for pattern, others in _MODIFIERS:
        for other in others:
            opcode = re.sub(pattern, other, s.opcode)
            if opcode != s.opcode:
                found.append(replace(s, opcode=opcode))
    if s.opcode.startswith(("mma", "ldmatrix", "stmatrix")):
        for at in range(len(s.operands) - s.opcode.startswith("mma")):
            found += [_with(s, at, _turned(s.operands[at]))] if "," in s.operands[at] else []
    if s.opcode.startswith("wgmma.mma_async"):
        found += [_with(s, at, "-" + s.operands[at]) for at in range(len(s.operands)) if s.operands[at] == "1"][:1]
        found += [_with(_with(s, 1, s.operands[2]), 2, s.operands[1])] if s.operands[1][0] == "%" else []
    return found


def _turned(vector: str) -> str:
    """Return a vector operand with its first two elements exchanged."""
    first, second, *rest = [e.strip() for e in vector.strip("{} ").split(",")]
    return "{" + ", ".join([second, first, *rest]) + "}"


def _type(register: str) -> str:
    return register.rstrip("0123456789")


KINDS: dict[str, Changes] = {
    "barrier": _removed("bar.sync", "barrier.sync"),
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
            near = sorted(
                {r for n in found[max(0, at - NEAR) : at + 1] for o in n.operands for r in _REGISTER.findall(o)}
            )
            changes = KINDS[kind](s, near, rng)
            if not changes:
                continue
            mutant = Mutant(launch.kernel, kind, s, rng.choice(changes))
            if _is_ptx(launch, mutant) and reached(launch, s):
                left -= 1
                yield mutant


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


# ----------------------------------------------------------------------------------------------------------- judgement

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
    if s.opcode.startswith(_SYNCHRONISES) and mutant.kind in ("barrier", "wait", "fence", "commit or arrive"):
        return "no access needs it"
    if mutant.kind == "guard" and mutant.new is not None and not mutant.new.guard:
        never = f"@{s.guard[2:]}" if s.guard.startswith("@!") else f"@!{s.guard[1:]}"
        if all(not execute(one, replaced(one.text, s, f"{never} trap; {s}")).finding for one in launches):
            return "guard always true"
    if mutant.new is not None and _writes(s) and s.operands[0] == mutant.new.operands[0]:
        if all(not execute(one, _beside(one, mutant, "trap;")).finding for one in launches):
            return "same value"
        if (shadowed := _shadowed(launches[0], mutant)) and not any(execute(o, shadowed).finding for o in launches):
            return "same effect"
        if skipping := _shadowed(launches[0], mutant, skip=True):
            ends = [(execute(one, skipping), execute(one)) for one in launches]
            if all(not end.finding and end.same_memory(real) for end, real in ends):
                return "dead value"
        blank = " ".join(f"mov.{_move(r)} {r}, {_unset(r)};" for r in _REGISTER.findall(s.operands[0]))
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
    results = _REGISTER.findall(s.operands[0])
    own = {r: f"%mutant_is{i}" for i, r in enumerate(results)}
    declared = [f".reg .{_move(r)} {own[r]};" for r in own]
    declared += [f".reg .{_move(r)} {_unset(r)};" for r in own]
    declared += [".reg .pred %mutant_differs, %mutant_one;"]
    first = replace(new, operands=(_REGISTER.sub(lambda m: own[m[0]], new.operands[0]), *new.operands[1:]))
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
    follows: set[str] = set(_REGISTER.findall(s.operands[0]))
    doubled: set[int] = set()
    while True:
        before = len(follows), len(doubled)
        for one in all_of_it:
            if not _writes(one):
                continue
            written = set(_REGISTER.findall(one.operands[0]))
            sources = set(_REGISTER.findall(" ".join((one.guard, *one.operands[1:]))))
            if written & follows or (_COMPUTES.match(one.opcode) and sources & follows):
                doubled.add(one.line)
                if _COMPUTES.match(one.opcode):
                    follows |= written
        if before == (len(follows), len(doubled)):
            break
    names = {r: f"%mutant_of_{r[1:]}" for r in follows}

    def shadow(text: str) -> str:
        return _REGISTER.sub(lambda m: names.get(m[0], m[0]), text)

    lines = launch.text.split("\n")
    known = {one.line for one in all_of_it}
    for at in range(all_of_it[0].line, all_of_it[-1].line):
        if at + 1 in known or lines[at].lstrip().startswith((".", "//", "$")):
            continue
        # Several instructions on a line: all that they name must be equal before, and is taken over after.
        named = sorted(set(_REGISTER.findall(lines[at])) & follows)
        checks, copies = [_differs(r, names[r]) for r in named], [f"mov.{_move(r)} {names[r]}, {r};" for r in named]
        if named:
            lines[at] = " ".join(["{ .reg .pred %mutant_differs;", *checks, lines[at].partition("//")[0], *copies, "}"])
    for one in all_of_it:
        changed = new if one.line == s.line else one
        results = _REGISTER.findall(one.operands[0]) if _writes(one) else []
        read = set(_REGISTER.findall(" ".join((one.guard, *one.operands[len(results) > 0 :])))) & follows
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
    reads = [n for n, operand in enumerate(s.operands) if register in _REGISTER.findall(operand)]
    if s.opcode.startswith("cp.async") and len(s.operands) == 4 and not s.guard and reads == [1]:
        return "@%mutant_any", f"setp.ne.b32 %mutant_any, {s.operands[3]}, 0;"
    return ("" if register in _REGISTER.findall(s.guard) else s.guard), ""


def _move(register: str) -> str:
    """Return the type of a register by its name, as both compilers choose it."""
    types = {"%p": "pred", "%rs": "b16", "%h": "b16", "%rd": "b64", "%fd": "b64"}
    return types.get(_type(register), "b32")


def _unset(register: str) -> str:
    return f"%mutant_unset_{_move(register)}"
