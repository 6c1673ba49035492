"""wgmma against NumPy for every layout of its operands, and mistakes with it."""

from __future__ import annotations

import re
import struct

import numpy as np
import pytest

from tests.ptx.test_matrix import registers, rounded
from tests.support.fragments import from_lanes, to_lanes, wgmma_a, wgmma_d
from tests.support.ptx import HEAD, module

A_AT, B_AT, SHARED = 0, 16384, 49152
CHUNK = 16


def placed(matrix: np.ndarray, swizzle: int, across: bool) -> tuple[np.ndarray, int, int]:
    """Return the bytes of an operand (rows, depth) in shared memory, its leading and its stride dimension in bytes.

    CuTe's canonical layouts, with the swizzle's pitch in bytes (16: none): k along the rows, or ``across`` them.
    """
    matrix = np.ascontiguousarray(matrix.T) if across else matrix  # the second index is contiguous within a chunk
    outer, inner = matrix.shape
    each = CHUNK // matrix.itemsize
    chunks = matrix.reshape(outer, inner // each, each).view(np.uint8).reshape(outer, inner // each, CHUNK)
    pitch, span = swizzle, swizzle // CHUNK
    if swizzle == CHUNK:  # core matrices of 8 x 16 bytes, one after another, the chunks of a row 128 bytes apart
        near, far = 128, 128 * (inner // each)
        leading, stride = (far, near) if across else (near, far)
    else:  # atoms of eight rows of the pitch; those along the inner dimension first
        near, far = 8 * pitch, 8 * pitch * -(-inner // (span * each))
        leading, stride = near, far
    out = np.zeros(32768, np.uint8)
    for row in range(outer):
        for chunk in range(inner // each):
            at = row // 8 * far + row % 8 * pitch + chunk // span * near + chunk % span * CHUNK
            at ^= (at >> 7 & (span - 1)) << 4
            out[at : at + CHUNK] = chunks[row, chunk]
    return out, leading, stride


def descriptor(at: int, leading: int, stride: int, swizzle: int) -> int:
    mode = {16: 0, 128: 1, 64: 2, 32: 3}[swizzle]
    return (at >> 4) | (leading >> 4) << 16 | (stride >> 4) << 32 | mode << 62


def kernel(
    columns: int, dtype: str, in_registers: bool, transposed=(0, 0), scale: str = "1", negate=(1, 1), products: int = 1
) -> str:
    """d = a . b + c: P0 goes to shared memory; registers of a come from P1, of c from P2, of d go to P3, a row each."""
    depth, bits = (8, 32) if dtype == "tf32" else (16, 16)
    words = 4
    d = registers("d", columns // 2)
    a = registers("a", words) if in_registers else "%da"
    tail = f", {negate[0]}, {negate[1]}"
    if bits == 16:
        tail += f", {transposed[1]}" if in_registers else f", {transposed[0]}, {transposed[1]}"
    text = f"""{HEAD}.visible .entry k(.param .u64 P0, .param .u64 P1, .param .u64 P2, .param .u64 P3,
    .param .u64 DA, .param .u64 DB)
{{
.reg .b64 %p<4>, %o, %da, %db;
.reg .b32 %t, %at, %x<4>, %a<4>, %d<{columns // 2}>, %i;
.reg .pred %q, %scale;
.shared .align 1024 .b8 memory[{SHARED}];
ld.param.u64 %p0, [P0]; ld.param.u64 %p1, [P1]; ld.param.u64 %p2, [P2]; ld.param.u64 %p3, [P3];
ld.param.u64 %da, [DA]; ld.param.u64 %db, [DB];
mov.u32 %t, %tid.x;
mul.wide.u32 %o, %t, 16; add.s64 %p0, %p0, %o;
mul.wide.u32 %o, %t, 4; add.s64 %p1, %p1, %o; add.s64 %p2, %p2, %o; add.s64 %p3, %p3, %o;
shl.b32 %at, %t, 4;
mov.u32 %i, 0;
fill:
ld.global.v4.b32 {{%x0, %x1, %x2, %x3}}, [%p0];
st.shared.v4.b32 [%at], {{%x0, %x1, %x2, %x3}};
add.s64 %p0, %p0, 2048;
add.s32 %at, %at, 2048;
add.s32 %i, %i, 1;
setp.lt.u32 %q, %i, {SHARED // 2048};
@%q bra fill;
"""
    text += "".join(f"ld.global.b32 %a{i}, [%p1+{512 * i}];\n" for i in range(words) if in_registers)
    text += "".join(f"ld.global.b32 %d{i}, [%p2+{512 * i}];\n" for i in range(columns // 2))
    text += "fence.proxy.async.shared::cta;\nbar.sync 0;\n"
    text += f"setp.ne.u32 %scale, {scale}, 0;\n" if scale != "0" else ""
    text += "wgmma.fence.sync.aligned;\n"
    one = f"wgmma.mma_async.sync.aligned.m64n{columns}k{depth}.f32.{dtype}.{dtype} {d}, {a}, %db, "
    text += (one + ("0" if scale == "0" else "%scale") + tail + ";\n") * products
    text += "wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;\n"
    text += "".join(f"st.global.b32 [%p3+{512 * i}], %d{i};\n" for i in range(columns // 2))
    return text + "ret;\n}\n"


class Product:
    """Operands of one wgmma, placed in shared memory or registers, and its launch."""

    def __init__(self, columns=64, dtype="bf16", swizzle=(128, 128), across=(False, False), in_registers=False) -> None:
        self.columns, self.in_registers = columns, in_registers
        depth, bits = (8, 32) if dtype == "tf32" else (16, 16)
        self.raw_a, self.a = rounded(dtype, 64, depth)
        self.raw_b, self.b = rounded(dtype, columns, depth)
        self.c = np.random.default_rng(1).standard_normal((64, columns)).astype(np.float32)
        self.memory = np.zeros(SHARED, np.uint8)
        placed_a, *a_strides = placed(self.raw_a, swizzle[0], across[0])
        placed_b, *b_strides = placed(self.raw_b, swizzle[1], across[1])
        self.memory[:B_AT], self.memory[B_AT:] = placed_a[:B_AT], placed_b
        self.descriptors = (descriptor(A_AT, *a_strides, swizzle[0]), descriptor(B_AT, *b_strides, swizzle[1]))
        self.fragments = to_lanes(self.raw_a, wgmma_a(bits)) if in_registers else np.zeros((4, 128), np.uint32)

    def launch(self, text: str, threads: int = 128, seed: int = 0, descriptors=None):
        from resnet_fast import _ptx

        out = np.zeros((self.columns // 2, 128), np.uint32)
        arrays = [self.memory, self.fragments, to_lanes(self.c, wgmma_d(self.columns)), out]
        memory = _ptx.Memory()
        for i, array in enumerate(arrays):
            memory.add(array.ctypes.data, array.nbytes, str(i))
        numbers = [*(array.ctypes.data for array in arrays), *(descriptors or self.descriptors)]
        parameters = [struct.pack("Q", number) for number in numbers]
        self.report = module(text).launch(
            "k", (1, 1, 1), (threads, 1, 1), 0, parameters, memory, seed=seed, limit=1_000_000
        )
        return from_lanes(out, wgmma_d(self.columns), (64, self.columns))

    def check(self, d: np.ndarray, factor: float = 1.0, c: float = 1.0) -> None:
        exact = factor * (self.a @ self.b.T) + c * self.c
        terms = abs(factor) * (np.abs(self.a) @ np.abs(self.b).T) + c * np.abs(self.c)
        depth = self.a.shape[1]
        assert (np.abs(d - exact) <= abs(factor) * depth * 2.0**-24 * terms).all()  # emulator/product.h


@pytest.mark.parametrize("dtype", ["bf16", "f16", "tf32"])
@pytest.mark.parametrize("columns", [8, 16, 32, 64, 128, 256])
def test_every_number_of_columns(columns: int, dtype: str) -> None:
    p = Product(columns, dtype)
    p.check(p.launch(kernel(columns, dtype, False)))
    events = p.report.counters["events"]
    assert events["wgmma"] == 1 and events["wgmma_multiply_adds"] == 64 * columns * p.a.shape[1]


@pytest.mark.parametrize("dtype", ["bf16", "tf32"])
def test_operand_a_from_registers(dtype: str) -> None:
    p = Product(32, dtype, in_registers=True)
    p.check(p.launch(kernel(32, dtype, True)))


@pytest.mark.parametrize("across", [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize("swizzle", [16, 32, 64, 128])
def test_layouts_of_operands(swizzle: int, across: tuple[bool, bool]) -> None:
    p = Product(128, "f16", (swizzle, swizzle), across)
    p.check(p.launch(kernel(128, "f16", False, tuple(map(int, across)))))


def test_a_transposed_b_with_a_in_registers() -> None:
    p = Product(64, "bf16", (128, 64), (False, True), in_registers=True)
    p.check(p.launch(kernel(64, "bf16", True, (0, 1))))


@pytest.mark.parametrize("swizzle", [16, 32, 64])
def test_layouts_of_tf32(swizzle: int) -> None:
    p = Product(64, "tf32", (swizzle, swizzle))
    p.check(p.launch(kernel(64, "tf32", False)))


@pytest.mark.parametrize("scale", ["0", "%tid.y"])
def test_without_accumulation(scale: str) -> None:
    p = Product()
    p.check(p.launch(kernel(64, "bf16", False, scale=scale)), c=0.0)


@pytest.mark.parametrize("negate", [(-1, 1), (1, -1), (-1, -1)])
def test_signs_of_operands(negate: tuple[int, int]) -> None:
    p = Product()
    p.check(p.launch(kernel(64, "bf16", False, negate=negate)), float(negate[0] * negate[1]))


def test_products_of_one_group_add_up() -> None:
    p = Product()
    p.check(p.launch(kernel(64, "bf16", False, products=3)), 3.0)


def test_schedules_agree() -> None:
    p = Product(in_registers=True)
    results = [p.launch(kernel(64, "bf16", True), seed=seed) for seed in range(3)]
    assert all((results[0] == other).all() for other in results)


WAIT = "wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;\n"
COMMIT = "wgmma.commit_group.sync.aligned;\n"
MISTAKES = {
    "accumulator read before the wait": (
        WAIT,
        COMMIT + "add.s32 %x0, %d3, 1;\n" + WAIT,
        "register %d3, which a product in",
    ),
    "copy of an accumulator read before the wait": (
        WAIT,
        COMMIT + "mov.b32 %x0, %d3;\nadd.s32 %x1, %x0, 1;\n" + WAIT,
        "register %x0, which a product in",
    ),
    "another value in the place of an accumulator": (
        WAIT,
        COMMIT + "mov.b32 %x0, %d3;\nmov.b32 %d3, %t;\n" + WAIT,
        "register %d3, which a product in",
    ),
    "accumulator written before the wait": (
        WAIT,
        COMMIT + "mov.b32 %d3, 0;\n" + WAIT,
        "register %d3, which a product in",
    ),
    "operand a written before the wait": (
        WAIT,
        COMMIT + "mov.b32 %a1, 0;\n" + WAIT,
        "register %a1, which a product in",
    ),
    "operand a read before the wait": (WAIT, COMMIT + "mov.b32 %x0, %a1;\n" + WAIT, "register %a1, which a product in"),
    "no wait": (WAIT, COMMIT, "register %d0, which a product in flight"),
    "wait for one group too few": ("wait_group.sync.aligned 0", "wait_group.sync.aligned 1", "register %d0, which a"),
    "not committed": (WAIT, "wgmma.wait_group.sync.aligned 0;\n", "register %d0, which a product in flight"),
    "no wgmma.fence": ("wgmma.fence.sync.aligned;\n", "", "no wgmma.fence came before"),
    "accumulator written after the fence": (
        "wgmma.fence.sync.aligned;\n",
        "wgmma.fence.sync.aligned;\nadd.f32 %d5, %d5, %d5;\n",
        "register %d5, which was written after the last wgmma.fence",
    ),
    "operand a written after the fence": (
        "wgmma.fence.sync.aligned;\n",
        "wgmma.fence.sync.aligned;\nadd.s32 %a2, %a2, 1;\n",
        "register %a2, which was written after the last wgmma.fence",
    ),
    "no fence between proxies": (
        "fence.proxy.async.shared::cta;\n",
        "",
        r"multiplies shared memory byte \d+, which warp \d lane \d+ wrote at line \d+, and no fence.proxy",
    ),
    "fence before the write": (
        "mov.u32 %i, 0;",
        "fence.proxy.async.shared::cta;\nmov.u32 %i, 0;",
        None,
    ),
    "no barrier": ("bar.sync 0;\n", "", "which nobody has written|wrote at line .* no barrier orders the two"),
    "bytes overwritten before the wait": (
        WAIT,
        COMMIT + "sub.s32 %at, %at, 32768;\nst.shared.b32 [%at], %t;\n" + WAIT,
        r"writes shared memory byte \d+, which a wgmma at line \d+ still reads: wait for it first",
    ),
    "bytes overwritten before the others' wait": (
        WAIT,
        WAIT + "sub.s32 %at, %at, 32768;\nst.shared.b32 [%at], %t;\n",
        "still reads: wait for it first|and no barrier orders the two",
    ),
    "lanes that part": (
        "wgmma.fence.sync.aligned;\n",
        "wgmma.fence.sync.aligned;\nsetp.lt.u32 %q, %t, 40;\n@%q bra over;\n",
        "aligned|executed by 2 of the four warps",
    ),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_mistake(what: str) -> None:
    from resnet_fast import _ptx

    old, new, report = MISTAKES[what]
    p = Product(in_registers=True)
    text = kernel(64, "bf16", True)
    assert old in text
    text = text.replace(old, new, 1)
    if what == "fence before the write":
        text = text.replace("fence.proxy.async.shared::cta;\nbar", "bar")
        report = "no fence.proxy.async follows"
    if what == "lanes that part":
        text = text.replace(WAIT, WAIT + "over:\n")
    with pytest.raises(_ptx.Fault, match=report):
        p.launch(text)


def test_accumulators_change_names_before_the_wait() -> None:
    """As at the end of a compiled loop."""
    p = Product(in_registers=True)
    names = "mov.b32 %x0, %d3;\nmov.b32 %d3, %d4;\nmov.b32 %d4, %x0;\n"
    text = kernel(64, "bf16", True).replace(WAIT, COMMIT + names + WAIT.removeprefix(COMMIT) + names)
    p.check(p.launch(text))


def test_copies_of_registers_between_fence_and_product() -> None:
    """Compilers leave them there: of accumulators, and packed operands."""
    p = Product(in_registers=True)
    copies = "mov.b32 %d5, %x1;\nmov.b32 {%h0, %h1}, %a2;\nmov.b32 %a2, {%h0, %h1};\n"
    text = kernel(64, "bf16", True).replace("wgmma.fence", "mov.b32 %x1, %d5;\nmov.b32 %d5, 0;\nwgmma.fence")
    text = text.replace("wgmma.mma_async", copies + "wgmma.mma_async").replace(
        ".reg .pred", ".reg .b16 %h<2>;\n.reg .pred"
    )
    p.check(p.launch(text))


def test_a_fence_by_another_warp_after_the_barrier() -> None:
    """A fence orders what its thread knows of, so it may come after the barrier."""
    p = Product()
    text = kernel(64, "bf16", False)
    fence = "fence.proxy.async.shared::cta;\nbar.sync 0;\n"
    p.check(p.launch(text.replace(fence, "bar.sync 0;\nfence.proxy.async.shared::cta;\n")))
    one = "bar.sync 0;\nsetp.lt.u32 %q, %t, 32;\n@%q fence.proxy.async.shared::cta;\nbar.sync 0;\n"
    p.check(p.launch(text.replace(fence, one)))


@pytest.mark.parametrize(
    ("change", "report"),
    [
        (lambda d: d + (64 >> 4), None),
        (lambda d: d ^ 3 << 62, None),
        (lambda d: d + (512 >> 4), "do not start where the swizzle's pattern of 128 bytes does"),
        (lambda d: d + (65536 >> 4), "of a block that has"),
    ],
)
def test_wrong_descriptors(change, report: str | None) -> None:
    """A descriptor that is off ends in a report, or in wrong numbers."""
    from resnet_fast import _ptx

    p = Product()
    a, b = p.descriptors
    try:
        d = p.launch(kernel(64, "bf16", False), descriptors=(a, change(b)))
    except _ptx.Fault as fault:
        assert report is not None and re.search(report, str(fault))
        return
    with pytest.raises(AssertionError):
        p.check(d)


def test_warps_that_name_different_operands() -> None:
    from resnet_fast import _ptx

    p = Product()
    text = kernel(64, "bf16", False).replace(
        "wgmma.fence", "setp.gt.u32 %q, %t, 95;\n@%q add.s64 %db, %db, 2;\nwgmma.fence", 1
    )
    with pytest.raises(_ptx.Fault, match="names other operands than warp"):
        p.launch(text)


def test_three_warps() -> None:
    from resnet_fast import _ptx

    with pytest.raises(_ptx.Fault, match="needs four warps"):
        Product().launch(kernel(64, "bf16", False), threads=96)
