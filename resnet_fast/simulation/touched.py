"""Which registers an instruction writes and reads.

The listing does not say which operands are results, nor how many registers one of them stands for: a 128-bit load
writes four, a product 64x128x16 in float32 reads and writes 64. :func:`touched` says it by opcode. An opcode that no
table here has is an error, because a guess would end as a wrong figure.
"""

from __future__ import annotations

import re

from ..errors import UserError
from .operands import ZERO, Operand, Registers

_NO_RESULT = frozenset(
    (
        "ACQBULK", "BAR", "BPT", "BRA", "BREAK", "BRX", "BSYNC", "CALL", "CCTL", "CGAERRBAR", "DEPBAR",
        "ENDCOLLECTIVE", "ERRBAR", "EXIT", "FENCE", "JMX", "KILL", "LDGDEPBAR", "LDGSTS", "MEMBAR", "NANOSLEEP",
        "NOP", "PMTRIG", "PREEXIT", "RED", "REDG", "RET", "ST", "STG", "STL", "STS", "STSM", "UBLKCP", "UBLKPF",
        "UBLKRED", "UCGABAR_ARV", "UCGABAR_WAIT", "USETMAXREG", "UTMACCTL", "UTMACMDFLUSH", "UTMALDG", "UTMAPF",
        "UTMAREDG", "UTMASTG", "WARPGROUP", "WARPSYNC", "YIELD",
    )
)  # fmt: skip
_ONE_RESULT = frozenset(
    (
        "ARRIVES", "B2R", "BMOV", "BSSY", "BMSK", "BREV", "CS2R", "DADD", "DFMA", "DMNMX", "DMUL", "F2F", "F2FP",
        "F2I", "F2IP", "FADD", "FFMA", "FLO", "FMNMX", "FMUL", "FRND", "FSEL", "FSET", "FSWZADD", "HADD2", "HFMA2",
        "HGMMA", "HMMA", "HMNMX2", "HMUL2", "HSET2", "I2F", "I2FP", "I2I", "I2IP", "IABS", "IDP", "IGMMA", "IMMA",
        "IMNMX", "ISCADD", "LD", "LDC", "LDG", "LDL", "LDS", "LDSM", "LEPC", "MATCH", "MOV", "MOVM", "MUFU", "P2R",
        "P2UR", "POPC", "PRMT", "QGMMA", "QSPC", "R2P", "R2UR", "REDUX", "S2R", "S2UR", "SEL", "SETCTAID", "SGXT",
        "SHF", "SHL", "SHR", "UBMSK", "UBREV", "UFLO", "ULDC", "ULEPC", "UMOV", "UP2UR", "UPOPC", "UPRMT", "UR2UP",
        "USEL", "USGXT", "USHF", "USHL", "USHR", "VABSDIFF", "VHMNMX", "VIADD", "VIADDMNMX", "VIMNMX", "VIMNMX3",
    )
)  # fmt: skip
_WITH_CARRY = frozenset(
    (
        "IADD3", "IMAD", "LEA", "UIADD3", "UIMAD", "ULEA",
    )
)  # fmt: skip
_TWO_RESULTS = frozenset(
    (
        "ATOM", "ATOMG", "DSETP", "ELECT", "FSETP", "HSETP2", "ISETP", "PLOP3", "SHFL", "UISETP", "UPLOP3",
    )
)  # fmt: skip
_OTHERWISE = frozenset(
    (
        "ATOMS", "FCHK", "LOP3", "MATCH", "SYNCS", "ULOP3", "VOTE", "VOTEU",
    )
)  # fmt: skip

KNOWN = _NO_RESULT | _ONE_RESULT | _WITH_CARRY | _TWO_RESULTS | _OTHERWISE
"""Opcodes, without modifiers, whose operands are understood."""


def destinations(opcode: str, given: tuple[Operand, ...]) -> int:
    """Return how many operands, from the first on, are results.

    Raises:
        UserError: an opcode that is not in the tables.
    """
    name = opcode.partition(".")[0]
    if name in _NO_RESULT:
        return 0
    if name in _ONE_RESULT:
        # VIMNMX and others give predicates beside the result on some architectures: R0, PT, PT, R1, ...
        return 1 + _predicates(given[1:]) if name.startswith("VIMNMX") else 1
    if name in _WITH_CARRY:
        return 1 + _predicates(given[1:])
    if name in _TWO_RESULTS:
        return 2
    if name in ("LOP3", "ULOP3"):
        return 2 if given[0].kind in ("P", "UP") else 1
    if name in ("MATCH", "VOTE", "VOTEU"):
        return len(given) - 1
    if name in ("ATOMS", "FCHK"):
        return 1
    if name == "SYNCS":
        return 0 if given[0].kind == "memory" else 1
    raise UserError(
        "an opcode whose operands are understood", f"{opcode} {', '.join(one.text for one in given)}",
        "add it to the tables of resnet_fast/simulation/touched.py",
    )  # fmt: skip


def _predicates(given: tuple[Operand, ...]) -> int:
    """Count the predicates before the first other operand, if any other follows."""
    count = next((n for n, one in enumerate(given) if one.kind not in ("P", "UP")), 0)
    return min(count, 2)


def data_registers(opcode: str) -> int:
    """Return how many 32-bit registers a lane loads or stores."""
    name, *modifiers = opcode.split(".")
    if name in ("LDSM", "STSM"):
        return next((int(m) for m in modifiers if m in ("2", "4")), 1)
    return 4 if "128" in modifiers else 2 if "64" in modifiers else 1


_MATRIX = re.compile(r"\.(16816|1688|16832|16864|1684|8816|88128|168128|168256|884)\b")
_FRAGMENTS = {"16816": (4, 2, 4), "1688": (2, 1, 4), "1684": (2, 1, 4), "16832": (4, 2, 4)}
"""HMMA's shape -> registers of a and b at 16 bits, and of c and d at 32."""
_WIDE_FLOAT = ("DADD", "DFMA", "DMNMX", "DMUL")


def widths(opcode: str, given: tuple[Operand, ...]) -> list[int]:
    """Return for each operand how many registers of its file it takes, of an address those of its base.

    Raises:
        UserError: a product of a shape that is not understood.
    """
    name, *modifiers = opcode.split(".")
    out = [2 if one.wide else 1 for one in given]
    results = destinations(opcode, given)

    def put(count: int, *places: int) -> None:
        for place in places:
            if place < len(given) and given[place].kind in ("R", "UR"):
                out[place] = count

    if name in ("LD", "LDG", "LDL", "LDS", "LDC", "ULDC", "LDSM"):
        put(data_registers(opcode), 0)
    elif name in ("ST", "STG", "STL", "STS", "STSM", "RED", "REDG"):
        put(data_registers(opcode), *range(len(given)))
    elif name in ("ATOM", "ATOMG", "ATOMS", "SYNCS"):
        wide = 2 if "64" in modifiers or "F32x2" in modifiers else 1
        put(wide, *range(len(given)))
    elif name in ("IMAD", "UIMAD") and ("WIDE" in modifiers or "HI" in modifiers):  # HI adds a pair, too
        put(2, *((0,) if "WIDE" in modifiers else ()), results + 2)
    elif name in ("UIADD3", "IADD3") and "64" in modifiers:
        put(2, *range(len(given)))
    elif name == "CS2R":
        put(1 if "32" in modifiers else 2, 0)
    elif name in _WIDE_FLOAT:
        put(2, *range(len(given)))
    elif name == "DSETP":
        put(2, *range(results, len(given)))
    elif name in ("F2F", "F2I", "I2F", "FRND"):
        to, since = _converted(name, modifiers)
        put(to, 0)
        put(since, 1)
    elif name in ("HMMA", "IMMA"):
        for place, count in zip(range(4), _fragments(opcode), strict=True):
            put(count, place)
    elif name in ("HGMMA", "IGMMA", "QGMMA"):
        _warpgroup(opcode, given, out)
    elif name in ("UTMALDG", "UTMASTG", "UTMAREDG", "UTMAPF"):
        dimensions = next(int(m[0]) for m in modifiers if re.fullmatch(r"\dD", m))
        out[0], out[1] = dimensions + (2 if name == "UTMALDG" else 1), 2
    elif name in ("UBLKCP", "UBLKRED"):
        out[:2] = [2, 2]
    return out


def _converted(name: str, modifiers: list[str]) -> tuple[int, int]:
    """Registers of a conversion's result and operand: F2F.F64.F32 widens, I2F.S64 and F2I.F64 narrow."""
    whole = {"S64", "U64"} & set(modifiers)
    if name == "F2F":
        return (2 if modifiers[0] == "F64" else 1), (2 if "F64" in modifiers[1:] else 1)
    if name == "FRND":
        return (2, 2) if "F64" in modifiers else (1, 1)
    double = "F64" in modifiers
    to, since = (double, whole) if name == "I2F" else (whole, double)
    return (2 if to else 1), (2 if since else 1)


def _fragments(opcode: str) -> tuple[int, int, int, int]:
    """Registers of d, a, b, c of a warp's product."""
    shape = _MATRIX.search(opcode)
    found = _FRAGMENTS.get(shape[1]) if shape else None
    if found is None:
        raise UserError(
            f"a product of one of the shapes {', '.join(_FRAGMENTS)}", opcode,
            "add it to resnet_fast/simulation/touched.py",
        )  # fmt: skip
    a, b, d = found
    if "TF32" in opcode and shape is not None and shape[1] == "1688":
        a, b = 4, 2
    if opcode.startswith("IMMA") and shape is not None and shape[1] == "16816":
        a, b = 2, 1
    if opcode.startswith("HMMA") and ".F32" not in opcode:
        d = 2
    return d, a, b, d


def _warpgroup(opcode: str, given: tuple[Operand, ...], out: list[int]) -> None:
    """Sizes of a warpgroup's product: d and c by its columns, a in registers or not."""
    m = re.search(r"\.64x(\d+)x\d+\b", opcode)
    if m is None:
        raise UserError("a warpgroup's product 64xNxK", opcode, "add it to simulation/touched.py")
    accumulators = int(m[1]) // (2 if ".F32" in opcode or opcode.startswith("IGMMA") else 4)
    from_registers = given[1].kind == "R"
    for place, one in enumerate(given):
        if one.kind == "gdesc":
            out[place] = 2 if from_registers else 4
        elif one.kind == "R":
            out[place] = 4 if place == 1 else accumulators


def touched(
    opcode: str, predicate: str, given: tuple[Operand, ...]
) -> tuple[tuple[Registers, ...], tuple[Registers, ...]]:
    """Return the registers that an instruction writes, and those that it reads, in the order of its operands.

    A guard comes last. Registers that are no storage (RZ, PT) are left out.
    """
    results, counts = destinations(opcode, given), widths(opcode, given)
    writes: list[Registers] = []
    reads: list[Registers] = []
    for place, (one, count) in enumerate(zip(given, counts, strict=True)):
        to = writes if place < results else reads
        if one.kind in ("R", "UR", "P", "UP", "B"):
            if one.number != ZERO.get(one.kind):
                to.append(Registers(one.kind, one.number, count))
        elif one.kind == "gdesc":
            reads.append(Registers("UR", one.number, count))
        elif one.kind in ("PR", "UPR"):
            to.append(Registers(one.kind.removesuffix("R"), 0, 7))
        elif one.kind in ("memory", "constant"):
            bulk = opcode.startswith(("UTMA", "UBLK"))
            if one.base is not None and one.base != ZERO["R"]:
                reads.append(Registers("R", one.base, 2 if one.wide else 1))
            if one.uniform is not None and one.uniform != ZERO["UR"]:
                reads.append(Registers("UR", one.uniform, count if bulk else 1))
            if one.descriptor is not None and one.descriptor != ZERO["UR"]:
                reads.append(Registers("UR", one.descriptor, 2))
    if predicate:
        bare = predicate.lstrip("!")
        if not bare.endswith("T"):
            reads.append(Registers("UP" if bare.startswith("U") else "P", int(bare[-1])))
    return tuple(writes), tuple(reads)
