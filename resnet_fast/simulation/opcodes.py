"""What each opcode costs: the pipe that it holds and for how long, when its result and its operands are free.

:func:`timing` turns instructions into the rows that the compiled multiprocessor (csrc/sm) runs. An opcode that no table
here has is an error that names it and says how often it occurs: a guess would end as a wrong figure.

A result of fixed latency needs no latency here. The compiler knows it, and keeps what reads the result away by the
stall counts that it writes into the control words. A latency counts only where an instruction sets a scoreboard.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import native
from ..errors import UserError
from .constants import Constants
from .instruction import Instruction
from .operands import ZERO, Operand
from .touched import destinations, widths


@dataclass(frozen=True)
class OpcodeCost:
    """The cost of one kind of instruction. Names are those of the constants.

    Attributes:
        action: what it does beyond holding a pipe, as csrc/sm/code.h lists it.
        pipe: which pipe, as csrc/sm/code.h lists it.
        interval: cycles for which the pipe takes no other.
        latency: until the result, for a scoreboard.
        release: until the operands have been read, for a scoreboard.
    """

    action: str = "plain"
    pipe: str = "none"
    interval: str | None = None
    latency: str | None = None
    release: str | None = None


_ALU = OpcodeCost(pipe="alu", interval="alu_interval")
_FMA = OpcodeCost(pipe="fma", interval="fma_interval")
_HEAVY = OpcodeCost(pipe="fma_heavy", interval="fma_interval")
_HALF = OpcodeCost(pipe="half", interval="half_interval")
_HALF_COMPARE = OpcodeCost(pipe="half", interval="half_compare_interval")
_SPECIAL = OpcodeCost("variable", "special", "special_interval", "special_latency", "special_interval")
_CONVERT = OpcodeCost("variable", "special", "convert_interval", "special_latency", "special_interval")
_DOUBLE = OpcodeCost("variable", "double", "double_interval", "double_latency")
_UNIFORM = OpcodeCost(pipe="uniform", interval="uniform_interval", latency="uniform_latency")
_CONTROL = OpcodeCost(pipe="branch", interval="branch_interval")
_SHUFFLE = OpcodeCost("variable", "queue", None, "shuffle_latency", "shared_load_release")
_CONSTANT_LOAD = OpcodeCost("variable", "queue", None, "constant_latency", "shared_load_release")
_SYSTEM = OpcodeCost("variable", "none", None, "register_special_latency")
_NOTHING = OpcodeCost()


def _all(cost: OpcodeCost, names: str) -> dict[str, OpcodeCost]:
    return dict.fromkeys(names.split(), cost)


COSTS: Mapping[str, OpcodeCost] = {
    **_all(
        _ALU,
        "IADD3 LOP3 SHF PRMT MOV SEL FSEL FMNMX FSETP FSET ISETP IABS IMNMX VIMNMX VIADDMNMX VHMNMX LEA PLOP3 P2R R2P "
        "SGXT BMSK VOTE F2FP I2FP I2IP F2IP VABSDIFF R2UR CS2R VOTEU SHL SHR ISCADD",
    ),
    **_all(_FMA, "FFMA FADD FMUL"),
    **_all(_HEAVY, "IMAD VIADD IDP"),
    **_all(_HALF, "HFMA2 HADD2 HMUL2"),
    **_all(_HALF_COMPARE, "HMNMX2 HSETP2 HSET2"),
    **_all(_SPECIAL, "MUFU POPC FLO BREV FCHK MATCH MOVM"),
    **_all(_CONVERT, "F2F F2I I2F FRND"),
    **_all(_DOUBLE, "DADD DMUL DFMA DSETP DMNMX"),
    **_all(
        _UNIFORM,
        "UIADD3 UIMAD UISETP ULDC ULEA ULOP3 UMOV UPRMT USEL USGXT USHF UFLO UPOPC UBREV UBMSK UPLOP3 UP2UR UR2UP "
        "ELECT REDUX",
    ),
    **_all(
        _CONTROL,
        "BSSY BSYNC BREAK WARPSYNC ENDCOLLECTIVE YIELD NOP ERRBAR CGAERRBAR CCTL PREEXIT ACQBULK USETMAXREG BMOV",
    ),
    **_all(OpcodeCost("branch", "branch", "branch_interval"), "BRA CALL RET BRX JMX"),
    **_all(_SHUFFLE, "SHFL"),
    **_all(_CONSTANT_LOAD, "LDC"),
    **_all(_SYSTEM, "S2R S2UR B2R"),
    **_all(OpcodeCost("exit"), "EXIT"),
    **_all(OpcodeCost("load", "queue", None, None, "global_release"), "LDG LD LDL"),
    **_all(OpcodeCost("store", "queue", None, None, "shared_store_release"), "STG ST STL"),
    **_all(OpcodeCost("atomic", "queue", None, None, "shared_store_release"), "ATOMG ATOM RED REDG"),
    "LDGSTS": OpcodeCost("copy", "queue", None, None, "copy_release"),
    "LDGDEPBAR": OpcodeCost("copy_group"),
    "DEPBAR": OpcodeCost("scoreboard_wait"),
    **_all(OpcodeCost("shared", "queue", None, "shared_latency", "shared_load_release"), "LDS LDSM ATOMS"),
    **_all(OpcodeCost("shared", "queue", None, "shared_latency", "shared_store_release"), "STS STSM"),
    **_all(OpcodeCost(pipe="tensor", interval="hmma_interval", latency="hmma_latency"), "HMMA IMMA"),
    **_all(OpcodeCost("product", "tensor", "product_issue_interval"), "HGMMA IGMMA QGMMA"),
    **_all(OpcodeCost("bulk_store", "queue"), "UTMASTG UTMAREDG"),
    "UTMACMDFLUSH": OpcodeCost("bulk_commit"),
}
"""By opcode without modifiers. Those whose modifiers decide are in :data:`BY_MODIFIER`."""

_PHASE = OpcodeCost("phase_arrive", "queue", None, "phase_pass", "shared_load_release")

BY_MODIFIER: tuple[tuple[str, OpcodeCost], ...] = (
    (r"BAR\.SYNC\b.*", OpcodeCost("barrier")),
    (r"BAR\.RED\b.*", OpcodeCost("barrier", latency="shuffle_latency")),
    (r"BAR\.ARV\b.*", OpcodeCost("barrier_arrive")),
    (r"SYNCS\.EXCH\.64", OpcodeCost("phase_init", "queue", None, "phase_pass", "shared_load_release")),
    (r"SYNCS\.ARRIVE\..*", _PHASE),
    (r"SYNCS\.PHASECHK\..*", OpcodeCost("phase_wait", "queue", None, "phase_pass", "shared_load_release")),
    (r"SYNCS\.CCTL\.IV", _NOTHING),
    (r"ARRIVES\.LDGSTSBAR\..*", OpcodeCost("copy_arrive", "queue", None, "phase_pass", "shared_load_release")),
    (r"WARPGROUP\.ARRIVE", OpcodeCost("group_arrive")),
    (r"WARPGROUP\.DEPBAR\.LE", OpcodeCost("group_wait")),
    (r"UTMALDG\.\dD(\.IM2COL)?", OpcodeCost("bulk_load", "queue")),
    (r"UTMAPF\..*|UTMACCTL\..*", _NOTHING),
    (r"MEMBAR\.\w+\.CTA", OpcodeCost("fence", latency="fence_latency")),
    (r"MEMBAR\.\w+\.(GPU|SYS)", OpcodeCost("fence", latency="membar_gpu_latency")),
    (r"FENCE\.VIEW\.ASYNC.*", OpcodeCost("fence", latency="fence_latency")),
)
"""Patterns of whole opcodes. A multicast, a cluster's barrier and a sleep have none: they are not modelled."""

_NO_SCOREBOARD = 7
_TENSOR_CYCLES = {"16816": 1.0, "1688": 0.5, "16832": 1.0, "16864": 1.0, "1684": 0.25}
"""Time of a warp's product by its shape, in products 16x8x16 of 16-bit numbers."""


def cost_of(opcode: str) -> OpcodeCost | None:
    """Return the cost of an opcode with modifiers; None if it is not modelled."""
    for pattern, cost in BY_MODIFIER:
        if re.fullmatch(pattern, opcode):
            return cost
    return COSTS.get(opcode.partition(".")[0])


def check(code: Sequence[Instruction], executed: Mapping[int, int] | None = None) -> None:
    """Refuse code with opcodes that are not modelled.

    Args:
        code: a kernel's instructions.
        executed: how often warps executed each, by place; without it, all of the code counts.

    Raises:
        UserError: it names each such opcode and how often it occurs.
    """
    missing = Counter[str]()
    for place, one in enumerate(code):
        times = 1 if executed is None else executed.get(place, 0)
        if times and cost_of(one.opcode) is None:
            missing[one.opcode] += times
    if missing:
        raise UserError(
            "opcodes that the cycle model has costs for",
            ", ".join(f"{name} ({times} times)" for name, times in missing.most_common()),
            "add their costs to resnet_fast/simulation/opcodes.py",
        )


def timing(code: Sequence[Instruction], constants: Constants) -> np.ndarray:
    """Return the rows that csrc/sm runs, one per instruction.

    An instruction that is not modelled gets the row of one that must not be executed: :func:`check` refuses a launch
    that does.
    """
    machine = native.multiprocessor()
    rows = np.zeros(len(code), machine.ROW)
    cache: dict[int, int] = {}
    for row, one in zip(rows, code, strict=True):
        cost = cost_of(one.opcode)
        if cost is None:
            cache = {}
            continue
        control = one.control
        row["action"], row["pipe"] = machine.actions[cost.action], machine.pipes[cost.pipe]
        row["stall"], row["yields"], row["wait"] = control.stall, control.yields, control.wait
        row["write"] = _NO_SCOREBOARD if control.write_barrier is None else control.write_barrier
        row["read"] = _NO_SCOREBOARD if control.read_barrier is None else control.read_barrier
        row["interval"] = 1.0 if cost.pipe == "queue" else constants[cost.interval] if cost.interval else 0.0
        row["latency"] = constants[cost.latency] if cost.latency else 0.0
        row["release"] = constants[cost.release] if cost.release else 0.0
        row["scoreboard"] = _NO_SCOREBOARD
        _particulars(row, one, cost, constants)
        cache = _banks(row, one, cost, cache)
    return rows


def _particulars(row: Any, one: Instruction, cost: OpcodeCost, constants: Constants) -> None:
    """Fill in what the modifiers and operands of a kind of instruction say."""
    modifiers = one.opcode.split(".")[1:]
    if cost.action == "load":
        row["bypass"] = any(m in modifiers for m in ("STRONG", "GPU", "SYS", "CV", "CG"))
        row["latency"] = constants["load_back_128"] if "128" in modifiers else (
            constants["load_back_64"] if "64" in modifiers else 0.0
        )  # fmt: skip
    elif cost.action == "copy":
        row["bypass"] = "BYPASS" in modifiers
    elif cost.action in ("copy_group", "bulk_commit"):
        row["scoreboard"] = 0 if row["write"] == _NO_SCOREBOARD else row["write"]
        row["write"] = _NO_SCOREBOARD
    elif cost.action == "scoreboard_wait":
        row["scoreboard"], row["immediate"] = _scoreboard(one), one.parsed[1].number if len(one.parsed) > 1 else 0
    elif cost.action == "group_wait":
        row["immediate"] = next((o.number for o in one.parsed if o.kind == "immediate"), 0)
    elif cost.action == "fence":
        row["immediate"] = "GPU" in modifiers or "SYS" in modifiers
    elif cost.action == "product":
        shape = re.search(r"\.64x(\d+)x\d+\b", one.opcode)
        assert shape is not None, one.opcode
        columns = int(shape[1])
        row["registers"] = any(o.kind == "R" for o in one.parsed[1:2])
        # Each row of an operand's slice of K has 32 bytes, whatever the type: A has 64 rows, B as many as columns.
        read = 32 * (columns + (0 if row["registers"] else 64))
        row["tensor"], row["operands"] = columns / 2, read / constants["shared_wavefront_bytes"]
        row["commits"] = "gsb0" in one.operands
    elif one.name in ("HMMA", "IMMA"):
        shape = re.search(r"\.(16816|1688|16832|16864|1684)\b", one.opcode)
        assert shape is not None, one.opcode
        wide = 2.0 if "TF32" in modifiers else 0.5 if one.name == "IMMA" and shape[1] == "16816" else 1.0
        row["interval"] = constants["hmma_interval"] * _TENSOR_CYCLES[shape[1]] * wide


def _scoreboard(one: Instruction) -> int:
    found = re.search(r"SB(\d)", one.operands)
    if found is None:
        raise UserError("DEPBAR with a scoreboard", f"{one.opcode} {one.operands}", "teach opcodes.py this form")
    return int(found[1])


_PORTS = ("alu", "fma", "fma_heavy", "half")


def _banks(row: Any, one: Instruction, cost: OpcodeCost, cache: dict[int, int]) -> dict[int, int]:
    """Count the registers that an instruction reads from the even and the odd bank; return the operand cache after it.

    The cache holds one register for each operand slot. It is followed in the order of the code, as of one warp alone.
    """
    after: dict[int, int] = {}
    if cost.pipe not in _PORTS:
        return after
    parsed: tuple[Operand, ...] = one.parsed
    first = destinations(one.opcode, parsed)
    counts = widths(one.opcode, parsed)
    for slot, (operand, count) in enumerate(zip(parsed[first:], counts[first:], strict=True)):
        if operand.kind != "R" or operand.number == ZERO["R"]:
            continue
        if operand.reused:
            after[slot] = operand.number
        if cache.get(slot) == operand.number:
            continue
        for register in range(operand.number, operand.number + count):
            row["odd" if register % 2 else "even"] += 1
    return after
