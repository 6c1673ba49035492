"""A constant that ptxas drops: the PTX is right in the machine, the machine code is not."""

from __future__ import annotations

import re
import subprocess

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from resnet_fast import native
from resnet_fast.tools.ptx_machine import ptx_machine
from resnet_fast.tools.ptx_machine.assembler import dropped_constants, packed_constants
from tests.support.ptx import HEAD

pytestmark = pytest.mark.skipif(not native.ptx_status(), reason=native.ptx_status().reason)

SUM = (
    HEAD
    + """.visible .entry k(.param .u64 P) {
.reg .b64 %p<2>; .reg .b32 %r<4>; .reg .b16 %h<2>;
ld.param.u64 %p0, [P]; ld.global.b32 %r0, [%p0];
mov.b32 %r1, 65531;
add.s16x2 %r2, %r0, %r1;
USE
st.global.b16 [%p0+4], %h0;
ret;
}
"""
)


def is_fixed() -> bool:
    """Return whether Triton's assembler keeps the constant."""
    said = subprocess.run([triton.knobs.nvidia.ptxas.path, "--version"], capture_output=True, text=True).stdout
    (version,) = re.findall(r"release (\d+)\.(\d+)", said)
    return tuple(map(int, version)) >= (13, 3)


@pytest.mark.parametrize(
    ("use", "dropped"),
    [
        ("mov.b32 {%h0, _}, %r2;", 1),
        ("cvt.u16.u32 %h0, %r2;", 1),
        ("mov.b32 {%h0, %h1}, %r2; st.global.b16 [%p0+6], %h1;", 0),
    ],
)
def test_a_constant_is_dropped_where_half_of_the_sum_is_used(use: str, dropped: int) -> None:
    text = SUM.replace("USE", use)
    assert len(packed_constants(text)) == 1
    assert dropped_constants(text) == (0 if is_fixed() else dropped)


def test_what_is_no_constant_in_packed_integers() -> None:
    text = SUM.replace("mov.b32 %r1, 65531", "ld.global.b32 %r1, [%p0+8]")
    assert packed_constants(text) == [] and dropped_constants(text) == 0
    assert packed_constants("add.s32 %r2, %r0, 4;\nadd.bf16x2 %r3, %r0, %r1;") == []
    assert packed_constants("mov.b32 %r1, {%h0, 4};\nadd.u16x2 %r2, %r1, %r0;") == [2]


@triton.jit
def convolution_in_one_loop(
    x_ptr, w_ptr, y_ptr, N: tl.constexpr, CI: tl.constexpr, H: tl.constexpr, W: tl.constexpr, CO: tl.constexpr,
    HO: tl.constexpr, WO: tl.constexpr, K: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr,
    PW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """NCHW. One loop over taps and channels, whose index is taken apart by division."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    wo, ho, n = m % WO, m // WO % HO, m // (WO * HO)
    co = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    STEPS: tl.constexpr = (CI + BLOCK_K - 1) // BLOCK_K
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(K * K * STEPS):
        ci = step % STEPS * BLOCK_K + tl.arange(0, BLOCK_K)
        tap = step // STEPS
        r, s = tap // K, tap % K
        h, w = r - PH + ho * SH, s - PW + wo * SW
        inside = (n < N) & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        at = (n * (CI * H * W))[:, None] + ((h * W)[:, None] + w[:, None] + (ci * (H * W))[None, :])
        a = tl.load(x_ptr + at, mask=inside[:, None] & (ci < CI)[None, :], other=0.0)
        of = (co * (CI * K * K))[None, :] + ((ci * (K * K))[:, None] + r * K + s)
        b = tl.load(w_ptr + of, mask=(ci < CI)[:, None] & (co < CO)[None, :], other=0.0)
        acc += tl.dot(a, b, input_precision="ieee")
    at = (n * (CO * HO * WO))[:, None] + (co * (HO * WO))[None, :] + (ho * WO + wo)[:, None]
    tl.store(y_ptr + at, acc, mask=(n < N)[:, None] & (co < CO)[None, :])


def test_the_convolution_of_which_eight_warps_were_blamed() -> None:
    """The launch of pytorch#173068: its PTX is right, and its machine code lacks the padding."""
    x, w = torch.randn(2, 33, 34, 41), torch.randn(34, 33, 3, 3)
    want = F.conv2d(x.double(), w.double(), None, (2, 3), (4, 5))
    y = torch.empty(want.shape)
    texts: list[str] = []

    def keep(name: str, text: str) -> str:
        texts.append(text)
        return text

    with ptx_machine(90, rewrite=keep):
        convolution_in_one_loop[(1, 3)](
            x, w, y, *x.shape, 34, *want.shape[2:], 3, 2, 3, 4, 5, BLOCK_M=1024, BLOCK_N=16, BLOCK_K=16,
            num_warps=8, num_stages=1,
        )  # fmt: skip
    assert (y - want).abs().max() < 1e-4
    assert [dropped_constants(text) for text in texts] == [0 if is_fixed() else 1]
