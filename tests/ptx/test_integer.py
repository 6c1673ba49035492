"""Integer arithmetic and bits, against Python's integers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tests.support.ptx import evaluate

DTYPES = {
    "u16": np.uint16, "s16": np.int16, "b16": np.uint16, "u32": np.uint32, "s32": np.int32, "b32": np.uint32,
    "u64": np.uint64, "s64": np.int64, "b64": np.uint64,
}  # fmt: skip


def values(kind: str, seed: int, n: int = 192) -> np.ndarray:
    """Return special values of a type, then random ones, shuffled."""
    rng = np.random.default_rng(seed)
    info = np.iinfo(DTYPES[kind])
    special = [0, 1, 2, 3, 7, 31, 32, 33, 63, 64, 255, info.max, info.max - 1, info.min, info.min + 1, -1, -2, -7]
    special = [v for v in special if info.min <= v <= info.max]
    drawn = rng.integers(info.min, info.max, n, dtype=DTYPES[kind], endpoint=True)
    drawn[: len(special) * 4] = np.tile(np.array(special, DTYPES[kind]), 4)
    rng.shuffle(drawn)
    return drawn


def wrap(value: int, kind: str) -> int:
    bits = np.iinfo(DTYPES[kind]).bits
    value &= (1 << bits) - 1
    return value - (1 << bits) if kind[0] == "s" and value >> (bits - 1) else value


def width(kind: str) -> int:
    return int(kind[1:])


def check(opcode: str, kinds: str, expected: Callable[..., int], seed: int = 0) -> None:
    """Compare an opcode with a Python function; ``kinds`` are the types of the result and of the operands."""
    to, *sources = kinds.split()
    operands = {name: values(kind, seed + n) for n, (name, kind) in enumerate(zip("abce", sources, strict=False))}
    got = evaluate(f"{opcode} d, {', '.join(operands)};", {"d": DTYPES[to]}, operands)["d"]
    for lane, row in enumerate(zip(*operands.values(), strict=True)):
        want = expected(*map(int, row))
        assert int(got[lane]) == wrap(want, to), (opcode, row)


INTEGERS = ["u16", "s16", "u32", "s32", "u64", "s64"]


def quotient(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


@pytest.mark.parametrize("kind", INTEGERS)
def test_arithmetic(kind: str) -> None:
    n = width(kind)
    three, two = f"{kind} {kind} {kind}", f"{kind} {kind}"
    check(f"add.{kind}", three, lambda a, b: a + b)
    check(f"sub.{kind}", three, lambda a, b: a - b)
    check(f"mul.lo.{kind}", three, lambda a, b: a * b)
    check(f"mul.hi.{kind}", three, lambda a, b: a * b >> n)
    check(f"mad.lo.{kind}", f"{three} {kind}", lambda a, b, c: a * b + c)
    check(f"mad.hi.{kind}", f"{three} {kind}", lambda a, b, c: (a * b >> n) + c)
    check(f"min.{kind}", three, min)
    check(f"max.{kind}", three, max)
    check(f"sad.{kind}", f"{three} {kind}", lambda a, b, c: abs(a - b) + c)
    if kind[0] == "s":
        check(f"abs.{kind}", two, abs)
        check(f"neg.{kind}", two, lambda a: -a)


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32"])
def test_products_of_twice_the_width(kind: str) -> None:
    wide = f"{kind[0]}{2 * width(kind)}"
    check(f"mul.wide.{kind}", f"{wide} {kind} {kind}", lambda a, b: a * b)
    check(f"mad.wide.{kind}", f"{wide} {kind} {kind} {wide}", lambda a, b, c: a * b + c)


@pytest.mark.parametrize("kind", INTEGERS)
def test_division_truncates(kind: str) -> None:
    a, b = values(kind, 1), values(kind, 2)
    b[b == 0] = 3
    least = np.iinfo(DTYPES[kind]).min
    if kind[0] == "s":
        a[:2], b[:2] = least, -1
    got = evaluate(f"div.{kind} d, a, b;\nrem.{kind} e, a, b;", dict.fromkeys("de", DTYPES[kind]), {"a": a, "b": b})
    for lane, (x, y) in enumerate(zip(a.tolist(), b.tolist(), strict=True)):
        assert int(got["d"][lane]) == wrap(quotient(x, y), kind)
        assert int(got["e"][lane]) == wrap(x - y * quotient(x, y), kind)


def clamp(value: int) -> int:
    return max(-(2**31), min(2**31 - 1, value))


def test_saturation_24_bits_and_dot_products() -> None:
    check("add.sat.s32", "s32 s32 s32", lambda a, b: clamp(a + b))
    check("sub.sat.s32", "s32 s32 s32", lambda a, b: clamp(a - b))
    check("mad.hi.sat.s32", "s32 s32 s32 s32", lambda a, b, c: clamp((a * b >> 32) + c))
    check("mul24.lo.u32", "u32 u32 u32", lambda a, b: (a & 0xFFFFFF) * (b & 0xFFFFFF))
    check("mul24.hi.u32", "u32 u32 u32", lambda a, b: (a & 0xFFFFFF) * (b & 0xFFFFFF) >> 16)
    signed = lambda v, n: (v & (1 << n) - 1) - ((v >> (n - 1) & 1) << n)  # noqa: E731
    check("mad24.lo.s32", "s32 s32 s32 s32", lambda a, b, c: signed(a, 24) * signed(b, 24) + c)
    plain = lambda v, n: v & (1 << n) - 1  # noqa: E731
    for x, a_of in (("u32", plain), ("s32", signed)):
        for y, b_of in (("u32", plain), ("s32", signed)):
            check(
                f"dp4a.{x}.{y}", "u32 u32 u32 u32",
                lambda a, b, c: c + sum(a_of(a >> 8 * i, 8) * b_of(b >> 8 * i, 8) for i in range(4)),  # noqa: B023
            )  # fmt: skip
            check(
                f"dp2a.hi.{x}.{y}", "u32 u32 u32 u32",
                lambda a, b, c: c + sum(a_of(a >> 16 * i, 16) * b_of(b >> (8 * i + 16), 8) for i in range(2)),  # noqa: B023
            )  # fmt: skip


def test_halves() -> None:
    def halves(f: Callable[[int, int], int]) -> Callable[[int, int], int]:
        return lambda a, b: (f(a & 0xFFFF, b & 0xFFFF) & 0xFFFF) | (f(a >> 16, b >> 16) & 0xFFFF) << 16

    signed = lambda v: v - (v >> 15 << 16)  # noqa: E731
    check("add.s16x2", "u32 u32 u32", halves(lambda a, b: a + b))
    check("max.s16x2", "u32 u32 u32", halves(lambda a, b: max(signed(a), signed(b))))
    check("min.u16x2", "u32 u32 u32", halves(min))


@pytest.mark.parametrize("kind", ["b16", "b32", "b64"])
def test_logic_and_shifts(kind: str) -> None:
    n = width(kind)
    three, two = f"{kind} {kind} {kind}", f"{kind} {kind}"
    check(f"and.{kind}", three, lambda a, b: a & b)
    check(f"or.{kind}", three, lambda a, b: a | b)
    check(f"xor.{kind}", three, lambda a, b: a ^ b)
    check(f"not.{kind}", two, lambda a: ~a)
    check(f"cnot.{kind}", two, lambda a: a == 0)
    shift = f"{kind} {kind} u32"
    check(f"shl.{kind}", shift, lambda a, b: a << b if b < n else 0)
    for signed in ("u", "s", "b"):
        check(f"shr.{signed}{n}", f"{signed}{n} {signed}{n} u32", lambda a, b: a >> min(b, 2 * n))


def test_more_bits() -> None:
    check("shf.l.clamp.b32", "u32 u32 u32 u32", lambda a, b, c: ((b << 32 | a) << min(c, 32)) >> 32)
    check("shf.r.clamp.b32", "u32 u32 u32 u32", lambda a, b, c: (b << 32 | a) >> min(c, 32))
    check("shf.l.wrap.b32", "u32 u32 u32 u32", lambda a, b, c: ((b << 32 | a) << (c & 31)) >> 32)
    check("shf.r.wrap.b32", "u32 u32 u32 u32", lambda a, b, c: (b << 32 | a) >> (c & 31))
    for kind in ("b32", "b64"):
        n = width(kind)
        check(f"popc.{kind}", f"u32 {kind}", lambda a: bin(a).count("1"))
        check(f"clz.{kind}", f"u32 {kind}", lambda a: n - a.bit_length())  # noqa: B023
        check(f"brev.{kind}", f"{kind} {kind}", lambda a: int(f"{a:0{n}b}"[::-1], 2))  # noqa: B023
        check(f"bfind.u{n}", f"u32 u{n}", lambda a: a.bit_length() - 1)
        check(f"bfind.s{n}", f"u32 s{n}", lambda a: (a if a >= 0 else ~a).bit_length() - 1)
        check(f"bfind.shiftamt.u{n}", f"u32 u{n}", lambda a: n - a.bit_length() if a else -1)  # noqa: B023
    for table in (0x80, 0xE8, 0x96, 0x1B):
        index = lambda a, b, c, i: (a >> i & 1) * 4 + (b >> i & 1) * 2 + (c >> i & 1)  # noqa: E731
        operands = {name: values("b32", n) for n, name in enumerate("abc")}
        got = evaluate(f"lop3.b32 d, a, b, c, {table};", {"d": np.uint32}, operands)["d"]
        for lane, (a, b, c) in enumerate(zip(*(v.tolist() for v in operands.values()), strict=True)):
            assert got[lane] == sum((table >> index(a, b, c, i) & 1) << i for i in range(32))


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_bit_fields(kind: str) -> None:
    """The pseudocode of the PTX ISA, bit by bit."""
    n = width(kind)
    rng = np.random.default_rng(5)
    a, b = values(kind, 1), values(kind, 2)
    start, length = (rng.integers(0, 300, len(a)).astype(np.uint32) for _ in range(2))
    start[::2] %= n
    length[::3] %= n
    operands = {"a": a, "b": b, "c": start, "e": length}
    text = f"bfe.{kind} d, a, c, e;\nbfi.b{n} f, a, b, c, e;"
    got = evaluate(text, {"d": DTYPES[kind], "f": DTYPES[f"b{n}"]}, operands)
    for lane in range(len(a)):
        x, y = int(a[lane]) & (1 << n) - 1, int(b[lane]) & (1 << n) - 1
        position, size = int(start[lane]) & 255, int(length[lane]) & 255
        sign = 0 if kind[0] == "u" or size == 0 else x >> min(position + size - 1, n - 1) & 1
        field = sum((x >> (position + i) & 1 if i < size and position + i < n else sign) << i for i in range(n))
        inserted = y
        for i in range(size):
            if position + i < n:
                inserted = inserted & ~(1 << (position + i)) | (x >> i & 1) << (position + i)
        assert int(got["d"][lane]) == wrap(field, kind), (x, position, size)
        assert int(got["f"][lane]) == inserted, (x, y, position, size)


def test_prmt() -> None:
    """Default mode, and the tables of the others as in the PTX ISA: result bytes 3, 2, 1, 0."""
    modes = {
        "f4e": ["3210", "4321", "5432", "6543"],
        "b4e": ["5670", "6701", "7012", "0123"],
        "rc8": ["0000", "1111", "2222", "3333"],
        "ecl": ["3210", "3211", "3222", "3333"],
        "ecr": ["0000", "1110", "2210", "3210"],
        "rc16": ["1010", "3232", "1010", "3232"],
    }

    def chosen(a: int, b: int, selectors: list[int]) -> int:
        both = (b << 32 | a).to_bytes(8, "little")
        out = [both[s & 7] if s < 8 else 255 * (both[s & 7] >> 7) for s in selectors]
        return int.from_bytes(bytes(out[::-1]), "little")

    check("prmt.b32", "u32 u32 u32 u32", lambda a, b, c: chosen(a, b, [c >> s & 15 for s in (12, 8, 4, 0)]))
    for mode, table in modes.items():
        check(f"prmt.b32.{mode}", "u32 u32 u32 u32", lambda a, b, c: chosen(a, b, [int(s) for s in table[c & 3]]))  # noqa: B023


def test_carries_run_through_two_words() -> None:
    operands = {name: values("u64", n) for n, name in enumerate("abc")}
    text = """.reg .b32 %a0, %a1, %b0, %b1, %c0, %c1;
    mov.b64 {%a0, %a1}, a; mov.b64 {%b0, %b1}, b;
    add.cc.u32 %c0, %a0, %b0; addc.u32 %c1, %a1, %b1; mov.b64 d, {%c0, %c1};
    sub.cc.u32 %c0, %a0, %b0; subc.u32 %c1, %a1, %b1; mov.b64 e, {%c0, %c1};
    mad.lo.cc.u32 %c0, %a0, %b0, %a1; madc.hi.u32 %c1, %a0, %b0, %b1; mov.b64 f, {%c0, %c1};"""
    got = evaluate(text, dict.fromkeys("def", np.uint64), operands)
    with np.errstate(over="ignore"):
        a, b = operands["a"], operands["b"]
        low, high = np.uint64(0xFFFFFFFF), np.uint64(32)
        assert (got["d"] == a + b).all()
        assert (got["e"] == a - b).all()
        assert (got["f"] == (a & low) * (b & low) + (a >> high) + ((b >> high) << high)).all()
