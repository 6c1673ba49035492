r"""Gradient of a convolution's weight: a matrix product over all output pixels, split over programs, summed in order.

    dW[co, r, s, ci] = sum_m dy[m, co] * act(x[n, ho*stride - pad + r*dil, wo*stride - pad + s*dil, ci])
    m = (n, ho, wo)

    g, y (N, Ho, Wo, Co)   x (N, H, W, Ci) raw or as it is   dW (Co, R, S, Ci/groups) fp32

Neither operand exists in memory: dy is made of g and y, act of the raw x (vectors.py), as they are read. Saved bytes:
dy and act are each written once and read once less.

GEMM. gemm_m = Co, gemm_n = Ci of one tap (or all taps and channels as one axis where a group has fewer than 16
channels), gemm_k = N*Ho*Wo, which is long where the other two are short. So the pixels are split:

    pixels  |---split 0---|---split 1---|---split 2---|      a program: one tile (co, tap, ci) of one split, fp32 sums
               tile 0        tile 0        tile 0      \
                 |             |             |          >    a second launch adds the splits from the first to the last
                 +------>------+------>------+--> dW   /     and applies factors and corrections: no atomics

Packed operands are q and z = clamp(x) with dy = A*q and act = FOLD*(z - THR), so A and FOLD are a row and a column
factor of the sum, and

    dW = A * FOLD * (P - THR * Q)             P = sum q*z    Q = sum q         constant statistics
    dW = A * FOLD * (P - mean(z) * Q)                                          batch statistics

In exact arithmetic the second Q is zero. Rounding leaves a systematic rest, which multiplied with the mean of an
activation (not small) would be most of the error; so the rest is taken out at the mean of z. Q comes from the tensor
cores, as a product with a column of ones; mean(z), whose own error is of second order, from the first step of each
split.

Numerics: tiles.py. Alone: ``TRITON_INTERPRET=1 python -m pytest tests/backends/triton/training -k wgrad``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....spec import LaunchSpec
from ....tuning.configs import Config
from ....tuning.routes import MIN_CHANNELS, merged_groups
from ....tuning.training import gemm
from ..launch import product, steps_of
from ..tiles import pixel_of_row, round_to, row_offset
from . import vectors
from .conv_dgrad import packed_gradient
from .conv_fwd import activate, clamp
from .vectors import Act, Grad

SCALE, SHIFT = tl.constexpr(vectors.SCALE), tl.constexpr(vectors.SHIFT)
FOLD, THR = tl.constexpr(vectors.FOLD), tl.constexpr(vectors.THR)
LO, HI, THRESHOLD = tl.constexpr(vectors.LO), tl.constexpr(vectors.HI), tl.constexpr(vectors.THRESHOLD)
BETA_HI, BETA_LO, GAMMA = tl.constexpr(vectors.BETA_HI), tl.constexpr(vectors.BETA_LO), tl.constexpr(vectors.GAMMA)

ONES = tl.constexpr(16)
"""Columns of ones: the narrowest product of the tensor cores."""


@triton.jit
def _gradient_tile(
    g_ptr, y_ptr, co_ptr, at, mask, real, co_mask, C, BATCH: tl.constexpr, PACKED: tl.constexpr, UPCAST: tl.constexpr
):  # fmt: skip
    """dy (exact) or q (packed) of a tile of pixels and channels; 0 where there is no pixel."""
    g = tl.load(g_ptr + at, mask=mask, other=0.0)
    if PACKED:
        if BATCH:
            y = tl.load(y_ptr + at, mask=mask, other=0.0)
            hi = tl.load(co_ptr + BETA_HI * C, mask=co_mask, other=0.0)[None, :]
            lo = tl.load(co_ptr + BETA_LO * C, mask=co_mask, other=0.0)[None, :]
            gamma = tl.load(co_ptr + GAMMA * C, mask=co_mask, other=0.0)[None, :]
            shape: tl.constexpr = g.shape
            q = packed_gradient(g, y, hi.broadcast_to(shape), lo.broadcast_to(shape), gamma.broadcast_to(shape), UPCAST)
            g = tl.where(real[:, None], q, 0.0).to(g.dtype)
        return g
    dy = g.to(tl.float32) * tl.load(co_ptr, mask=co_mask, other=0.0)[None, :]
    if BATCH:
        y = tl.load(y_ptr + at, mask=mask, other=0.0).to(tl.float32)
        c = tl.where(real[:, None], tl.load(co_ptr + 2 * C, mask=co_mask, other=0.0)[None, :], 0.0)
        dy += y * tl.load(co_ptr + C, mask=co_mask, other=0.0)[None, :] + c
    return round_to(dy, g.dtype, UPCAST)


@triton.jit
def _activation_tile(
    x_ptr, v_ptr, at, ci, inside, ci_mask, C, PROLOGUE: tl.constexpr, PACKED: tl.constexpr, UPCAST: tl.constexpr
):  # fmt: skip
    """act (exact), z (packed) or x of a tile; outside the image the value that stands for activation 0."""
    x = tl.load(x_ptr + at, mask=inside & ci_mask[None, :], other=0.0)
    if PROLOGUE:
        if PACKED:
            shape: tl.constexpr = x.shape
            lo = tl.load(v_ptr + (LO * C + ci), mask=ci_mask, other=0.0)[None, :].broadcast_to(shape)
            hi = tl.load(v_ptr + (HI * C + ci), mask=ci_mask, other=0.0)[None, :].broadcast_to(shape)
            outside = tl.load(v_ptr + (THRESHOLD * C + ci), mask=ci_mask, other=0.0)[None, :]
            z = clamp(x, lo, hi, UPCAST)
            x = tl.where(inside, z, outside.to(z.dtype)).to(x.dtype)
        else:
            scale = tl.load(v_ptr + (SCALE * C + ci), mask=ci_mask, other=0.0)[None, :]
            shift = tl.load(v_ptr + (SHIFT * C + ci), mask=ci_mask, other=0.0)[None, :]
            x = activate(x, scale, shift, inside, True, UPCAST)
    return x


@triton.jit(do_not_specialize=["gemm_m", "H", "W", "Ho", "Wo", "per_split"])
def _conv_wgrad_kernel(
    g_ptr, y_ptr, co_ptr, x_ptr, v_ptr, p_ptr, q_ptr, z_ptr,
    gemm_m, H, W, Ho, Wo, Co, C, x_stride_n, x_stride_h, x_stride_w, per_split,
    CI: tl.constexpr, CO: tl.constexpr, R: tl.constexpr, S: tl.constexpr, COLUMNS: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr, WINDOW: tl.constexpr, BATCH: tl.constexpr, PROLOGUE: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # tile (co, column) of group g over pixels first .. last; CI and CO count channels per group
    tiles_m = tl.cdiv(CO, BLOCK_M)
    pid_m, pid_n = tl.program_id(0) % tiles_m, tl.program_id(0) // tiles_m
    g, split = tl.program_id(1), tl.program_id(2)
    within_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    co, co_mask = g * CO + within_m, within_m < CO
    first, last = split * per_split, min((split + 1) * per_split, gemm_m)

    # columns: channels of one tap, or taps and channels at once
    if WINDOW:
        column = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
        within_n, ci_mask = column % CI, column < COLUMNS
        r, s = column // (S * CI), (column // CI) % S
    else:
        tiles_n: tl.constexpr = (CI + BLOCK_N - 1) // BLOCK_N
        tap = pid_n // tiles_n
        within_n = (pid_n % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
        ci_mask, column = within_n < CI, tap * CI + within_n
        r, s = tap // S + tl.zeros_like(within_n), tap % S + tl.zeros_like(within_n)
    ci = g * CI + within_n
    down, across = r * DIL_H - PAD_H, s * DIL_W - PAD_W
    shift = down * x_stride_h + across * x_stride_w + ci

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    sum_q = tl.zeros((BLOCK_M, ONES), dtype=tl.float32)
    sum_z = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for start in range(first, last, BLOCK_K):
        m = start + tl.arange(0, BLOCK_K)
        real = m < last
        # a = dy or q
        at = row_offset(m, Co)[:, None] + co[None, :]
        a = _gradient_tile(
            g_ptr, y_ptr, co_ptr + co, at, real[:, None] & co_mask[None, :], real, co_mask, Co, BATCH, PACKED, UPCAST
        )
        # b = act, z or x
        n, ho, wo = pixel_of_row(m, Ho, Wo)
        h, w = ho * STRIDE_H, wo * STRIDE_W
        if R * S == 1 and PAD_H + PAD_W == 0:
            inside = real[:, None] & (down >= 0)[None, :]
        else:
            y_in, x_in = h[:, None] + down[None, :], w[:, None] + across[None, :]
            inside = real[:, None] & (y_in >= 0) & (y_in < H) & (x_in >= 0) & (x_in < W)
        rows = row_offset(n, x_stride_n) + (h * x_stride_h + w * x_stride_w)
        b = _activation_tile(
            x_ptr, v_ptr, rows[:, None] + shift[None, :], ci, inside, ci_mask, C, PROLOGUE, PACKED, UPCAST
        )
        if PACKED and BATCH:  # noqa: SIM102 (the outer condition is the compiler's, the inner one the program's)
            if start == first:
                sum_z = tl.sum(tl.where(real[:, None], b.to(tl.float32), 0.0), 0)
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        a = tl.trans(a)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        if PACKED and (BATCH or PROLOGUE):
            ones = tl.full((BLOCK_K, ONES), 1.0, dtype=a.dtype)
            sum_q = tl.dot(a, ones, sum_q, input_precision=PRECISION)

    # the split's tile, and its part of the sums
    mask = co_mask[:, None] & ci_mask[None, :]
    tl.store(p_ptr + row_offset(split * Co + co, COLUMNS)[:, None] + column[None, :], acc, mask=mask)
    if PACKED and (BATCH or PROLOGUE):  # noqa: SIM102
        if pid_n == 0:
            columns = tl.arange(0, ONES)[None, :]
            tl.store(q_ptr + (split * Co + co)[:, None] + columns, sum_q, mask=co_mask[:, None] & (columns == 0))
    if PACKED and BATCH:  # noqa: SIM102
        if pid_m == 0:
            tl.store(z_ptr + (split * tl.num_programs(1) + g) * COLUMNS + column, sum_z, mask=ci_mask)


@triton.jit
def _reduce_splits_kernel(
    p_ptr, q_ptr, z_ptr, coefficients_ptr, v_ptr, dw_ptr, splits, sampled, Co, C, CO, groups,
    COLUMNS: tl.constexpr, CI: tl.constexpr, BATCH: tl.constexpr, PROLOGUE: tl.constexpr, PACKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    co = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    co_mask, column_mask = co < Co, column < COLUMNS
    mask = co_mask[:, None] & column_mask[None, :]
    at = row_offset(co, COLUMNS)[:, None] + column[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    q = tl.zeros((BLOCK_M,), dtype=tl.float32)
    z = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    g = co // CO
    ci = g[:, None] * CI + (column % CI)[None, :]
    for split in range(0, splits):
        total += tl.load(p_ptr + row_offset(split * Co, COLUMNS) + at, mask=mask, other=0.0)
        if PACKED and (BATCH or PROLOGUE):
            q += tl.load(q_ptr + split * Co + co, mask=co_mask, other=0.0)
        if PACKED and BATCH:
            z += tl.load(z_ptr + (split * groups + g)[:, None] * COLUMNS + column[None, :], mask=mask, other=0.0)
    if PACKED:
        if BATCH:
            total -= q[:, None] * (z / sampled)
        elif PROLOGUE:
            total -= q[:, None] * tl.load(v_ptr + THR * C + ci, mask=mask, other=0.0)
        total *= tl.load(coefficients_ptr + co, mask=co_mask, other=0.0)[:, None]
        if PROLOGUE:
            total *= tl.load(v_ptr + FOLD * C + ci, mask=mask, other=0.0)
    tl.store(dw_ptr + at, total, mask=mask)


def splits_of(launch: LaunchSpec, config: Config, sms: int) -> tuple[int, int]:
    """(splits, pixels per split): about two programs per multiprocessor, each of at least four K steps."""
    rows, columns, pixels, products = gemm(launch)
    tiles = -(-rows // config.block_m) * -(-columns // config.block_n) * products
    steps = -(-pixels // config.block_k)
    splits = max(1, min(-(-2 * sms // tiles), steps // 4))
    per_split = -(-steps // splits) * config.block_k
    return -(-pixels // per_split), per_split


def conv_wgrad(launch: LaunchSpec, config: Config, grad: Grad, x: Act, sms: int) -> Tensor:
    """dW (Co, Ci/groups, R, S) fp32, in the memory order (Co, R, S, Ci/groups). ``sms``: multiprocessors to fill."""
    conv, groups = launch.last, merged_groups(launch.last)
    ci, co, taps = conv.ci // groups, conv.co // groups, conv.r * conv.s
    window, packed = ci < MIN_CHANNELS, config.packed
    columns = taps * ci
    splits, per_split = splits_of(launch, config, sms)
    tiles_n = -(-columns // config.block_n) if window else taps * -(-ci // config.block_n)
    new = grad.coefficients.new_empty
    p = new(splits, conv.co, columns)
    q = new(splits, conv.co) if packed else None
    z = new(splits, groups, columns) if packed and grad.batch else None
    rows = (x.clamp if packed else x.vectors) if launch.prologue else None
    _conv_wgrad_kernel[(-(-co // config.block_m) * tiles_n, groups, splits)](
        grad.g, grad.y, grad.packed if packed else grad.coefficients, x.y, rows, p, q, z,
        conv.gemm_m, conv.h, conv.w, conv.ho, conv.wo, conv.co, conv.ci,
        x.y.stride(0), x.y.stride(2), x.y.stride(3), per_split,
        CI=ci, CO=co, R=conv.r, S=conv.s, COLUMNS=columns, **steps_of(conv),
        WINDOW=window, BATCH=grad.batch, PROLOGUE=launch.prologue,
        PACKED=packed, BLOCK_N=config.block_n, **product(conv, config, x.y.dtype),
    )  # fmt: skip
    dw = new(conv.co, columns)
    sampled = sum(min(config.block_k, conv.gemm_m - i * per_split) for i in range(splits))
    _reduce_splits_kernel[(-(-conv.co // 16), -(-columns // 128))](
        p, q, z, grad.coefficients, x.vectors if launch.prologue else None, dw,
        splits, sampled, conv.co, conv.ci, co, groups,
        COLUMNS=columns, CI=ci, BATCH=grad.batch, PROLOGUE=launch.prologue, PACKED=packed, BLOCK_M=16, BLOCK_N=128,
    )  # fmt: skip
    return _own_channels(dw.view(conv.co, conv.r, conv.s, ci), conv.groups, groups).permute(0, 3, 1, 2)


def _own_channels(dw: Tensor, groups: int, merged: int) -> Tensor:
    """(Co, R, S, Ci/merged) -> (Co, R, S, Ci/groups): each output channel's own group out of its merged one."""
    if groups == merged:
        return dw
    co, r, s, wide = dw.shape
    merge = groups // merged
    own = wide // merge
    parts = dw.view(merged, merge, co // groups, r, s, merge, own)
    return torch.stack([parts[:, i, :, :, :, i] for i in range(merge)], 1).reshape(co, r, s, own)
