"""A matrix product in PTX as CUTLASS's warp-specialised kernels are built, written for the tests of the PTX machine.

    c (rows, 64) fp32 = a (rows, depth) . b (64, depth)^T, bf16; rows up to 64

    warp 4   one lane fills two stages of (64, 64) tiles of a and b by bulk copies, 128-byte swizzle
    warps 0-3   a warpgroup multiplies a stage by four wgmma, with one group in flight, and frees the stage before

A stage has two mbarriers: full (an arrival, and its bytes) and empty (an arrival of each of the four warps).
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

from tests.support.ptx import HEAD, module

TILE = 64
TILE_BYTES = 2 * TILE * TILE
STAGE = 2 * TILE_BYTES
THREADS = 160
DESCRIPTOR = 1 << 62 | (1024 >> 4) << 32 | 1 << 16
"""128-byte swizzle, groups of eight rows 1,024 bytes apart; the start is added."""


def _product() -> str:
    sums = ", ".join(f"%d{i}" for i in range(TILE // 2))
    one = "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {{{sums}}}, %da, %db, %adds, 1, 1, 0, 0;\n"
    return "add.s64 %da, %da, 2; add.s64 %db, %db, 2;\nsetp.eq.u32 %adds, 0, 0;\n".join([one.format(sums=sums)] * 4)


def _stores() -> str:
    """Store this lane's pairs of rows lane / 4 and lane / 4 + 8 of its warp."""
    text = ""
    for half in (0, 1):
        text += (
            f"add.s32 %row, %row, {8 * half};\nsetp.lt.u32 %inside, %row, %rows;\nmad.wide.u32 %at, %row, 256, %c;\n"
        )
        for column in range(TILE // 8):
            first = 4 * column + 2 * half
            text += f"@%inside st.global.v2.f32 [%at+{32 * column}], {{%d{first}, %d{first + 1}}};\n"
    return text


PIPELINE = f"""{HEAD}.visible .entry pipeline(.param .align 64 .b8 A[128], .param .align 64 .b8 B[128], .param .u64 C,
    .param .u32 ROWS, .param .u32 STEPS)
{{
.reg .b64 %a, %b, %c, %at, %da, %db;
.reg .b32 %t, %lane, %rows, %steps, %i, %stage, %phase, %tiles, %bars, %bar, %place, %row, %k, %x;
.reg .f32 %d<{TILE // 2}>;
.reg .pred %first, %one, %gives, %done, %adds, %inside, %more, %frees;
.shared .align 1024 .b8 tiles[{2 * STAGE}];
.shared .align 8 .b64 bars[4];
mov.b64 %a, A; cvta.param.u64 %a, %a; mov.b64 %b, B; cvta.param.u64 %b, %b;
ld.param.u64 %c, [C]; ld.param.u32 %rows, [ROWS]; ld.param.u32 %steps, [STEPS];
mov.u32 %t, %tid.x; mov.u32 %lane, %laneid; mov.u32 %tiles, tiles; mov.u32 %bars, bars;
mov.u32 %i, 0; mov.u32 %stage, 0;
setp.eq.u32 %first, %t, 0;
@%first mbarrier.init.shared::cta.b64 [%bars], 1;
@%first mbarrier.init.shared::cta.b64 [%bars+8], 1;
@%first mbarrier.init.shared::cta.b64 [%bars+16], 4;
@%first mbarrier.init.shared::cta.b64 [%bars+24], 4;
bar.sync 0;
setp.ge.u32 %gives, %t, 128;
@%gives bra give;

mov.u32 %phase, 0;
take:
shl.b32 %bar, %stage, 3; add.s32 %bar, %bar, %bars;
full:
mbarrier.try_wait.parity.shared::cta.b64 %done, [%bar], %phase;
@!%done bra full;
shl.b32 %place, %stage, 14; add.s32 %place, %place, %tiles; shr.u32 %place, %place, 4;
cvt.u64.u32 %da, %place; add.s64 %da, %da, {DESCRIPTOR}; add.s64 %db, %da, {TILE_BYTES >> 4};
setp.ne.u32 %adds, %i, 0;
wgmma.fence.sync.aligned;
{_product()}wgmma.commit_group.sync.aligned;
wgmma.wait_group.sync.aligned 1;
setp.eq.u32 %frees, %lane, 0; setp.ne.and.u32 %frees, %i, 0, %frees;
xor.b32 %x, %stage, 1; shl.b32 %bar, %x, 3; add.s32 %bar, %bar, %bars;
@%frees mbarrier.arrive.shared::cta.b64 _, [%bar+16];
xor.b32 %phase, %phase, %stage; xor.b32 %stage, %stage, 1;
add.s32 %i, %i, 1; setp.lt.u32 %more, %i, %steps;
@%more bra take;
wgmma.wait_group.sync.aligned 0;
shr.u32 %row, %t, 5; shl.b32 %row, %row, 4; shr.u32 %x, %lane, 2; add.s32 %row, %row, %x;
and.b32 %x, %lane, 3; shl.b32 %x, %x, 3; cvt.u64.u32 %at, %x; add.s64 %c, %c, %at;
{_stores()}ret;

give:
elect.sync _|%one, -1;
@!%one bra given;
mov.u32 %phase, 1;
fill:
shl.b32 %bar, %stage, 3; add.s32 %bar, %bar, %bars;
empty:
mbarrier.try_wait.parity.shared::cta.b64 %done, [%bar+16], %phase;
@!%done bra empty;
mbarrier.arrive.expect_tx.shared::cta.b64 _, [%bar], {STAGE};
shl.b32 %place, %stage, 14; add.s32 %place, %place, %tiles; shl.b32 %k, %i, 6;
cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [%place], [%a, {{%k, 0}}], [%bar];
add.s32 %place, %place, {TILE_BYTES};
cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [%place], [%b, {{%k, 0}}], [%bar];
xor.b32 %phase, %phase, %stage; xor.b32 %stage, %stage, 1;
add.s32 %i, %i, 1; setp.lt.u32 %more, %i, %steps;
@%more bra fill;
given:
ret;
}}
"""


class PipelinedProduct:
    """Operands of ``PIPELINE`` for ``rows`` rows and ``depth`` products (a multiple of 8), and its launch."""

    def __init__(self, rows: int, depth: int) -> None:
        rng = np.random.default_rng(rows + depth)
        wide = [rng.standard_normal((n, depth)).astype(np.float32) for n in (rows, TILE)]
        self.a, self.b = ((x.view(np.uint32) >> 16).astype(np.uint16) for x in wide)
        self.c = np.full((rows, TILE), 7, np.float32)

    def expected(self) -> np.ndarray:
        """The product in fp64."""
        a, b = ((x.astype(np.uint32) << 16).view(np.float32).astype(np.float64) for x in (self.a, self.b))
        return a @ b.T

    def launch(self, text: str = PIPELINE, seed: int = 0) -> Any:
        """Run it; the result is in ``c``."""
        from resnet_fast import _ptx

        (rows, depth), memory = self.a.shape, _ptx.Memory()
        maps = []
        for name, x in (("a", self.a), ("b", self.b)):
            memory.add(x.ctypes.data, x.nbytes, name, writable=False)
            size, stride = [depth, len(x)], [2 * depth]
            maps.append(_ptx.tensor_map(x.ctypes.data, "bf16", size, stride, [TILE, TILE], swizzle=128, fill="zero"))
        memory.add(self.c.ctypes.data, self.c.nbytes, "c", written=False)
        numbers = [struct.pack("Q", self.c.ctypes.data), struct.pack("I", rows), struct.pack("I", -(-depth // TILE))]
        given = ((1, 1, 1), (THREADS, 1, 1), 0, [*maps, *numbers], memory)
        return module(text).launch("pipeline", *given, seed=seed, limit=100_000)
