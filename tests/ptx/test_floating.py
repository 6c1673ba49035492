"""Floating-point arithmetic, conversions and comparisons, against exact fractions and PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.ptx import FORMATS, bits_of, evaluate, root, value_of

Number = Any  # a Fraction, or "nan", "inf", "-inf", "-0"
BITS = {"f16": np.uint16, "bf16": np.uint16, "f32": np.uint32, "tf32": np.uint32, "f64": np.uint64}


def patterns(kind: str, seed: int, n: int = 256) -> np.ndarray:
    """Return bits: special values, then random ones, half of them of moderate size; shuffled."""
    mantissa, exponent = FORMATS[kind]
    rng = np.random.default_rng(seed)
    one, bias = 1 << mantissa, (1 << (exponent - 1)) - 1
    infinity = (1 << exponent) - 1 << mantissa
    special = [0, 1, 2, one - 1, one, one + 1, bias * one, bias * one + 1, (bias - 1) * one, (bias + 1) * one]
    special += [(bias - mantissa) * one + 1, (bias + mantissa + 1) * one - 1, infinity, infinity - 1, infinity + 1]
    special += [infinity | one >> 1, (bias + 1) * one + one // 2]
    sign = 1 << (mantissa + exponent)
    special += [bits | sign for bits in special]
    drawn = rng.integers(0, 2 * sign - 1, n, dtype=np.uint64, endpoint=True)
    near = rng.integers(bias - 5, bias + 6, n // 2, dtype=np.uint64)
    drawn[: n // 2] = (drawn[: n // 2] & np.uint64(sign | (one - 1))) | near << np.uint64(mantissa)
    for first, dropped in enumerate((13, 16, 29)):  # halfway between two numbers of a format with fewer bits
        if dropped < mantissa:
            drawn[first::8] = drawn[first::8] >> np.uint64(dropped) << np.uint64(dropped) | np.uint64(1 << dropped - 1)
    drawn[: 3 * len(special)] = np.tile(np.array(special, np.uint64), 3)
    rng.shuffle(drawn)
    return drawn.astype(BITS[kind])


def is_negative(x: Number) -> bool:
    return x in ("-inf", "-0") if isinstance(x, str) else x < 0


def finite(x: Number) -> Fraction:
    return Fraction(0) if x == "-0" else x


def is_zero(x: Number) -> bool:
    return x == "-0" or x == 0


def add(a: Number, b: Number) -> Number:
    if "nan" in (a, b) or (a, b) in (("inf", "-inf"), ("-inf", "inf")):
        return "nan"
    for x in (a, b):
        if x in ("inf", "-inf"):
            return x
    if a == b == "-0":
        return "-0"
    return finite(a) + finite(b)


def times(a: Number, b: Number) -> Number:
    if "nan" in (a, b):
        return "nan"
    negative = is_negative(a) != is_negative(b)
    if any(x in ("inf", "-inf") for x in (a, b)):
        return "nan" if is_zero(a) or is_zero(b) else "-inf" if negative else "inf"
    product = finite(a) * finite(b)
    return "-0" if product == 0 and negative else product


def inverse(b: Number) -> Number:
    if is_zero(b):
        return "-inf" if b == "-0" else "inf"
    if isinstance(b, str):
        return {"nan": "nan", "inf": Fraction(0), "-inf": "-0"}[b]
    return 1 / b


def over(a: Number, b: Number) -> Number:
    if "nan" in (a, b) or (is_zero(a) and is_zero(b)):
        return "nan"
    if all(x in ("inf", "-inf") for x in (a, b)):
        return "nan"
    return times(a, inverse(b))


def negated(a: Number) -> Number:
    if isinstance(a, str):
        return {"nan": "nan", "inf": "-inf", "-inf": "inf", "-0": Fraction(0)}[a]
    return "-0" if a == 0 else -a


def square_root(a: Number) -> Number:
    if a == "-0":
        return a
    if is_negative(a):
        return "nan"
    return a if isinstance(a, str) else root(a)


def fused(rounding: str) -> Callable[..., Number]:
    def f(a: Number, b: Number, c: Number) -> Number:
        return plus(rounding)(times(a, b), c)

    return f


def plus(rounding: str) -> Callable[..., Number]:
    """Return the sum; one that is exactly zero is -0 where rounding goes down, unless both are +0."""

    def f(a: Number, b: Number) -> Number:
        total = add(a, b)
        both = a == 0 and b == 0 and "-0" not in (a, b)
        return "-0" if rounding == "rm" and not isinstance(total, str) and total == 0 and not both else total

    return f


def check(
    opcode: str, kind: str, sources: int, exact: Callable[..., Number], rounding: str = "rn", to: str | None = None,
    after: Callable[[Number], Number] = lambda x: x, before: Callable[[Number], Number] = lambda x: x,
) -> None:  # fmt: skip
    """Compare every lane's bits with the exact value, rounded once."""
    to = to or kind
    operands = {name: patterns(kind, n) for n, name in enumerate("abc"[:sources])}
    got = evaluate(f"{opcode} d, {', '.join(operands)};", {"d": BITS[to]}, operands)["d"]
    for lane, row in enumerate(zip(*(v.tolist() for v in operands.values()), strict=True)):
        want = bits_of(after(exact(*(before(value_of(bits, kind)) for bits in row))), to, rounding)
        assert int(got[lane]) == want, (opcode, [hex(bits) for bits in row], hex(int(got[lane])), hex(want))


ROUNDINGS = ["rn", "rz", "rm", "rp"]


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_f32_is_rounded_once(rounding: str) -> None:
    total = plus(rounding)
    check(f"add.{rounding}.f32", "f32", 2, total, rounding)
    check(f"sub.{rounding}.f32", "f32", 2, lambda a, b: total(a, negated(b)), rounding)
    check(f"mul.{rounding}.f32", "f32", 2, times, rounding)
    check(f"fma.{rounding}.f32", "f32", 3, fused(rounding), rounding)
    check(f"div.{rounding}.f32", "f32", 2, over, rounding)
    check(f"rcp.{rounding}.f32", "f32", 1, inverse_of, rounding)
    check(f"sqrt.{rounding}.f32", "f32", 1, square_root, rounding)


def inverse_of(a: Number) -> Number:
    return over(Fraction(1), a)


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_f64_is_rounded_once(rounding: str) -> None:
    rng = np.random.default_rng(3)
    operands = {name: rng.standard_normal(96).view(np.uint64) for name in "abc"}
    exact = {
        "add": lambda a, b, c: a + b, "mul": lambda a, b, c: a * b, "fma": lambda a, b, c: a * b + c,
        "div": lambda a, b, c: a / b,
    }  # fmt: skip
    for name, f in exact.items():
        sources = "a, b, c" if name == "fma" else "a, b"
        got = evaluate(f"{name}.{rounding}.f64 d, {sources};", {"d": np.uint64}, operands)["d"]
        for lane, row in enumerate(zip(*(v.tolist() for v in operands.values()), strict=True)):
            assert int(got[lane]) == bits_of(f(*(value_of(bits, "f64") for bits in row)), "f64", rounding)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_half_precision_is_rounded_once(kind: str) -> None:
    """A product that is rounded before the sum differs in many of these lanes."""
    relu = lambda x: Fraction(0) if is_negative(x) else x  # noqa: E731
    check(f"fma.rn.{kind}", kind, 3, fused("rn"))
    check(f"fma.rn.relu.{kind}", kind, 3, fused("rn"), after=relu)
    check(f"add.{kind}", kind, 2, add)
    check(f"sub.{kind}", kind, 2, lambda a, b: add(a, negated(b)))
    check(f"mul.{kind}", kind, 2, times)


def greater(a: Number, b: Number) -> bool:
    rank = {"-inf": -(Fraction(2) ** 2000), "inf": Fraction(2) ** 2000, "-0": Fraction(0)}
    x, y = (rank.get(v, v) if isinstance(v, str) else v for v in (a, b))
    return x > y or (x == y and a != "-0" and b == "-0")


def maximum(a: Number, b: Number) -> Number:
    if "nan" in (a, b):
        return b if a == "nan" else a
    return a if greater(a, b) else b


def minimum(a: Number, b: Number) -> Number:
    if "nan" in (a, b):
        return b if a == "nan" else a
    return b if greater(a, b) else a


@pytest.mark.parametrize("kind", ["f16", "bf16", "f32"])
def test_extremes_and_signs(kind: str) -> None:
    nan = lambda f: lambda a, b: "nan" if "nan" in (a, b) else f(a, b)  # noqa: E731
    check(f"max.{kind}", kind, 2, maximum)
    check(f"min.{kind}", kind, 2, minimum)
    check(f"max.NaN.{kind}", kind, 2, nan(maximum))
    check(f"min.NaN.{kind}", kind, 2, nan(minimum))
    a = patterns(kind, 0)
    sign = a.dtype.type(1 << (8 * a.itemsize - 1))
    got = evaluate(f"abs.{kind} d, a;\nneg.{kind} e, a;", dict.fromkeys("de", a.dtype), {"a": a})
    assert (got["d"] == a & ~sign).all()
    assert (got["e"] == a ^ sign).all()


@pytest.mark.parametrize(("kind", "opcode"), [
    ("f16", "add.f16{}"), ("bf16", "fma.rn.bf16{}"), ("bf16", "max.NaN.bf16{}"), ("f16", "min.f16{}"),
])  # fmt: skip
def test_pairs_are_two_halves(kind: str, opcode: str) -> None:
    names = "abc" if "fma" in opcode else "ab"
    low, high = ({name: patterns(kind, n + s) for n, name in enumerate(names)} for s in (0, 9))
    both = {name: low[name].astype(np.uint32) | high[name].astype(np.uint32) << 16 for name in names}
    operands = ", ".join(names)
    pair = evaluate(f"{opcode.format('x2')} d, {operands};", {"d": np.uint32}, both)["d"]
    parts = [evaluate(f"{opcode.format('')} d, {operands};", {"d": np.uint16}, part)["d"] for part in (low, high)]
    assert (pair & 0xFFFF == parts[0]).all()
    assert (pair >> 16 == parts[1]).all()


def flush(x: Number) -> Number:
    if isinstance(x, str) or abs(x) >= Fraction(2) ** -126:
        return x
    return "-0" if x < 0 else Fraction(0)


def test_ftz_and_sat() -> None:
    def clamp(x: Number) -> Number:
        if x == "nan" or is_negative(x):
            return Fraction(0)
        return Fraction(1) if x == "inf" else min(x, Fraction(1))

    def flushed_product(a: Number, b: Number) -> Number:
        product = times(a, b)
        rounded = value_of(bits_of(product, "f32"), "f32")
        return flush(rounded)

    check("mul.ftz.f32", "f32", 2, flushed_product, before=flush)
    check("add.sat.f32", "f32", 2, add, after=clamp)
    check("fma.rn.sat.f16", "f16", 3, fused("rn"), after=clamp)


@pytest.mark.parametrize(
    ("opcode", "function"),
    [
        ("ex2.approx.f32", np.exp2), ("lg2.approx.f32", np.log2), ("rsqrt.approx.f32", lambda a: 1 / np.sqrt(a)),
        ("sqrt.approx.f32", np.sqrt), ("rcp.approx.f32", lambda a: 1 / a), ("sin.approx.f32", np.sin),
        ("cos.approx.f32", np.cos), ("tanh.approx.f32", np.tanh),
    ],
)  # fmt: skip
def test_approximations_are_rounded_correctly(opcode: str, function: Callable[..., Any]) -> None:
    a = np.random.default_rng(1).uniform(-8, 8, 256).astype(np.float32)
    a = np.abs(a) if any(word in opcode for word in ("lg2", "sqrt")) else a
    got = evaluate(f"{opcode} d, a;", {"d": np.float32}, {"a": a})["d"]
    assert (np.abs(got - function(a.astype(np.float64))) <= np.spacing(np.abs(got)) / 2 * 1.0001).all()


def test_division_variants() -> None:
    a, b = (np.random.default_rng(n).standard_normal(256).astype(np.float32) for n in range(2))
    b[:4] = 2.0**127
    a[:2] = np.inf
    got = evaluate("div.full.f32 d, a, b;\ndiv.approx.f32 e, a, b;", dict.fromkeys("de", np.float32), {"a": a, "b": b})
    assert (got["d"] == a / b).all()
    assert np.isnan(got["e"][:2]).all() and (got["e"][2:4] == 0).all()
    assert (got["e"][4:] == (a / b)[4:]).all()


# ---- conversions ----


@pytest.mark.parametrize("rounding", ["rn", "rz"])
@pytest.mark.parametrize("to", ["f16", "bf16"])
def test_f32_to_half(to: str, rounding: str) -> None:
    check(f"cvt.{rounding}.{to}.f32", "f32", 1, lambda a: a, rounding, to)
    relu = lambda x: Fraction(0) if is_negative(x) else x  # noqa: E731
    check(f"cvt.{rounding}.relu.{to}.f32", "f32", 1, lambda a: a, rounding, to, after=relu)
    operands = {"a": patterns("f32", 0), "b": patterns("f32", 1)}
    pair = evaluate(f"cvt.{rounding}.{to}x2.f32 d, a, b;", {"d": np.uint32}, operands)["d"]
    for half, name in ((pair >> 16, "a"), (pair & 0xFFFF, "b")):
        single = evaluate(f"cvt.{rounding}.{to}.f32 d, a;", {"d": np.uint16}, {"a": operands[name]})["d"]
        assert (half == single).all()


def test_conversions_agree_with_torch() -> None:
    """Where both name the same thing: to nearest even, and widening."""
    bits = patterns("f32", 4)
    values = torch.from_numpy(bits.view(np.float32).copy())
    number = ~torch.isnan(values)
    for name, dtype in (("bf16", torch.bfloat16), ("f16", torch.float16)):
        got = torch.from_numpy(evaluate(f"cvt.rn.{name}.f32 d, a;", {"d": np.uint16}, {"a": bits})["d"].view(np.int16))
        assert torch.equal(got[number], values.to(dtype).view(torch.int16)[number])
        half = np.arange(0, 65536, 37).astype(np.uint16)
        wide = evaluate(f"cvt.f32.{name} d, a;", {"d": np.float32}, {"a": half})["d"]
        assert np.array_equal(wide, torch.from_numpy(half.view(np.int16)).view(dtype).float().numpy(), equal_nan=True)


def test_more_conversions_between_formats() -> None:
    check("cvt.rna.tf32.f32", "f32", 1, tf32, "rn", "f32")
    for rounding in ROUNDINGS:
        check(f"cvt.{rounding}.f32.f64", "f64", 1, lambda a: a, rounding, "f32")
    check("cvt.f64.f32", "f32", 1, lambda a: a, "rn", "f64")
    check("cvt.rn.f16.f64", "f64", 1, lambda a: a, "rn", "f16")
    check("cvt.ftz.f32.f16", "f16", 1, lambda a: a, "rn", "f32")
    nan = evaluate("cvt.f32.bf16 d, a;", {"d": np.uint32}, {"a": np.array([0x7F81, 0xFFC3], np.uint16)})["d"]
    assert nan.tolist() == [0x7F810000, 0xFFC30000]


def tf32(a: Number) -> Number:
    """Ten bits of the mantissa, halves away from zero; what is left is an f32."""
    if isinstance(a, str):
        return a
    rounded = value_of(bits_of(a, "tf32", "rna"), "tf32")
    return "-0" if a < 0 and rounded == 0 else rounded


INTEGERS = {"u8": 8, "s8": 8, "u16": 16, "s16": 16, "u32": 32, "s32": 32, "u64": 64, "s64": 64}


@pytest.mark.parametrize("kind", ["f16", "f32", "f64"])
def test_floats_to_integers(kind: str) -> None:
    whole = {
        "rni": round, "rzi": int, "rmi": math.floor, "rpi": math.ceil,
    }  # fmt: skip
    a = patterns(kind, 0)
    for to, bits in INTEGERS.items():
        low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if to[0] == "s" else (0, 2**bits - 1)
        register = f"u{max(bits, 16) // 8}"
        for mode, f in whole.items():
            got = evaluate(f"cvt.{mode}.{to}.{kind} d, a;", {"d": register}, {"a": a})["d"]
            for lane, pattern in enumerate(a.tolist()):
                x = value_of(pattern, kind)
                want = {"nan": 0, "inf": high, "-inf": low, "-0": 0}.get(x) if isinstance(x, str) else f(x)
                assert want is not None
                want = max(low, min(high, want)) & (1 << max(bits, 16)) - 1
                assert int(got[lane]) == want, (mode, to, hex(pattern))


@pytest.mark.parametrize("to", ["f16", "bf16", "f32", "f64"])
def test_integers_to_floats(to: str) -> None:
    rng = np.random.default_rng(0)
    for source, bits in INTEGERS.items():
        dtype = np.dtype(f"u{max(bits, 16) // 8}")
        a = rng.integers(0, 2**bits, 96, dtype=np.uint64).astype(dtype)
        a[:4] = [0, 1, 2**bits - 1, 2 ** (bits - 1)]
        a[4:40] >>= dtype.type(bits // 2)
        for rounding in ROUNDINGS:
            got = evaluate(f"cvt.{rounding}.{to}.{source} d, a;", {"d": BITS[to]}, {"a": a})["d"]
            for lane, value in enumerate(a.tolist()):
                exact = value - (1 << bits) if source[0] == "s" and value >> (bits - 1) else value
                assert int(got[lane]) == bits_of(Fraction(exact), to, rounding), (source, rounding, value)


def test_integers_to_integers() -> None:
    rng = np.random.default_rng(0)
    for source, n in INTEGERS.items():
        a = rng.integers(0, 2**64, 64, dtype=np.uint64, endpoint=False).astype(f"u{max(n, 16) // 8}")
        for to, m in INTEGERS.items():
            width = max(m, 16)
            got = evaluate(
                f"cvt.{to}.{source} d, a;\ncvt.sat.{to}.{source} e, a;", dict.fromkeys("de", f"u{width // 8}"), {"a": a}
            )
            for lane, bits in enumerate(a.tolist()):
                bits &= (1 << n) - 1
                value = bits - (1 << n) if source[0] == "s" and bits >> (n - 1) else bits
                cut = value & (1 << m) - 1
                cut -= (1 << m) if to[0] == "s" and cut >> (m - 1) else 0
                low, high = (-(2 ** (m - 1)), 2 ** (m - 1) - 1) if to[0] == "s" else (0, 2**m - 1)
                assert int(got["d"][lane]) == cut & (1 << width) - 1
                assert int(got["e"][lane]) == max(low, min(high, value)) & (1 << width) - 1


def test_rounding_to_whole_numbers() -> None:
    a = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 0.49999997, -0.2, 1e30, 8388609.0, -np.inf], np.float32)
    text = "cvt.rni.f32.f32 d, a;\ncvt.rmi.f32.f32 e, a;\ncvt.rpi.f32.f32 f, a;\ncvt.rzi.f32.f32 g, a;"
    got = evaluate(text, dict.fromkeys("defg", np.float32), {"a": a})
    for name, f in zip("defg", (np.rint, np.floor, np.ceil, np.trunc), strict=True):
        assert (got[name].view(np.uint32) == f(a).view(np.uint32)).all(), name


# ---- comparisons ----

ORDERED = {"eq": np.equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}


@pytest.mark.parametrize("kind", ["f16", "bf16", "f32", "f64"])
def test_float_comparisons_and_nan(kind: str) -> None:
    a, b = patterns(kind, 0), patterns(kind, 1)
    b[::3] = a[::3]
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32, "f64": torch.float64}[kind]
    signed = {2: np.int16, 4: np.int32, 8: np.int64}[a.itemsize]
    x, y = (torch.from_numpy(v.view(signed).copy()).view(dtype).double().numpy() for v in (a, b))
    nan = np.isnan(x) | np.isnan(y)
    expected = {name: f(x, y) for name, f in ORDERED.items()}
    expected["ne"] = (x != y) & ~nan
    expected |= {f"{name}u": value | nan for name, value in expected.items()}
    expected |= {"num": ~nan, "nan": nan}
    for name, want in expected.items():
        got = evaluate(f"setp.{name}.{kind} d|e, a, b;", {"d": np.bool_, "e": np.bool_}, {"a": a, "b": b})
        assert (got["d"] == want).all(), name
        assert (got["e"] == ~want).all(), name


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32", "u64", "s64"])
def test_integer_comparisons(kind: str) -> None:
    rng = np.random.default_rng(0)
    dtype = {"u": np.dtype(f"u{int(kind[1:]) // 8}"), "s": np.dtype(f"i{int(kind[1:]) // 8}")}[kind[0]]
    a, b = (np.frombuffer(rng.bytes(128 * dtype.itemsize), dtype) for _ in range(2))
    b = np.where(np.arange(128) % 4 == 0, a, b)
    names = ORDERED | {"ne": np.not_equal}
    if kind[0] == "u":
        names |= {"lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}
    for name, f in names.items():
        got = evaluate(f"setp.{name}.{kind} d, a, b;", {"d": np.bool_}, {"a": a, "b": b})["d"]
        assert (got == f(a, b)).all(), name


def test_comparisons_that_combine_and_choose() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(-4, 4, (2, 128)).astype(np.int32)
    c = rng.integers(0, 2, 128).astype(np.bool_)
    operands = {"a": a, "b": b, "c": c}
    for name, f in (("and", np.logical_and), ("or", np.logical_or), ("xor", np.logical_xor)):
        got = evaluate(f"setp.lt.{name}.s32 d|e, a, b, !c;", {"d": np.bool_, "e": np.bool_}, operands)
        assert (got["d"] == f(a < b, ~c)).all()
        assert (got["e"] == f(a >= b, ~c)).all()
    got = evaluate("selp.b32 d, a, b, c;\nslct.s32.s32 e, a, b, a;\nset.lt.u32.s32 f, a, b;\nset.lt.f32.s32 g, a, b;",
                   {"d": np.int32, "e": np.int32, "f": np.uint32, "g": np.float32}, operands)  # fmt: skip
    assert (got["d"] == np.where(c, a, b)).all()
    assert (got["e"] == np.where(a >= 0, a, b)).all()
    assert (got["f"] == np.where(a < b, 0xFFFFFFFF, 0)).all()
    assert (got["g"] == (a < b)).all()


def test_comparisons_of_pairs_give_two_predicates() -> None:
    a, b = (patterns("bf16", n).astype(np.uint32) | patterns("bf16", n + 2).astype(np.uint32) << 16 for n in range(2))
    got = evaluate("setp.neu.bf16x2 d|e, a, b;", {"d": np.bool_, "e": np.bool_}, {"a": a, "b": b})
    for name, shift in (("d", 0), ("e", 16)):
        x, y = (((v >> shift & 0xFFFF) << 16).astype(np.uint32).view(np.float32) for v in (a, b))
        assert (got[name] == ~(x == y)).all()


def test_tests_and_signs() -> None:
    a, b = patterns("f32", 0), patterns("f32", 1)
    x = a.view(np.float32)
    tiny = np.finfo(np.float32).tiny
    kinds = {
        "finite": np.isfinite(x), "infinite": np.isinf(x), "number": ~np.isnan(x), "notanumber": np.isnan(x),
        "normal": np.isfinite(x) & (np.abs(x) >= tiny), "subnormal": (np.abs(x) < tiny) & (x != 0),
    }  # fmt: skip
    for name, want in kinds.items():
        assert (evaluate(f"testp.{name}.f32 d, a;", {"d": np.bool_}, {"a": a})["d"] == want).all(), name
    got = evaluate("copysign.f32 d, a, b;", {"d": np.uint32}, {"a": a, "b": b})["d"]
    assert (got == (a & 0x80000000) | (b & 0x7FFFFFFF)).all()
