"""Operands of machine code: registers, immediates, constants and addresses, from their text."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from ..errors import UserError

ZERO = {"R": 255, "UR": 63, "P": 7, "UP": 7}
"""The register of each file that is no storage: RZ, URZ, PT, UPT."""


_REGISTER = re.compile(r"^(UR|R|UP|P|B)(\d+|Z|T)$")
_CONSTANT = re.compile(r"^c\[0x([0-9a-f]+)\]\[(?:(U?R)(\d+|Z))?\+?(-?)(?:0x([0-9a-f]+))?\]$")
_DESCRIBED = re.compile(r"^(gdesc|desc|tmem|idesc)\[UR(\d+|Z)\](.*)$")
_IMMEDIATE = re.compile(r"^-?0x[0-9a-f]+$")
_FLOAT = re.compile(r"^[-+]?(\d+(\.\d+)?(e[-+]?\d+)?|INF|QNAN|SNAN)$")
_WORDS = re.compile(r"^(SB\d|gsb\d|U?PR|[A-Za-z_][A-Za-z_0-9.]*)$")


@dataclass(frozen=True)
class Registers:
    """Consecutive registers of one file: ``Registers("R", 4, 2)`` is R4 and R5. RZ, URZ, PT and UPT are left out.

    Attributes:
        file: R, UR, P, UP or B (convergence barriers).
        first, count: the registers.
    """

    file: str
    first: int
    count: int = 1


@dataclass(frozen=True)
class Operand:
    """One operand as it is written.

    Attributes:
        kind: R, UR, P, UP, B, PR and UPR (all predicates), special (a special register), immediate, float, constant,
            memory, gdesc (descriptors of a product), scoreboard, word.
        number: register, value of the immediate (of a float: its bits in binary32), or offset of the constant or
            address.
        text: as it is written.
        negated, absolute, inverted: ``-x``, ``|x|``, ``~x`` or ``!x``.
        reused: ``.reuse``.
        wide: ``.64``, a pair of registers; of an address, that its base is one.
        bank: of a constant.
        base, uniform, descriptor: of an address or constant: registers that are added to ``number``, and the uniform
            register that holds the descriptor. None where there is none.
        modifiers: further suffixes: ``H0_H0``, ``X4``, ``U32``.
    """

    kind: str
    number: int
    text: str
    negated: bool = False
    absolute: bool = False
    inverted: bool = False
    reused: bool = False
    wide: bool = False
    bank: int = 0
    base: int | None = None
    uniform: int | None = None
    descriptor: int | None = None
    modifiers: tuple[str, ...] = ()


def operands(opcode: str, text: str, word: int) -> tuple[Operand, ...]:
    """Return the operands of an instruction.

    Args:
        opcode: with modifiers.
        text: the operands.
        word: the instruction's lower 64 bits, whose upper half holds a number.

    Raises:
        UserError: an operand of a form that is not understood.
    """
    parts = [one.strip() for one in _split(text)]
    if opcode.partition(".")[0] in (
        "RET",
        "CALL",
        "BRX",
        "JMX",
    ):  # "R4 0x0": the register, and where addresses count from
        parts = [piece for one in parts for piece in one.split()]
    try:
        return tuple(_operand(one, word) for one in parts if one)
    except ValueError as error:
        raise UserError(
            "operands of a known form", f"{error} in `{opcode} {text}`",
            "teach resnet_fast/simulation/operands.py this form",
        ) from None  # fmt: skip


def _split(text: str) -> list[str]:
    """Split at commas outside of brackets."""
    parts, depth = [""], 0
    for c in text:
        depth += (c == "[") - (c == "]")
        if c == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    return parts


def _number(text: str) -> int:
    return int(text, 16) if text.startswith(("0x", "-0x")) else int(text)


def _operand(text: str, word: int) -> Operand:
    rest, suffixes = text, list[str]()
    if _FLOAT.match(rest) or rest == "-0":  # a number in the upper half of the lower word
        return Operand("float", word >> 32, text)
    if _IMMEDIATE.match(rest):
        return Operand("immediate", _number(rest), text)
    negated = inverted = absolute = False
    while rest[:1] in ("-", "~", "!"):
        negated, inverted = negated or rest[0] == "-", inverted or rest[0] in "~!"
        rest = rest[1:]
    if m := re.match(r"^\|(.*)\|(.*)$", rest):
        absolute, rest = True, m[1] + m[2]
    while (m := re.match(r"^(.*[\]\w])\.([A-Za-z][\w]*|64)$", rest)) and "[" not in m[2] and not _special(rest):
        rest, suffixes = m[1], [m[2], *suffixes]
    flags: dict[str, Any] = {
        "negated": negated, "inverted": inverted, "absolute": absolute, "reused": "reuse" in suffixes,
        "wide": "64" in suffixes, "modifiers": tuple(s for s in suffixes if s not in ("reuse", "64")),
    }  # fmt: skip
    return replace(_plain(rest, text), **flags) if not rest.startswith(("[", "desc[")) else _memory(rest, text, flags)


def _special(text: str) -> bool:
    return text.startswith("SR")


def _plain(rest: str, text: str) -> Operand:
    if m := _REGISTER.match(rest):
        return Operand(m[1], ZERO[m[1]] if m[2] in "ZT" else int(m[2]), text)
    if _special(rest):
        return Operand("special", 0, text)
    if m := _CONSTANT.match(rest):
        number = int(m[5] or "0", 16) * (-1 if m[4] else 1)
        one = Operand("constant", number, text, bank=int(m[1], 16))
        if not m[2]:
            return one
        register = ZERO[m[2]] if m[3] == "Z" else int(m[3])
        return replace(one, base=register) if m[2] == "R" else replace(one, uniform=register)
    if m := _DESCRIBED.match(rest):
        return Operand("gdesc" if m[1] == "gdesc" else "word", ZERO["UR"] if m[2] == "Z" else int(m[2]), text)
    if rest in ("PR", "UPR"):
        return Operand(rest, 0, text)
    if _WORDS.match(rest):
        return Operand("word", 0, text)
    raise ValueError(repr(text))


def _memory(rest: str, text: str, flags: dict[str, Any]) -> Operand:
    """``[R4.64+UR6+0x10]``, with ``desc[UR4]`` before it or not."""
    one = replace(Operand("memory", 0, text), modifiers=flags["modifiers"])
    if m := re.match(r"^desc\[UR(\d+|Z)\](.*)$", rest):
        one, rest = replace(one, descriptor=ZERO["UR"] if m[1] == "Z" else int(m[1])), m[2]
    if not (rest.startswith("[") and rest.endswith("]")):
        raise ValueError(repr(text))
    for part in re.sub(r"\+-", "+-", rest[1:-1]).split("+"):
        if m := re.match(r"^(U?R)(\d+|Z)((?:\.\w+)*)$", part):
            number = ZERO[m[1]] if m[2] == "Z" else int(m[2])
            suffixes = tuple(s for s in m[3].split(".") if s)
            if m[1] == "R":
                scale = tuple(s for s in suffixes if s not in ("64", "reuse"))
                one = replace(
                    one, base=number, wide="64" in suffixes, reused="reuse" in suffixes,
                    modifiers=(*one.modifiers, *scale),
                )  # fmt: skip
            else:
                one = replace(one, uniform=number)
        elif _IMMEDIATE.match(part):
            one = replace(one, number=one.number + _number(part))
        elif part:
            raise ValueError(repr(text))
    return one
