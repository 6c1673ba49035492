"""Bulk copies of tensors, their mbarriers and fences against NumPy, and mistakes with them."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.ptx import HEAD, module

SIZES = {"u8": 1, "bf16": 2, "f32": 4, "u64": 8}


def box_kernel(rank: int, box_bytes: int, stages: int = 2, mode: str = "shared::cta.global.mbarrier") -> str:
    """Load the box at a corner into two places, one after the other, each with its mbarrier; store both as they lie."""
    corner = ", ".join(f"%c{i}" for i in range(rank))
    step = -(-box_bytes // 1024) * 1024
    text = f"""{HEAD}.visible .entry k(.param .align 64 .b8 M[128], .param .u64 CORNER, .param .u64 OUT)
{{
.reg .b64 %m, %p<3>, %o;
.reg .b32 %t, %s, %x<4>, %c<5>, %i, %y, %at;
.reg .pred %q, %one, %done;
.shared .align 1024 .b8 memory[{stages * step}];
.shared .align 8 .b64 bars[{stages}];
ld.param.u64 %p0, [CORNER]; ld.param.u64 %p1, [OUT];
mov.b64 %m, M; cvta.param.u64 %m, %m;
mov.u32 %t, %tid.x; mov.u32 %s, memory; mov.u32 %y, bars;
setp.eq.u32 %one, %t, 0;
"""
    text += "".join(f"ld.global.b32 %c{i}, [%p0+{4 * i}];\n" for i in range(rank))
    for n in range(stages):
        text += f"@%one mbarrier.init.shared::cta.b64 [%y+{8 * n}], 1;\n"
    text += "bar.sync 0;\n"
    for n in range(stages):
        text += f"@%one mbarrier.arrive.expect_tx.shared::cta.b64 _, [%y+{8 * n}], {box_bytes};\n"
        text += f"add.s32 %at, %s, {n * step};\n"
        text += (
            f"@%one cp.async.bulk.tensor.{rank}d.{mode}::complete_tx::bytes [%at], [%m, {{{corner}}}], [%y+{8 * n}];\n"
        )
    text += "mul.wide.u32 %o, %t, 4; add.s64 %p1, %p1, %o;\nshl.b32 %x1, %t, 2; add.s32 %s, %s, %x1;\n"
    for n in range(stages):
        text += f"wait{n}:\nmbarrier.try_wait.parity.shared::cta.b64 %done, [%y+{8 * n}], 0;\n@!%done bra wait{n};\n"
        text += f"mov.u32 %i, {n * step};\nmov.b64 %p2, %p1;\nloop{n}:\nadd.s32 %at, %s, %i;\n"
        text += f"sub.s32 %x2, %i, {n * step};\nadd.s32 %x2, %x2, %x1;\nsetp.lt.u32 %q, %x2, {box_bytes};\n"
        text += "@%q ld.shared.b32 %x0, [%at];\n@%q st.global.b32 [%p2], %x0;\n"
        text += f"add.s32 %i, %i, 512; add.s64 %p2, %p2, 512;\nsetp.lt.u32 %q, %i, {n * step + box_bytes};\n"
        text += f"@%q bra loop{n};\n"
        text += f"add.s64 %p1, %p1, {box_bytes};\n"
    text += "bar.sync 0;\n"
    for n in range(stages):
        text += f"@%one mbarrier.inval.shared::cta.b64 [%y+{8 * n}];\n"
    return text + "ret;\n}\n"


class Box:
    """A tensor, innermost dimension last, and a box of it at a corner, innermost first."""

    def __init__(self, shape, box, corner, dtype="bf16", swizzle=0, fill="zero") -> None:
        from resnet_fast import _ptx

        rng = np.random.default_rng(0)
        self.x = rng.integers(0, 256, (*shape, SIZES[dtype]), dtype=np.uint8)
        self.box, self.corner, self.swizzle, self.fill = box, np.array(corner, np.int32), swizzle, fill
        self.bytes = int(np.prod(box)) * SIZES[dtype]
        sizes = list(shape[::-1])
        strides = [self.x.strides[-2 - d] for d in range(1, len(shape))]
        self.map = _ptx.tensor_map(self.x.ctypes.data, dtype, sizes, strides, list(box), swizzle=swizzle, fill=fill)
        self.out = np.zeros((2, self.bytes), np.uint8)

    def text(self) -> str:
        return box_kernel(len(self.box), self.bytes)

    def run(self, text: str | None = None, seed: int = 0, pedantic: bool = False) -> Any:
        from resnet_fast import _ptx

        memory = _ptx.Memory()
        for name, array in (("x", self.x), ("corner", self.corner), ("out", self.out)):
            memory.add(array.ctypes.data, array.nbytes, name)
        addresses = [struct.pack("Q", array.ctypes.data) for array in (self.corner, self.out)]
        return module(text or self.text()).launch(
            "k",
            (1, 1, 1),
            (128, 1, 1),
            0,
            [self.map, *addresses],
            memory,
            seed=seed,
            limit=1_000_000,
            pedantic=pedantic,
        )

    def expected(self) -> np.ndarray:
        """The box in the layout of shared memory: padded by PyTorch's pad, its chunks exchanged row by row."""
        pads = [(int(max(b, 0)) + 8,) * 2 for b in self.box]
        x = torch.from_numpy(self.x)
        value = 255 if self.fill == "nan" else 0
        padded = torch.nn.functional.pad(x, [0, 0, *(p for pad in pads for p in pad)], value=value).numpy()
        window = tuple(
            slice(c + pad[0], c + pad[0] + b) for c, b, pad in zip(self.corner, self.box, pads, strict=True)
        )[::-1]
        flat = padded[window].reshape(-1, 16)
        if not self.swizzle:
            return flat.reshape(-1)
        at = np.arange(len(flat)) * 16
        moved = np.zeros_like(flat)
        moved[(at ^ (at >> 7 & (self.swizzle // 16 - 1)) << 4) // 16] = flat
        return moved.reshape(-1)


@pytest.mark.parametrize(
    ("shape", "box", "corner", "dtype", "swizzle", "fill"),
    [
        ((40, 64), (64, 16), (0, 8), "bf16", 128, "zero"),
        ((40, 64), (64, 16), (0, 32), "bf16", 128, "zero"),
        ((40, 64), (32, 16), (48, -3), "bf16", 64, "nan"),
        ((40, 64), (16, 16), (-8, 30), "bf16", 32, "zero"),
        ((40, 64), (16, 8), (60, 39), "f32", 0, "zero"),
        ((2, 6, 7, 64), (64, 4, 4, 1), (0, -1, -1, 1), "bf16", 128, "zero"),
        ((3, 6, 7, 32), (32, 3, 2, 2), (0, 5, 5, 2), "u8", 32, "zero"),
        ((3, 4, 16), (16, 2, 2), (0, 3, 2), "u64", 128, "zero"),
        ((2, 2, 2, 3, 8), (8, 3, 2, 2, 2), (0, 0, 1, 0, -1), "f32", 0, "zero"),
    ],
    ids=str,
)
def test_boxes(shape, box, corner, dtype, swizzle, fill) -> None:
    b = Box(shape, box, corner, dtype, swizzle, fill)
    for seed in range(2):
        report = b.run(seed=seed)
        for place in b.out:
            np.testing.assert_array_equal(place, b.expected())
        b.out[:] = 0
    assert report.counters["events"]["bulk_copies"] == 2
    assert report.counters["events"]["bulk_bytes"] == 2 * b.bytes


EXPECT = "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%y+0], 2048;"
WAIT0 = "wait0:\nmbarrier.try_wait.parity.shared::cta.b64 %done, [%y+0], 0;\n@!%done bra wait0;\n"
BOX_MISTAKES = {
    "no wait": (WAIT0, "", "which a copy in flight will write|which nobody has written"),
    "wrong parity": (
        "[%y+0], 0;\n@!%done",
        "[%y+0], 1;\n@!%done",
        "which a copy in flight will write|which nobody has written",
    ),
    "wait for the other mbarrier": ("%done, [%y+0]", "%done, [%y+8]", "which a copy in flight will write"),
    "nobody arrives": (f"@%one {EXPECT}\n", "", "no warp can go on: .* the end of a phase of an mbarrier"),
    "more bytes expected": (EXPECT, EXPECT.replace("2048", "2064"), "no warp can go on"),
    "fewer bytes expected": (
        EXPECT,
        EXPECT.replace("2048", "2032"),
        "16 bytes more have come to the mbarrier at shared memory byte \\d+ than phase 0 expected",
    ),
    "an arrival too many": (
        f"@%one {EXPECT}\n",
        f"@%one {EXPECT}\n@%one mbarrier.arrive.shared::cta.b64 _, [%y+0];\n",
        "arrives at the mbarrier .* where 0 of 1 arrivals of phase 0",
    ),
    "not initialised": ("@%one mbarrier.init.shared::cta.b64 [%y+0], 1;\n", "", "which nobody has initialised"),
    "initialised twice": (
        "@%one mbarrier.init.shared::cta.b64 [%y+8], 1;\n",
        "@%one mbarrier.init.shared::cta.b64 [%y+0], 1;\n",
        "again, with no mbarrier.inval before",
    ),
    "not synchronised": ("bar.sync 0;\n", "", "nobody has initialised|no barrier orders the two"),
    "overwritten": ("bar.sync 0;\n", "@%one st.shared.b64 [%y+0], 0;\nbar.sync 0;\n", "which was overwritten at line"),
    "invalidated too early": (
        "bar.sync 0;\n@%one mbarrier.inval",
        "@%one mbarrier.inval",
        "which nobody has initialised|no barrier orders|no warp can go on",
    ),
    "in flight when the block ends": (
        "mul.wide.u32 %o, %t, 4;",
        "ret;\nmul.wide.u32 %o, %t, 4;",
        "ends while a bulk copy",
    ),
    "between the swizzle's rows": ("add.s32 %at, %s, 0;", "add.s32 %at, %s, 128;", "is not a multiple of 1024"),
    "written before, and not fenced": (
        "bar.sync 0;\n",
        "st.shared.b32 [%s], 0;\nbar.sync 0;\n".replace("st", "@%one st"),
        "copies to shared memory byte 1024, which warp 0 lane 0 wrote at line .* no fence.proxy.async follows",
    ),
    "read before, and not fenced": (
        "bar.sync 0;\n",
        """setp.eq.u32 %q, %t, 70;
@%q st.shared.b32 [%s], 0;
fence.proxy.async.shared::cta;
bar.sync 0;
setp.lt.u32 %q, %t, 64;
@%q ld.shared.b32 %x0, [%s];
setp.gt.u32 %q, %t, 31;
@%q fence.proxy.async.shared::cta;
bar.sync 0;
""",
        "copies to shared memory byte 1024, which warp 0 lane 31 read at line .* no fence.proxy.async follows",
    ),
    "another rank": ("tensor.2d", "tensor.3d", "dimensions of a tensor map that has 2"),
    "not a tensor map": ("cvta.param.u64 %m, %m;", "mov.b64 %m, %p0;", "tensor map"),
}


@pytest.mark.parametrize("what", BOX_MISTAKES)
def test_mistake_with_a_box(what: str) -> None:
    from resnet_fast import _ptx

    old, new, report = BOX_MISTAKES[what]
    b = Box((40, 64), (64, 16), (0, 8), swizzle=128)
    text = b.text()
    assert old in text
    text = text.replace(old, new, 1)
    if what == "another rank":
        text = text.replace("{%c0, %c1}", "{%c0, %c1, %c1}", 1)
    with pytest.raises(_ptx.Fault, match=report):
        b.run(text)


@pytest.mark.parametrize("fence", ["fence.mbarrier_init.release.cluster;", "fence.proxy.async.shared::cta;"])
def test_an_initialisation_without_a_fence_is_pedantic(fence: str) -> None:
    from resnet_fast import _ptx

    b = Box((40, 64), (64, 16), (0, 8), swizzle=128)
    text = b.text()
    b.run(text, pedantic=False)
    b.run(text.replace("bar.sync 0;", f"@%one {fence}\nbar.sync 0;", 1), pedantic=True)
    for other in (text, text.replace("bar.sync 0;", f"@!%one {fence}\nbar.sync 0;", 1)):
        with pytest.raises(
            _ptx.Fault, match=r"initialised at line .* no fence.mbarrier_init or fence.proxy.async follows"
        ):
            b.run(other, pedantic=True)


def test_what_was_fenced_may_be_overwritten() -> None:
    b = Box((40, 64), (64, 16), (0, 8), swizzle=128)
    before = "st.shared.b32 [%s], 0;\nfence.proxy.async.shared::cta;\nbar.sync 0;\n".replace("st", "@%one st", 1)
    b.run(b.text().replace("bar.sync 0;\n", before, 1))
    np.testing.assert_array_equal(b.out[0], b.expected())


def test_a_box_is_stored() -> None:
    """From shared memory to the tensor; what lies outside is left out."""
    b = Box((40, 64), (64, 16), (0, 30), swizzle=128)
    text = b.text()
    start = text.index("bar.sync 0;\n@%one mbarrier.inval")
    store = """fence.proxy.async.shared::cta;
bar.sync 0;
add.s32 %c1, %c1, -20;
mov.u32 %s, memory;
@%one cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%m, {%c0, %c1}], [%s];
cp.async.bulk.commit_group;
cp.async.bulk.wait_group.read 0;
"""
    from resnet_fast import _ptx

    before = b.x.copy()
    b.run(text[:start] + store + text[start:])
    expected = before.copy()
    expected[10:20], expected[20:26] = before[30:40], 0
    np.testing.assert_array_equal(b.x, expected)
    overwrite = "@%one st.shared.b32 [%s], 0;\n"
    with pytest.raises(_ptx.Fault, match=r"which a bulk copy at line .* still reads: wait for it first"):
        b.run(text[:start] + store.replace("cp.async.bulk.commit", overwrite + "cp.async.bulk.commit") + text[start:])
    written = "@%one st.shared.b32 [%at], 0;\n"
    unfenced = store.replace("fence.proxy.async.shared::cta;\n", "mov.u32 %at, memory;\nbar.sync 0;\n" + written)
    with pytest.raises(
        _ptx.Fault, match=r"copies shared memory byte 1024, which warp 0 lane 0 wrote .* no fence.proxy"
    ):
        b.run(text[:start] + unfenced + text[start:])


@pytest.mark.parametrize(
    ("change", "report"),
    [
        ({"address": 8}, "start is not aligned"),
        ({"strides": [24]}, "a stride is not of 16 bytes"),
        ({"box": [65, 300]}, "a box's dimension is none or too large"),
        ({"box": [7, 16]}, "a box's rows are not of 16 bytes"),
        ({"box": [128, 16], "swizzle": 128}, "rows are longer than its swizzle"),
        ({"swizzle": 48}, "a swizzle is not of 32, 64 or 128 bytes"),
        ({"dtype": "f8"}, "expected a dtype of a tensor map, got f8"),
        ({"fill": "one"}, "expected fill to be zero or nan, got one"),
        ({"strides": []}, "expected 1 to 5 sizes, one stride fewer"),
    ],
    ids=str,
)
def test_tensor_maps_that_are_refused(change: dict[str, Any], report: str) -> None:
    from resnet_fast import _ptx

    arguments = {"address": 0, "dtype": "bf16", "shape": [64, 40], "strides": [128], "box": [64, 16]} | change
    with pytest.raises(ValueError, match=report):
        _ptx.tensor_map(**arguments)
