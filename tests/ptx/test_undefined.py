"""Which bits of a result are undefined: those, and only those, that differ between values of the undefined operands.

Each operation is run with random operands of which a few bits are undefined. Its results for all values of those bits
are computed by the same machine. A bit in which they differ must be reported when it is stored. Of operations that
move, choose or combine bits, and of comparisons, no other bit may be.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.ptx import WARP, evaluate, kernel, launch

MOST_OPEN = 3
"""Undefined bits of an operand."""

# name: instruction of operands %u, %v, %w (of the register class), whether exactly the bits that differ are undefined
OPERATIONS: dict[str, tuple[str, str, bool]] = {
    "and": ("b32", "and.b32 %d, %u, %v;", True),
    "or": ("b16", "or.b16 %d, %u, %v;", True),
    "xor": ("b32", "xor.b32 %d, %u, %v;", True),
    "not": ("b16", "not.b16 %d, %u;", True),
    "lop3": ("b32", "lop3.b32 %d, %u, %v, %w, 0x9a;", True),
    "shl": ("b32", "shl.b32 %d, %u, 5;", True),
    "shr": ("b32", "shr.u32 %d, %u, 7;", True),
    "shr with sign": ("b16", "shr.s16 %d, %u, 3;", True),
    "shf": ("b32", "shf.l.wrap.b32 %d, %u, %v, 11;", True),
    "bfe": ("b32", "bfe.s32 %d, %u, 3, 9;", True),
    "bfi": ("b32", "bfi.b32 %d, %u, %v, 6, 12;", True),
    "brev": ("b32", "brev.b32 %d, %u;", True),
    "prmt": ("b32", "prmt.b32 %d, %u, %v, 0x7A41;", True),
    "prmt by register": ("b32", "and.b32 %w, %w, 0; or.b32 %w, %w, 0x3276; prmt.b32 %d, %u, %v, %w;", True),
    "szext": ("b32", "szext.clamp.s32 %d, %u, 13;", True),
    "mov": ("b32", "mov.b32 %d, %u; mov.b32 %d, %d;", True),
    "halves": ("b32", "mov.b32 {%h, %g}, %u; mov.b32 %d, {%g, %h};", True),
    "cvt to 16": ("b32", "cvt.u16.u32 %h, %u; cvt.u32.u16 %d, %h;", True),
    "cvt with sign": ("b32", "cvt.u16.u32 %h, %u; cvt.s32.s16 %d, %h;", True),
    "cvt of a byte": ("b32", "cvt.s32.s8 %d, %u;", True),
    "selp": ("b32", "setp.lt.u32 %yes, %l, 12; selp.b32 %d, %u, %v, %yes;", True),
    "slct": ("b32", "slct.b32.s32 %d, %u, %v, -1;", True),
    "shared memory": (
        "b32", "st.shared.v2.b32 [%s], {%u, %v}; ld.shared.v2.b32 {%x, %y}, [%s]; prmt.b32 %d, %x, %y, 0x6521;", False,
    ),
    "byte": ("b32", "cvt.u16.u32 %h, %u; st.shared.b8 [%s], %h; ld.shared.u8 %d, [%s];", False),
    "shfl": ("b32", "shfl.sync.bfly.b32 %d, %u, 0, 31, 0xffffffff;", True),
    "pack": ("b32", "cvt.rn.bf16x2.f32 %d, %u, %v;", False),
    "add": ("b32", "add.s32 %d, %u, %v;", False),
    "sub": ("b16", "sub.s16 %d, %u, %v;", False),
    "mul": ("b32", "mul.lo.s32 %d, %u, %v;", False),
    "mul of 16": ("b16", "mul.lo.s16 %d, %u, 57;", False),
    "mad": ("b32", "mad.lo.s32 %d, %u, %v, %w;", False),
    "neg": ("b32", "neg.s32 %d, %u;", False),
    "min": ("b32", "min.s32 %d, %u, %v;", False),
    "float": ("b32", "add.f32 %d, %u, %v;", False),
    "eq": ("b32", "setp.eq.s32 %yes, %u, %v; selp.b32 %d, 1, 0, %yes;", True),
    "ne": ("b16", "setp.ne.b16 %yes, %u, 15; selp.b16 %d, 1, 0, %yes;", True),
    "lt": ("b32", "setp.lt.s32 %yes, %u, %v; selp.b32 %d, 1, 0, %yes;", True),
    "gt -1": ("b32", "setp.gt.s32 %yes, %u, -1; selp.b32 %d, 1, 0, %yes;", True),
    "hs": ("b16", "setp.hs.u16 %yes, %u, %v; selp.b16 %d, 1, 0, %yes;", True),
    "eq and": (
        "b32", "setp.lt.u32 %q, %w, 77; setp.eq.and.b32 %yes, %u, %v, %q; selp.b32 %d, 1, 0, %yes;", True,
    ),
    "undefined choice": ("b32", "setp.lt.u32 %yes, %w, 77; selp.b32 %d, 0x5a3, 0x593, %yes;", True),
}  # fmt: skip


def operands(bits: int, near: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return values and masks of undefined bits, (3, WARP). ``near``: the values differ in few bits, or in none."""
    rng = np.random.default_rng(bits + near)
    dtype = np.uint16 if bits == 16 else np.uint32
    values = rng.integers(0, 1 << bits, (3, WARP), dtype=np.uint64)
    places = rng.integers(0, bits, (MOST_OPEN, 3, WARP), dtype=np.uint64)
    if near:
        values = (values & 3) + 12 + (values >> (bits - 1) << (bits - 1))
        places = np.where(places == 5, bits - 1, places & 3)
    chosen = rng.random((MOST_OPEN, 3, WARP)) < 0.3
    masks = np.bitwise_or.reduce(np.where(chosen, np.uint64(1) << places, 0).astype(np.uint64))
    masks[:, :4] = 0
    return values.astype(dtype), masks.astype(dtype)


def executed(instruction: str, kind: str) -> str:
    """Return the instruction after what declares its registers, and this thread's place in shared memory."""
    return (
        f".reg .b32 %x, %y, %s; .reg .b16 %h, %g; .reg .pred %yes, %q; .shared .align 8 .b8 memory[2048];"
        f"mov.u32 %s, %tid.x; mov.u32 %x, memory; mad.lo.s32 %s, %s, 8, %x; {instruction}"
    )


def reported(instruction: str, kind: str, values: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Return the bits of each lane's result that are a finding when they alone are stored."""
    bytes_, bits = values.itemsize, 8 * values.itemsize
    declared = f".reg .{kind} %u, %v, %w, %d, %none, %m; .reg .b64 %at;"
    load = f"mul.wide.u32 %at, %t, {bytes_};\nadd.s64 %at, %at, %p0;\n"
    for n, name in enumerate("uvw"):
        load += f"ld.global.{kind} %{name}, [%at+{2 * n * WARP * bytes_}];\n"
        load += f"ld.global.{kind} %m, [%at+{(2 * n + 1) * WARP * bytes_}];\n"
        load += f"and.{kind} %m, %none, %m;\nor.{kind} %{name}, %{name}, %m;\n"
    stores = "".join(f"and.{kind} %m, %d, {1 << bit}; st.global.{kind} [%p1], %m; // {bit}\n" for bit in range(bits))
    text = kernel(load + executed(instruction, kind) + "\n" + stores, 2, registers=declared)
    first = next(n for n, line in enumerate(text.splitlines(), 1) if line.endswith("// 0"))
    arrays = [np.stack([values & ~masks, masks], 1).reshape(-1), np.zeros(1, values.dtype)]
    found = np.zeros(WARP, values.dtype)
    for finding in launch(text, arrays, strict=False).findings:
        assert "stores a value to global memory" in finding["what"], finding
        found[finding["lane"]] |= values.dtype.type(1 << (finding["line"] - first))
    return found


def differing(instruction: str, kind: str, values: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Return the bits of each lane's result that differ between values of the undefined bits."""
    places = [[(n, k) for n in range(3) for k in range(8 * values.itemsize) if mask[n] >> k & 1] for mask in masks.T]
    cases = np.tile(values & ~masks, (1 << max(map(len, places)), 1, 1))
    for lane, place in enumerate(places):
        for k, (n, bit) in enumerate(place):
            cases[:, n, lane] |= ((np.arange(len(cases)) >> k & 1) << bit).astype(values.dtype)
    given = {f"%{name}": np.ascontiguousarray(cases[:, n]).reshape(-1) for n, name in enumerate("uvw")}
    results = evaluate(executed(instruction, kind), {"%d": values.dtype}, given)["%d"].reshape(len(cases), WARP)
    return np.bitwise_or.reduce(results) & np.bitwise_or.reduce(~results)


@pytest.mark.parametrize("near", [False, True], ids=["anywhere", "near"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_undefined_bits_of_a_result(name: str, near: bool) -> None:
    kind, instruction, exact = OPERATIONS[name]
    values, masks = operands(int(kind[1:]), near)
    expected, found = differing(instruction, kind, values, masks), reported(instruction, kind, values, masks)
    missed, extra = expected & ~found, found & ~expected
    assert not missed.any(), [f"lane {lane}: {missed[lane]:x} of {expected[lane]:x}" for lane in missed.nonzero()[0]]
    if exact:
        assert not extra.any(), [f"lane {lane}: {extra[lane]:x}" for lane in extra.nonzero()[0]]
    assert not found[(masks == 0).all(0)].any()
