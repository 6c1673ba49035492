"""ldmatrix, stmatrix and mma.sync against NumPy, and mistakes with them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.support.fragments import from_lanes, mma_a, mma_b, mma_d, to_lanes
from tests.support.ptx import HEAD, launch

RNG = np.random.default_rng(0)


def rounded(dtype: str, *shape: int) -> tuple[np.ndarray, np.ndarray]:
    """Return random numbers of a PTX type as bits, and in fp64."""
    values = torch.from_numpy(RNG.standard_normal(shape).astype(np.float32))
    if dtype == "tf32":
        bits = values.numpy().view(np.uint32)
        return bits, (bits & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)
    narrow = values.to({"bf16": torch.bfloat16, "f16": torch.float16}[dtype])
    return narrow.view(torch.int16).numpy().view(np.uint16), narrow.double().numpy()


def registers(name: str, count: int) -> str:
    return "{" + ", ".join(f"%{name}{i}" for i in range(count)) + "}"


def product(shape: str, dtype: str, words: int, edit=("", "")) -> str:
    """A kernel that loads fragments (registers, lanes) of a, b, c and stores d."""
    body = ""
    for operand, name, count in ((0, "a", words), (1, "b", words // 2), (2, "c", 4)):
        for i in range(count):
            body += f"ld.global.b32 %{name}{i}, [%p{operand}+{128 * i}];\n"
    d, a, b, c = registers("c", 4), registers("a", words), registers("b", words // 2), registers("c", 4)
    body += f"mma.sync.aligned.{shape}.row.col.f32.{dtype}.{dtype}.f32 {d}, {a}, {b}, {c};\n"
    for i in range(4):
        body += f"st.global.b32 [%p3+{128 * i}], %c{i};\n"
    return warp_kernel(body, 4, ".reg .b32 %a<4>, %b<4>, %c<4>;").replace(*edit)


def warp_kernel(body: str, pointers: int, declared: str, shared: int = 0) -> str:
    """Kernel ``k`` of one warp: %p0.. point to this lane's word of each array, %l is the lane, %s the shared memory."""
    text = f"{HEAD}.visible .entry k({', '.join(f'.param .u64 P{i}' for i in range(pointers))})\n{{\n"
    text += f".reg .b64 %p<8>, %o;\n.reg .b32 %l, %s, %x<8>;\n.reg .pred %q<4>;\n{declared}\n"
    if shared:
        text += f".shared .align 1024 .b8 memory[{shared}];\nmov.u32 %s, memory;\n"
    text += "mov.u32 %l, %tid.x;\nmul.wide.u32 %o, %l, 4;\n"
    for i in range(pointers):
        text += f"ld.param.u64 %p{i}, [P{i}];\nadd.s64 %p{i}, %p{i}, %o;\n"
    return text + body + "ret;\n}\n"


@pytest.mark.parametrize(
    ("depth", "dtype"), [(16, "bf16"), (16, "f16"), (8, "bf16"), (8, "f16"), (8, "tf32"), (4, "tf32")]
)
def test_mma(depth: int, dtype: str) -> None:
    bits = 32 if dtype == "tf32" else 16
    a, wide_a = rounded(dtype, 16, depth)
    b, wide_b = rounded(dtype, depth, 8)
    c = RNG.standard_normal((16, 8)).astype(np.float32)
    out = np.zeros((4, 32), np.uint32)
    arrays = [to_lanes(a, mma_a(depth, bits)), to_lanes(b, mma_b(depth, bits)), to_lanes(c, mma_d()), out]
    report = launch(product(f"m16n8k{depth}", dtype, len(arrays[0])), arrays)
    exact = wide_a @ wide_b + c
    bound = depth * 2.0**-24 * (np.abs(wide_a) @ np.abs(wide_b) + np.abs(c))  # emulator/product.h
    assert (np.abs(from_lanes(out, mma_d(), (16, 8)) - exact) <= bound).all()
    assert report.counters["events"]["mma_multiply_adds"] == 16 * 8 * depth


def test_mma_overflows_and_carries_nan() -> None:
    a, b, c = np.zeros((16, 16), np.uint16), np.zeros((16, 8), np.uint16), np.zeros((16, 8), np.float32)
    a[0, 0], b[0, 0] = 0x7BFF, 0x7BFF  # 65504, whose square fp32 holds
    a[1, 0], b[0, 1] = 0x7C00, 0  # infinity times zero
    c[2, 2] = np.float32(3e38)
    out = np.zeros((4, 32), np.uint32)
    arrays = [to_lanes(a, mma_a(16, 16)), to_lanes(b, mma_b(16, 16)), to_lanes(c, mma_d()), out]
    launch(product("m16n8k16", "f16", 4), arrays)
    d = from_lanes(out, mma_d(), (16, 8))
    assert d[0, 0] == np.float32(65504.0**2)
    assert np.isposinf(d[1, 0]) and np.isnan(d[1, 1])
    assert d[2, 2] == np.float32(3e38)


def moved(matrices: int, transposed: bool, shared: int = 2048) -> str:
    """Words of shared memory, 1024 in rows of 16 bytes, by ldmatrix to registers, and by stmatrix to other rows."""
    modifier = f"x{matrices}" + (".trans" if transposed else "")
    body = ""
    for i in range(4):
        body += f"ld.global.b32 %r{i}, [%p0+{128 * i}];\nshl.b32 %x0, %l, 2;\nadd.s32 %x0, %x0, %s;\n"
        body += f"st.shared.b32 [%x0+{128 * i}], %r{i};\n"
    body += "bar.warp.sync 0xffffffff;\nshl.b32 %x1, %l, 4;\nadd.s32 %x1, %x1, %s;\n"
    vector = registers("r", matrices)
    body += f"ldmatrix.sync.aligned.m8n8.{modifier}.shared.b16 {vector}, [%x1];\n"
    body += f"stmatrix.sync.aligned.m8n8.{modifier}.shared.b16 [%x1+1024], {vector};\nbar.warp.sync 0xffffffff;\n"
    for i in range(matrices):
        body += f"st.global.b32 [%p1+{128 * i}], %r{i};\n"
        body += f"ld.shared.b32 %x2, [%x0+{1024 + 128 * i}];\nst.global.b32 [%p2+{128 * i}], %x2;\n"
    return warp_kernel(body, 3, ".reg .b32 %r<4>;", shared)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("matrices", [1, 2, 4])
def test_ldmatrix_and_stmatrix(matrices: int, transposed: bool) -> None:
    words = RNG.integers(0, 1 << 32, (4, 32), dtype=np.uint32)
    registers, back = np.zeros((matrices, 32), np.uint32), np.zeros((matrices, 32), np.uint32)
    report = launch(moved(matrices, transposed), [words, registers, back])
    for m in range(matrices):
        matrix = words.view(np.uint16).reshape(4, 8, 8)[m]
        expected = np.ascontiguousarray(matrix.T if transposed else matrix).view(np.uint32).reshape(32)
        np.testing.assert_array_equal(registers[m], expected)  # lane l holds words 2 (l % 4) .. of row l / 4
    np.testing.assert_array_equal(back, words[:matrices])
    assert all(line["conflicts"] == 0 for line in report.counters["lines"].values())


@pytest.mark.parametrize(
    ("old", "new", "report"),
    [
        ("bar.warp.sync 0xffffffff;\nshl", "shl", "another lane of this warp wrote"),
        ("[%x1];", "[%x1+1024];", "which nobody has written"),
        ("[%x1];", "[%x1+8];", "not aligned to 16 bytes"),
        ("[%x1];", "[%x1+2048];", "of a block that has 2048"),
        ("ldmatrix", "setp.eq.u32 %q0, %l, 3;\n@!%q0 ldmatrix", "aligned"),
    ],
)
def test_mistakes_with_matrices(old: str, new: str, report: str) -> None:
    from resnet_fast import _ptx

    text = moved(4, False)
    assert old in text
    out = np.zeros((4, 32), np.uint32)
    with pytest.raises(_ptx.Fault, match=report):
        launch(text.replace(old, new, 1), [np.zeros((4, 32), np.uint32), out, out.copy()])


@pytest.mark.parametrize(
    ("load", "row", "column"),
    [("ld.global.b32 %a1, [%p0+128];\n", 8, None), ("ld.global.b32 %b0, [%p1+0];\n", None, 0)],
)
def test_undefined_operands(load: str, row: int | None, column: int | None) -> None:
    """Row 8 of a, or column 0 of b, is undefined, and so are that row or column of d: these may not be stored."""
    from resnet_fast import _ptx

    text = product("m16n8k16", "bf16", 4).replace(load, f"setp.ge.u32 %q0, %l, 4;\n@%q0 {load}")
    arrays = [np.zeros((4, 32), np.uint32) for _ in range(4)]
    rows, columns = mma_d()
    undefined = (rows == row) | (columns == column)
    for value in range(4):
        only = "\n".join(line for line in text.split("\n") if "st.global" not in line or f"+{128 * value}]" in line)
        bad = np.flatnonzero(undefined[:, value])
        mask = 0xFFFFFFFF ^ sum(1 << int(lane) for lane in bad)
        defined = f"mov.u32 %x0, {mask};\nshr.u32 %x0, %x0, %l;\nand.b32 %x0, %x0, 1;\nsetp.ne.u32 %q1, %x0, 0;\n"
        launch(only.replace("st.global", f"{defined}@%q1 st.global"), arrays)
        if len(bad):
            with pytest.raises(_ptx.Fault, match="stores a value to global memory that was never written") as fault:
                launch(only, arrays)
            assert fault.value.lane == bad[0]


def test_a_fragment_of_the_wrong_size() -> None:
    from resnet_fast import _ptx

    text = product("m16n8k16", "bf16", 4, ("{%b0, %b1}", "{%b0}"))
    with pytest.raises(_ptx.PtxError, match="expected 2 registers in an operand of mma"):
        launch(text, [np.zeros((4, 32), np.uint32) for _ in range(4)])
