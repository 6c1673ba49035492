r"""The first layers of an ImageNet ResNet in one launch: conv 7x7/2 + BatchNorm + ReLU + max-pool 3x3/2.

    c[n, p, q, :] = sum_rsc x[n, 2p - 3 + r, 2q - 3 + s, c] * w'[:, r, s, c]              (7x7 stride 2 pad 3, Ci = 3)
    y[n, i, j, :] = relu( max over p in 2i-1..2i+1, q in 2j-1..2j+1 of c[n, p, q, :]  +  b' )

    x (N, 3, H, W) in any strides   w' (Co, 7, 32): filter rows of 7*3 products, zero-padded, BatchNorm folded
    b' (Co) fp32   y (N, Hp, Wp, Co) NHWC

The bias, ReLU and rounding are monotonic, so they follow the maximum: once per pooled pixel instead of nine times.
Positions outside c count as -inf, like max-pool's padding.

Saved bytes, per image of 224x224 in 16 bit: the convolution's output (112x112x64, 1.61 MB) is never written nor read
back; the launch moves x (0.30) and y (0.40): 3.92 MB (conv, then pool) -> 0.70.

    pooled rows         c rows                    One program: BLOCK_M pooled columns (n, j), linearised over the
                     2i-1  o   <- carry           batch, times BLOCK_N channels, walking down ``rows`` pooled rows.
       i  ---------  2i    e                      Row 2i+1 serves pooled rows i and i+1: its column-wise maximum is
                     2i+1  o   -> carry           carried in registers, so each row of c is computed once per strip.
       i+1 --------  2i+2  e                      Columns are not exchanged between lanes: 2j+1 of one pixel and
                     2i+3  o   -> carry           2(j+1)-1 of the next are the same c, computed twice (1.5x the MACs).

GEMM of each c row and column: gemm_m = pooled columns, gemm_n = Co, gemm_k = 7 filter rows of 7*3 = 21 products,
padded to 32. A K step is a filter row, so that the addresses and masks of the columns are computed once for all seven.
Three channels prevent 16-byte loads: lanes load 2 bytes each, and L1 serves the overlap of windows. The cost is in
docs/tables/static-budgets.md.

Numerics: tiles.py; the maximum is taken in fp32. NaN passes through maximum and ReLU as in ATen. Limits: tuning/
configs.py; pools other than 3x3/2 with padding 1 run as a convolution and PyTorch's pooling. Alone:
``TRITON_INTERPRET=1 python -m pytest tests/backends/triton -k stem``; timing: ``resnet-fast tune --only stem``.

Not taken: all nine c of a window per pooled pixel (2.25x the MACs, no carry). gemm_k as one axis of 147, padded to 160
(fewer products, but every lane finds its tap by division at every step: 360 instructions per step, and spills).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...spec import LaunchSpec
from ...tuning.configs import Config
from ...tuning.routes import stem_step
from .launch import FoldedWeights, empty_nhwc, product, steps_of, submit
from .tiles import multiply, relu, round_to


@triton.jit
def _larger(a, b):
    """Return max(a, b), keeping NaN as ATen's max-pool does."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _row_maximum(
    p, j, x_base, images, row_mask, w_rows, w_mask, H, W, Ho, Wo, x_stride_c, x_stride_h, x_stride_w,
    CI: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return max over q in 2j-1..2j+1 of c[n, p, q, :]; -inf where c has no such pixel."""
    k = tl.arange(0, BLOCK_K)
    s, ci = k // CI, k % CI
    best = tl.full((BLOCK_M, BLOCK_N), float("-inf"), dtype=tl.float32)
    # A real loop: three copies of the body keep so many addresses alive that registers spill (1,016 bytes on sm_90).
    for dq in range(0, 3):
        q = 2 * j - 1 + dq
        exists = row_mask & (q >= 0) & (q < Wo) & (p >= 0) & (p < Ho)
        # the window's columns: the same for all filter rows
        x_in = (q * STRIDE_W - PAD_W)[:, None] + (s * DIL_W)[None, :]
        columns = (x_in >= 0) & (x_in < W) & (k < S * CI)[None, :]
        pixels = images[:, None] + x_in * x_stride_w + (ci * x_stride_c)[None, :]
        # c = sum over filter rows r of x[n, p * stride - pad + r * dil, columns] * w'[:, r, :]
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for r in range(0, R):
            y_in = p * STRIDE_H - PAD_H + r * DIL_H
            inside = (exists & (y_in >= 0) & (y_in < H))[:, None] & columns
            a = tl.load(x_base + (pixels + y_in * x_stride_h), mask=inside, other=0.0)
            b = tl.load(w_rows[:, None] + (r * BLOCK_K + k)[None, :], mask=w_mask[:, None], other=0.0)
            acc = multiply(a, b, acc, PRECISION, UPCAST)
        best = _larger(best, tl.where(exists[:, None], acc, float("-inf")))
    return best


@triton.jit(do_not_specialize=["N", "H", "W", "Ho", "Wo", "Hp", "Wp"])
def _stem_fwd_kernel(
    x_ptr, w_ptr, bias_ptr, y_ptr,
    N, H, W, Ho, Wo, Hp, Wp, Co, x_stride_n, x_stride_c, x_stride_h, x_stride_w,
    CI: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr, RELU: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    # pooled columns (n, j), channels co, pooled rows first .. first + ROWS
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n, j, row_mask = m // Wp, m % Wp, m < N * Wp
    first = tl.program_id(1) * ROWS
    co = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    co_mask = co < Co
    # 64 bits to the program's first image, 32 from there: half the registers of 64-bit addresses
    n_first = tl.program_id(0) * BLOCK_M // Wp
    x_base = x_ptr + n_first.to(tl.int64) * x_stride_n
    images = (n - n_first) * x_stride_n
    w_rows = w_ptr + co * (R * BLOCK_K)
    bias = tl.load(bias_ptr + co, mask=co_mask, other=0.0)[None, :]

    mask = row_mask[:, None] & co_mask[None, :]
    best = tl.full((BLOCK_M, BLOCK_N), float("-inf"), dtype=tl.float32)
    for step in range(0, 2 * min(ROWS, Hp - first) + 1):
        # best = max(best, row p of c)
        row = _row_maximum(
            2 * first - 1 + step, j, x_base, images, row_mask, w_rows, co_mask,
            H, W, Ho, Wo, x_stride_c, x_stride_h, x_stride_w,
            CI, R, S, STRIDE_H, STRIDE_W, PAD_H, PAD_W, DIL_H, DIL_W, PRECISION, UPCAST, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        best = _larger(best, row)
        if step % 2 == 0:
            # rows 2i - 1, 2i, 2i + 1 are in: y[n, i, j, co] = relu(best + b'); row 2i + 1 starts the next window
            if step > 0:
                i = first + step // 2 - 1
                y = best + bias
                if RELU:
                    y = relu(y)
                at = (n.to(tl.int64) * Hp + i) * Wp + j
                tl.store(y_ptr + at[:, None] * Co + co[None, :], round_to(y, y_ptr.dtype.element_ty, UPCAST), mask=mask)
            best = row


def stem(
    spec: LaunchSpec, config: Config, packed: FoldedWeights, x: Tensor, res: Tensor | None, xp: Tensor | None
) -> Tensor:
    """Launch the kernel.

    Args:
        spec: the launch.
        config: its tiles.
        packed: its weights.
        x: (N, Ci, H, W) in any strides.
        res, xp: unused; every launcher has the same signature.

    Returns:
        y (N, Co, Hp, Wp), dense NHWC.
    """
    conv = spec.last
    hp, wp = conv.out_hw()
    if (config.block_m // wp + 2) * x.stride(0) >= 2**31:  # images with large gaps
        x = x.contiguous()
    y = empty_nhwc(x, conv.n, conv.co, hp, wp)
    grid = (-(-conv.n * wp // config.block_m), -(-hp // config.rows), -(-conv.co // config.block_n))
    arguments = product(conv, config, x.dtype) | {"BLOCK_K": stem_step(conv)}
    submit(
        _stem_fwd_kernel, grid,
        x, packed.weight, packed.bias, y,
        conv.n, conv.h, conv.w, conv.ho, conv.wo, hp, wp, conv.co, *x.stride(),
        CI=conv.ci, R=conv.r, S=conv.s, **steps_of(conv), RELU=conv.epilogue.relu,
        BLOCK_N=config.block_n, ROWS=config.rows, **arguments,
    )  # fmt: skip
    return y
