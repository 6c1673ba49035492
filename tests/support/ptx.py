"""Small PTX kernels for tests of the PTX machine: one thread per element, operands from arrays."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from fractions import Fraction
from math import isqrt
from typing import Any

import numpy as np

BITS = {"pred": 8, "b16": 16, "b32": 32, "b64": 64}
WARP = 32
HEAD = ".version 8.8\n.target sm_90a\n.address_size 64\n"


def register(array: np.ndarray) -> str:
    """Return the type of the register that holds an element: a bool is a predicate."""
    return "pred" if array.dtype == np.bool_ else f"b{8 * array.itemsize}"


def module(text: str, name: str = "test") -> Any:
    from resnet_fast import _ptx

    return _ptx.Module(text if ".version" in text else HEAD + text, name)


def launch(
    text: str,
    arrays: Sequence[np.ndarray],
    numbers: Sequence[int] = (),
    *,
    kernel: str = "k",
    threads: int = WARP,
    blocks: int = 1,
    shared: int = 0,
    unwritten: Sequence[int] = (),
    **options: Any,
) -> Any:
    """Return the report of a launch with the arrays' addresses (allocations "0", "1", ...) and 32-bit numbers."""
    from resnet_fast import _ptx

    memory = _ptx.Memory()
    for i, array in enumerate(arrays):
        memory.add(array.ctypes.data, array.nbytes, str(i), written=i not in unwritten)
    parameters = [struct.pack("Q", array.ctypes.data) for array in arrays]
    parameters += [struct.pack("I", number & 0xFFFFFFFF) for number in numbers]
    return module(text).launch(
        kernel, (blocks, 1, 1), (threads, 1, 1), shared, parameters, memory, **{"limit": 10_000_000, **options}
    )


def kernel(body: str, pointers: int, numbers: int = 0, registers: str = "") -> str:
    """Return kernel ``k``: its parameters in %p0.. (64 bits) and %n0.. (32 bits), its thread in %t, its lane in %l."""
    names = [f".param .u64 P{i}" for i in range(pointers)] + [f".param .u32 N{i}" for i in range(numbers)]
    loads = "".join(f"ld.param.u64 %p{i}, [P{i}];\n" for i in range(pointers))
    loads += "".join(f"ld.param.u32 %n{i}, [N{i}];\n" for i in range(numbers))
    return (
        f"{HEAD}.visible .entry k({', '.join(names)})\n{{\n.reg .b64 %p<16>;\n.reg .b32 %n<16>;\n.reg .b32 %t, %l;\n"
        f".reg .b32 %i<4>;\n{registers}\n{loads}mov.u32 %t, %tid.x;\nmov.u32 %l, %laneid;\nmov.u32 %i0, %ctaid.x;\n"
        f"mov.u32 %i1, %ntid.x;\nmad.lo.s32 %t, %i0, %i1, %t;\n{body}\nret;\n}}\n"
    )


def evaluate(instruction: str, results: dict[str, Any], operands: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return what ``instruction`` leaves in the registers ``results`` (name to dtype), lane by lane.

    The operands are arrays of one length by register name; a bool is a predicate, and 8-bit numbers are in 16 bits.
    """
    n = len(next(iter(operands.values())))
    padded = -(-n // WARP) * WARP
    arrays: list[np.ndarray] = []
    declared, before, after = [], [], []
    for name, values in operands.items():
        at = len(arrays)
        arrays.append(np.concatenate([values, np.resize(values, padded - n)]))
        before.append(access("ld", name, arrays[-1], at))
        declared.append(f".reg .{register(values)} {name};")
    for name, dtype in results.items():
        at = len(arrays)
        arrays.append(np.zeros(padded, dtype))
        if name not in operands:
            declared.append(f".reg .{register(arrays[-1])} {name};")
        after.append(access("st", name, arrays[-1], at))
    registers = "\n".join(declared) + "\n.reg .b64 %a; .reg .b16 %flag;"
    text = kernel("\n".join([*before, instruction, *after]), len(arrays), registers=registers)
    threads = min(padded, 256)
    blocks = -(-padded // threads)
    if blocks * threads != padded:
        return {
            name: values[:n]
            for name, values in evaluate_padded(instruction, results, operands, blocks * threads).items()
        }
    launch(text, arrays, threads=threads, blocks=blocks)
    return {name: arrays[len(operands) + i][:n] for i, name in enumerate(results)}


def evaluate_padded(
    instruction: str, results: dict[str, Any], operands: dict[str, np.ndarray], n: int
) -> dict[str, np.ndarray]:
    """Return ``evaluate`` of operands that are repeated to ``n`` elements."""
    return evaluate(instruction, results, {name: np.resize(values, n) for name, values in operands.items()})


def access(opcode: str, name: str, array: np.ndarray, at: int) -> str:
    """Return the PTX that loads or stores this thread's element of parameter ``at``."""
    place = f"mul.wide.u32 %a, %t, {array.itemsize};\nadd.s64 %a, %a, %p{at};\n"
    if array.dtype != np.bool_:
        return place + (
            f"ld.global.{register(array)} {name}, [%a];"
            if opcode == "ld"
            else f"st.global.{register(array)} [%a], {name};"
        )
    if opcode == "ld":
        return place + f"ld.global.u8 %flag, [%a];\nsetp.ne.b16 {name}, %flag, 0;"
    return place + f"selp.b16 %flag, 1, 0, {name};\nst.global.u8 [%a], %flag;"


# ---- exact numbers ----

FORMATS = {"f16": (10, 5), "bf16": (7, 8), "f32": (23, 8), "tf32": (10, 8), "f64": (52, 11)}
"""Bits of the mantissa and of the exponent."""


def value_of(bits: int, name: str) -> Fraction | str:
    """Return the exact number that the bits stand for, or "nan", "inf", "-inf", "-0"."""
    mantissa, exponent = FORMATS[name]
    negative = bits >> (mantissa + exponent) & 1
    field, rest = bits >> mantissa & ((1 << exponent) - 1), bits & ((1 << mantissa) - 1)
    bias = (1 << (exponent - 1)) - 1
    if field == (1 << exponent) - 1:
        return "nan" if rest else "-inf" if negative else "inf"
    if field == 0 and rest == 0:
        return "-0" if negative else Fraction(0)
    significand = rest if field == 0 else rest | 1 << mantissa
    power = max(field, 1) - bias - mantissa
    value = significand * Fraction(2) ** power
    return -value if negative else value


def bits_of(value: Fraction | str, name: str, rounding: str = "rn", zero_sign: int = 0) -> int:
    """Return the bits of ``value`` rounded as PTX names it: rn, rz, rm, rp, rna. NaN is PTX's canonical one."""
    mantissa, exponent = FORMATS[name]
    sign_bit = 1 << (mantissa + exponent)
    infinity = ((1 << exponent) - 1) << mantissa
    if value == "nan":
        return {"f16": 0x7FFF, "bf16": 0x7FFF, "f64": 0x7FF8 << 48}.get(name, 0x7FFFFFFF)
    if value in ("inf", "-inf"):
        return infinity | (sign_bit if value == "-inf" else 0)
    if value == "-0":
        return sign_bit
    assert isinstance(value, Fraction)
    if value == 0:
        return sign_bit * zero_sign
    negative, size = value < 0, abs(value)
    bias = (1 << (exponent - 1)) - 1
    top = size.numerator.bit_length() - size.denominator.bit_length()
    top -= size < Fraction(2) ** top
    unit = Fraction(2) ** (max(top, 1 - bias) - mantissa)
    kept, rest = divmod(size, unit)
    rest /= unit
    up = {
        "rn": rest > Fraction(1, 2) or (rest == Fraction(1, 2) and kept % 2 == 1),
        "rna": rest >= Fraction(1, 2),
        "rz": False,
        "rm": rest > 0 and negative,
        "rp": rest > 0 and not negative,
    }[rounding]
    rounded = (kept + up) * unit
    if rounded >= Fraction(2) ** (bias + 1):
        to_infinity = (
            rounding in ("rn", "rna") or (rounding == "rp" and not negative) or (rounding == "rm" and negative)
        )
        bits = infinity if to_infinity else infinity - 1
    elif rounded < Fraction(2) ** (1 - bias):
        bits = int(rounded / unit)
    else:
        top = rounded.numerator.bit_length() - rounded.denominator.bit_length()
        top -= rounded < Fraction(2) ** top
        bits = ((top + bias) << mantissa) + int(rounded / Fraction(2) ** (top - mantissa)) - (1 << mantissa)
    return bits | (sign_bit if negative else 0)


def root(value: Fraction) -> Fraction:
    """Return the square root, exact or cut after 200 bits with a bit below that says so."""
    scaled = value * Fraction(4) ** 200
    whole = scaled.numerator // scaled.denominator
    found = isqrt(whole)
    exact = found * found == scaled
    return Fraction(2 * found + (not exact), 2**201)
