r"""Gradient of a convolution's input in a training step, fused with two BatchNorms.

The prologue differentiates the BatchNorm that follows the convolution, as dy is read. The epilogue applies the mask of
the ReLU before the convolution, and gathers the sums of the BatchNorm before that.

    dy = A*g + B*y + C                                    exact: fp32, rounded         (vectors.py)
    dy = A*q,  q = g + (BETA*y + GAMMA)                   packed: 16-bit pairs; A is in wt, pack.py
    dx[n, h, w, ci] = sum_rs sum_co dy[n, (h + pad - r*dil)/stride, (w + pad - s*dil)/stride, co] * wt[ci, r, s, co]
                      + add + add_strided[n, h/sh, w/sw, ci]      over divisible taps and pixels inside the image
    dx = round(dx) where the ReLU below let y_below pass, else 0
    sums[:, t, ci] = sum dx, sum dx * (y_below - MEAN) over tile t                          of dx as stored

    g, y (N, Ho, Wo, Co)   wt (Ci, R, S, Co/groups)   coefficients (3, Co)   packed (4, Co)
    dx, add, y_below (N, H, W, Ci)

Saved bytes. Stock writes dy and reads it twice, writes dx, reads it for the ReLU, writes and reads the result for the
sums, and adds a shortcut's gradient in a separate pass. Here g and y are read once, and dx is written once.

GEMM. Rows are input pixels, columns Ci/groups, products taps x Co/groups: a step of the one loop is a tap and BLOCK_K
channels. With strides, the pixels of one phase (h mod stride, w mod stride) share their taps, so each phase has its own
tiles and multiplies no zeros. The tiles of a region's phases are neighbours, because they read the same dy:

    stride 2, pad 1, 3x3        h even: tap 1                     a tile: BLOCK_M pixels of one phase, one of
      0 1 0 1 0 1               h odd:  taps 0, 2                 1, 2, 2 or 4 taps. A 1x1 leaves three phases
      2 3 2 3 2 3   phases                                        without taps; they write what is added, or 0.
      0 1 0 1 0 1               tap r reads row (h + 1 - r)/2     Dilation: every (stride/gcd)th tap of a phase.

Padding. A tap outside the image adds nothing, so g + (BETA*y + GAMMA) must be 0 there: y reads as 0 and g as -GAMMA,
because the load of g is redirected to the row NEG_GAMMA, which costs two selects per 16 bytes. (A GAMMA of NaN
reaches pixels that have all their taps outside.) One word of bits per row, built before the loop, says which taps are
inside.

Epilogue. ``tl.split`` of even and odd rows moves the tile out of the tensor cores' layout (conv_fwd.py): afterwards a
thread holds 16 bytes of a row, a column is in registers, and the rest is wide accesses and additions.

Folded norms (fold.py). dy is g itself, the input below is an activation z, and the mask is z > 0: there are no vectors
and no sums.

Saved launches. The first dgrad of a call takes along the programs that add the splits of the last wgrad (wgrad_sum.py).
They go behind its tiles; conv_wgrad.py says why.

Numerics: tiles.py. Added tensors are summed in fp32, before the one rounding. Deterministic: no atomics.
Limits: tuning/training_configs.py. Alone: ``TRITON_INTERPRET=1 python -m pytest
tests/backends/triton/training/test_conv_dgrad.py``.
"""

from __future__ import annotations

from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....spec import ConvSpec, LaunchSpec
from ....tuning.configs import Config
from ....tuning.routes import merged_groups
from ..launch import address_of, alignment, empty_nhwc, product, steps_of, submit
from ..tiles import multiply, pixel_of_row, round_to, row_offset, tile_of_program
from . import vectors
from .conv_fwd import clamp, inside_bits
from .pack import Passenger
from .vectors import Act, Grad
from .wgrad_sum import NO_REDUCTION, reduce_splits_program

MEAN, SCALE, SHIFT = tl.constexpr(vectors.MEAN), tl.constexpr(vectors.SCALE), tl.constexpr(vectors.SHIFT)
LO, HI, THRESHOLD = tl.constexpr(vectors.LO), tl.constexpr(vectors.HI), tl.constexpr(vectors.THRESHOLD)
A, B, C = tl.constexpr(vectors.A), tl.constexpr(vectors.B), tl.constexpr(vectors.C)
BETA_HI, BETA_LO, GAMMA = tl.constexpr(vectors.BETA_HI), tl.constexpr(vectors.BETA_LO), tl.constexpr(vectors.GAMMA)

HALF_WORD = tl.constexpr(16)
"""Most taps per axis that half a word of bits can describe; longer filters compare at every step."""


@triton.jit
def packed_gradient(g, y, beta_hi, beta_lo, gamma, UPCAST: tl.constexpr):
    """Return g + (BETA*y + GAMMA) in the dtype of ``g``: two fused multiply-adds and an addition per element pair."""
    if UPCAST:
        y, dtype = y.to(tl.float32), g.dtype
        inner = round_to(y * beta_lo.to(tl.float32) + gamma.to(tl.float32), dtype, UPCAST).to(tl.float32)
        outer = round_to(y * beta_hi.to(tl.float32) + inner, dtype, UPCAST).to(tl.float32)
        return round_to(g.to(tl.float32) + outer, dtype, UPCAST)
    return g + tl.fma(y, beta_hi, tl.fma(y, beta_lo, gamma))


@triton.jit
def channel_row(ptr, c, mask, ROW: tl.constexpr, C_ALL: tl.constexpr, EVEN: tl.constexpr):
    """Load channels ``c`` of row ROW of the vectors, (1, channels); EVEN: all channels exist, so no mask is needed."""
    at = ptr + ROW * C_ALL + c
    return (tl.load(at) if EVEN else tl.load(at, mask=mask, other=0.0))[None, :]


@triton.jit
def next_tap(first, i, j, taps_w, CO: tl.constexpr, BLOCK_K: tl.constexpr):
    """Return the step after channels ``first`` of tap (i, j); it is carried along because a division costs more.

    Without batch statistics a step has issue slots to spare, and divides: carried numbers spill there (sm_80, 3x3).
    """
    first += BLOCK_K
    j = tl.where(first >= CO, j + 1, j)
    first = tl.where(first >= CO, 0, first)
    i = tl.where(j == taps_w, i + 1, i)
    return first, i, tl.where(j == taps_w, 0, j)


@triton.jit
def gradient_step(
    g_ptr, y_ptr, at, k, k_mask, inside, vectors_ptr, outside_ptr,
    CO: tl.constexpr, C_OUT: tl.constexpr, PADDED: tl.constexpr, PACKED: tl.constexpr, BATCH: tl.constexpr,
    ALIGN: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Return dy (exact) or q (packed) of a step, (rows, channels ``k``); 0 where not ``inside`` (rows, 1).

    ``at``: elements from ``g_ptr`` and ``y_ptr``. EVEN_K: the step ends within the channels, so no mask is needed.
    """
    mask = inside if EVEN_K else inside & k_mask
    if PADDED and PACKED and BATCH:
        g_at = tl.where(inside, g_ptr + at, outside_ptr + k[None, :])
        g_at = tl.max_contiguous(tl.multiple_of(g_at, (ALIGN, ALIGN)), (1, BLOCK_K))
        a = tl.load(g_at) if EVEN_K else tl.load(g_at, mask=k_mask, other=0.0)
    else:
        a = tl.load(g_ptr + at, mask=mask, other=0.0)
    if BATCH:
        y = tl.load(y_ptr + at, mask=mask, other=0.0)
    if PACKED and BATCH:
        beta_hi = channel_row(vectors_ptr, k, k < CO, BETA_HI, C_OUT, EVEN_K)
        beta_lo = channel_row(vectors_ptr, k, k < CO, BETA_LO, C_OUT, EVEN_K)
        gamma = channel_row(vectors_ptr, k, k < CO, GAMMA, C_OUT, EVEN_K)
        a = packed_gradient(a, y, beta_hi, beta_lo, gamma, UPCAST)
    elif not PACKED:
        dy = a.to(tl.float32) * channel_row(vectors_ptr, k, k < CO, A, C_OUT, EVEN_K)
        if BATCH:
            shift = channel_row(vectors_ptr, k, k < CO, C, C_OUT, EVEN_K)
            if PADDED:
                shift = tl.where(inside, shift, 0.0)
            dy += y.to(tl.float32) * channel_row(vectors_ptr, k, k < CO, B, C_OUT, EVEN_K) + shift
        a = round_to(dy, a.dtype, UPCAST)
    return a


@triton.jit
def accumulate_gradient(
    acc, g_ptr, y_ptr, rows, ho, wo, row_mask, w_rows, w_mask, vectors_ptr, outside_ptr, taps_h, taps_w, Ho, Wo,
    CO: tl.constexpr, C_OUT: tl.constexpr, S: tl.constexpr, TAPS_H: tl.constexpr, TAPS_W: tl.constexpr,
    STEP_H: tl.constexpr, STEP_W: tl.constexpr, BACK_H: tl.constexpr, BACK_W: tl.constexpr,
    PADDED: tl.constexpr, PACKED: tl.constexpr, BATCH: tl.constexpr, ALIGN: tl.constexpr, EVEN_N: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Return acc plus ``taps_h`` x ``taps_w`` taps (at most TAPS_H x TAPS_W) of dy, starting at pixel (ho, wo).

    The next tap is BACK pixels up or left in dy, and STEP taps further in wt. ``rows``: elements from ``g_ptr`` and
    ``y_ptr`` to a row's pixel (ho, wo). ``vectors_ptr``: row 0 of ``packed`` or ``coefficients`` at the group's first
    channel.
    """
    blocks: tl.constexpr = (CO + BLOCK_K - 1) // BLOCK_K
    EVEN_K: tl.constexpr = CO % BLOCK_K == 0
    WORD: tl.constexpr = TAPS_H <= HALF_WORD and TAPS_W <= HALF_WORD
    lane = tl.arange(0, BLOCK_K)
    rows = rows[:, None] + lane[None, :]
    w_rows = w_rows[:, None] + lane[None, :]
    if PADDED and WORD:
        outside = ~inside_bits(ho, Ho, row_mask, TAPS_H, -BACK_H) & 0xFFFF
        outside |= ~inside_bits(wo, Wo, row_mask, TAPS_W, -BACK_W) << HALF_WORD
    first, i, j = tl.full((), 0, tl.int32), tl.full((), 0, tl.int32), tl.full((), 0, tl.int32)
    for step in range(0, taps_h * taps_w * blocks):
        # channels ``first`` and on of tap (i, j)
        if not BATCH and TAPS_H * TAPS_W > 1:
            tap = step // blocks
            first, i, j = step % blocks * BLOCK_K, tap // taps_w, tap % taps_w
        k = first + lane
        if not PADDED:
            inside = row_mask[:, None]
        elif WORD:
            inside = ((outside & ((1 << i) | (1 << (j + HALF_WORD)))) == 0)[:, None]
        else:
            y_in, x_in = ho - i * BACK_H, wo - j * BACK_W
            inside = (row_mask & (y_in >= 0) & (y_in < Ho) & (x_in >= 0) & (x_in < Wo))[:, None]
        at = rows + (first - (i * BACK_H * Wo + j * BACK_W) * C_OUT)
        w_at = w_rows + ((i * STEP_H * S + j * STEP_W) * CO + first)
        k_mask = (k < CO)[None, :]
        # b = wt[ci, r, s, k]
        if not EVEN_K:
            b = tl.load(w_at, mask=w_mask[:, None] & k_mask, other=0.0)
        elif not EVEN_N:
            b = tl.load(w_at, mask=w_mask[:, None], other=0.0)
        else:
            b = tl.load(w_at)
        # a = dy[n, ho - i*back, wo - j*back, k], 0 outside the image
        a = gradient_step(
            g_ptr, y_ptr, at, k, k_mask, inside, vectors_ptr, outside_ptr,
            CO, C_OUT, PADDED, PACKED, BATCH, ALIGN, EVEN_K, BLOCK_K, UPCAST,
        )  # fmt: skip
        acc = multiply(a, b, acc, PRECISION, UPCAST)
        if TAPS_H * TAPS_W == 1:
            first += BLOCK_K
        elif BATCH:
            first, i, j = next_tap(first, i, j, taps_w, CO, BLOCK_K)
    return acc


@triton.jit
def finish_rows(
    tile, m, ph, pw, Hp, Wp, ci, ci_mask, add_ptr, strided_ptr, below_ptr, clamp_ptr, vectors_ptr, dx_ptr,
    images, H, W, Hs, Ws, C_IN: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    ADD_H: tl.constexpr, ADD_W: tl.constexpr, BELOW_PACKED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Store rows ``m`` of a phase: tile + add + add_strided, rounded, with the mask of the ReLU below.

    ``tile`` is fp32, or already rounded if nothing is added. Returns dx and dx * (y_below - MEAN) in fp32, 0 after the
    last row.
    """
    dtype: tl.constexpr = dx_ptr.dtype.element_ty
    row_mask = m < images * Hp * Wp
    n, h, w = pixel_of_row(m, tl.maximum(Hp, 1), tl.maximum(Wp, 1))
    h, w = ph + h * STRIDE_H, pw + w * STRIDE_W
    pixel = m if STRIDE_H * STRIDE_W == 1 else (n * H + h) * W + w
    at = row_offset(pixel, C_IN)[:, None] + ci[None, :]
    mask = row_mask[:, None] & ci_mask[None, :]
    if add_ptr is not None:
        tile += tl.load(add_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if strided_ptr is not None:
        touched = (row_mask & (h % ADD_H == 0) & (w % ADD_W == 0))[:, None] & ci_mask[None, :]
        compact = row_offset((n * Hs + h // ADD_H) * Ws + w // ADD_W, C_IN)[:, None] + ci[None, :]
        tile += tl.load(strided_ptr + compact, mask=touched, other=0.0).to(tl.float32)
    if add_ptr is not None or strided_ptr is not None:
        tile = round_to(tile, dtype, UPCAST)
    if below_ptr is None:
        tl.store(dx_ptr + at, tile, mask=mask)
        wide, product = tile, tile
    elif vectors_ptr is None:
        z = tl.load(below_ptr + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + at, tl.where(z <= 0.0, 0.0, tile), mask=mask)
        wide, product = tile, tile
    else:
        y = tl.load(below_ptr + at, mask=mask, other=0.0)
        if BELOW_PACKED:
            lo = channel_row(clamp_ptr, ci, ci_mask, LO, C_IN, False)
            hi = channel_row(clamp_ptr, ci, ci_mask, HI, C_IN, False)
            threshold = channel_row(clamp_ptr, ci, ci_mask, THRESHOLD, C_IN, False)
            passes = clamp(y, lo, hi, UPCAST) != (threshold.to(tl.float32) if UPCAST else threshold)
        else:
            scale = channel_row(vectors_ptr, ci, ci_mask, SCALE, C_IN, False)
            passes = ~(y.to(tl.float32) * scale + channel_row(vectors_ptr, ci, ci_mask, SHIFT, C_IN, False) <= 0.0)
        dx = tl.where(passes & mask, tile, 0.0)
        tl.store(dx_ptr + at, dx, mask=mask)
        mean = channel_row(vectors_ptr, ci, ci_mask, MEAN, C_IN, False)
        wide = dx.to(tl.float32)
        product = wide * (y.to(tl.float32) - mean)
    return wide, product


@triton.jit
def taps_of_phase(
    h, w, R: tl.constexpr, S: tl.constexpr, GCD_H: tl.constexpr, GCD_W: tl.constexpr,
    INVERSE_H: tl.constexpr, INVERSE_W: tl.constexpr, STEP_H: tl.constexpr, STEP_W: tl.constexpr,
    PHASES: tl.constexpr,
):  # fmt: skip
    """Return (first tap r, first tap s, taps along H, taps along W) of the phase of padded pixel (h, w).

    Tap r reads dy where h - r*dil is divisible by the stride, which requires h to be divisible by GCD.
    """
    r, s = h // GCD_H * INVERSE_H % STEP_H, w // GCD_W * INVERSE_W % STEP_W
    if PHASES == 1:
        taps_h, taps_w = R, S
    else:
        real = (h % GCD_H == 0) & (w % GCD_W == 0)
        taps_h, taps_w = tl.where(real, (R - r + (STEP_H - 1)) // STEP_H, 0), (S - s + (STEP_W - 1)) // STEP_W
    return r, s, taps_h, taps_w


@triton.jit
def dgrad_program(
    g_ptr, y_ptr, wt_ptr, grad_ptr, outside_ptr, add_ptr, strided_ptr, below_ptr, clamp_ptr, vectors_ptr,
    dx_ptr, partials_ptr, tiles_m, images, H, W, Ho, Wo, Hs, Ws,
    CO: tl.constexpr, CI: tl.constexpr, GROUPS: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr, GCD_H: tl.constexpr, GCD_W: tl.constexpr,
    INVERSE_H: tl.constexpr, INVERSE_W: tl.constexpr, ADD_H: tl.constexpr, ADD_W: tl.constexpr,
    PADDED: tl.constexpr, PACKED: tl.constexpr, BATCH: tl.constexpr, BELOW_PACKED: tl.constexpr,
    ALIGN: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Compute a tile of dx and its sums."""
    # tile (pid_m, pid_n) of group g; CO and CI count channels per group, C_OUT and C_IN all of them
    C_OUT: tl.constexpr = CO * GROUPS
    C_IN: tl.constexpr = CI * GROUPS
    PHASES: tl.constexpr = STRIDE_H * STRIDE_W
    TILES_N: tl.constexpr = (CI + BLOCK_N - 1) // BLOCK_N
    pid_m, pid_n = tile_of_program(tl.program_id(0), tiles_m * PHASES, TILES_N, GROUP_M)
    g = tl.program_id(1)
    within = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    ci, ci_mask = g * CI + within, within < CI

    # rows: the pixels (n, h, w) of a phase, Hp x Wp per image
    phase, first_m = pid_m % PHASES, pid_m // PHASES * BLOCK_M
    ph, pw = phase // STRIDE_W, phase % STRIDE_W
    Hp, Wp = (H - ph + (STRIDE_H - 1)) // STRIDE_H, (W - pw + (STRIDE_W - 1)) // STRIDE_W
    m = first_m + tl.arange(0, BLOCK_M)
    row_mask = m < images * Hp * Wp
    n, h, w = pixel_of_row(m, tl.maximum(Hp, 1), tl.maximum(Wp, 1))
    h, w = ph + h * STRIDE_H, pw + w * STRIDE_W

    # its taps: r, r + STEP, ... and s, s + STEP, ...
    STEP_H: tl.constexpr = STRIDE_H // GCD_H
    STEP_W: tl.constexpr = STRIDE_W // GCD_W
    r, s, taps_h, taps_w = taps_of_phase(
        ph + PAD_H, pw + PAD_W, R, S, GCD_H, GCD_W, INVERSE_H, INVERSE_W, STEP_H, STEP_W, PHASES
    )

    # tap r reads dy at (h + pad - r*dil) / stride; offsets count from the tile's first image
    ho, wo = (h + PAD_H - r * DIL_H) // STRIDE_H, (w + PAD_W - s * DIL_W) // STRIDE_W
    first_n = first_m // tl.maximum(Hp * Wp, 1)
    start = row_offset(first_n, Ho * Wo * C_OUT) + g * CO
    images_on = (n - first_n).to(tl.int64) if WIDE else n - first_n
    rows = images_on * (Ho * Wo * C_OUT) + (ho * Wo + wo) * C_OUT
    if BATCH:
        y_ptr += start
    if PADDED and PACKED and BATCH:
        outside_ptr += g * CO

    # tile = sum over taps and channels
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    acc = accumulate_gradient(
        acc, g_ptr + start, y_ptr, rows, ho, wo, row_mask, wt_ptr + (ci * (R * S) + (r * S + s)) * CO, ci_mask,
        grad_ptr + g * CO if grad_ptr is not None else None, outside_ptr, taps_h, taps_w, Ho, Wo,
        CO, C_OUT, S, (R + STEP_H - 1) // STEP_H, (S + STEP_W - 1) // STEP_W, STEP_H, STEP_W,
        DIL_H // GCD_H, DIL_W // GCD_W, PADDED, PACKED, BATCH, ALIGN, CI % BLOCK_N == 0, BLOCK_K, PRECISION, UPCAST,
    )  # fmt: skip

    # dx = round(tile + added) where below passes
    if add_ptr is None and strided_ptr is None:
        acc = round_to(acc, dx_ptr.dtype.element_ty, UPCAST)  # half the bytes in the change of layout
    even, odd = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M // 2, 2, BLOCK_N)), (0, 2, 1)))
    m = first_m + 2 * tl.arange(0, BLOCK_M // 2)
    even, even_y = finish_rows(
        even, m, ph, pw, Hp, Wp, ci, ci_mask, add_ptr, strided_ptr, below_ptr, clamp_ptr, vectors_ptr, dx_ptr,
        images, H, W, Hs, Ws, C_IN, STRIDE_H, STRIDE_W, ADD_H, ADD_W, BELOW_PACKED, UPCAST,
    )  # fmt: skip
    odd, odd_y = finish_rows(
        odd, m + 1, ph, pw, Hp, Wp, ci, ci_mask, add_ptr, strided_ptr, below_ptr, clamp_ptr, vectors_ptr, dx_ptr,
        images, H, W, Hs, Ws, C_IN, STRIDE_H, STRIDE_W, ADD_H, ADD_W, BELOW_PACKED, UPCAST,
    )  # fmt: skip

    # partials[0, t, ci], partials[1, t, ci] = sum dx, sum dx * (y_below - MEAN)
    if partials_ptr is not None:
        out = partials_ptr + (row_offset(pid_m, C_IN) + ci)
        tl.store(out, tl.sum(even + odd, 0), mask=ci_mask)
        tl.store(out + row_offset(tiles_m * PHASES, C_IN), tl.sum(even_y + odd_y, 0), mask=ci_mask)


@triton.jit(do_not_specialize=[
    "tiles_m", "images", "H", "W", "Ho", "Wo", "Hs", "Ws", "own", "splits", "idle"
])  # fmt: skip
def _conv_dgrad_kernel(
    g_ptr, y_ptr, wt_ptr, grad_ptr, outside_ptr, add_ptr, strided_ptr, below_ptr, clamp_ptr, vectors_ptr,
    dx_ptr, partials_ptr, tiles_m, images, H, W, Ho, Wo, Hs, Ws, own,
    sum_p_ptr, sum_q_ptr, sum_z_ptr, sum_coefficients_ptr, sum_grad_ptr, sum_v_ptr, sum_act_ptr, dw_ptr,
    splits, idle, dw_stride_co, dw_stride_ci, dw_stride_r, dw_stride_s,
    CO: tl.constexpr, CI: tl.constexpr, GROUPS: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr, GCD_H: tl.constexpr, GCD_W: tl.constexpr,
    INVERSE_H: tl.constexpr, INVERSE_W: tl.constexpr, ADD_H: tl.constexpr, ADD_W: tl.constexpr,
    PADDED: tl.constexpr, PACKED: tl.constexpr, BATCH: tl.constexpr, BELOW_PACKED: tl.constexpr,
    ALIGN: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    P_CI: tl.constexpr, P_CO: tl.constexpr, P_GROUPS: tl.constexpr, P_OWN_CI: tl.constexpr, P_OWN_CO: tl.constexpr,
    P_R: tl.constexpr, P_S: tl.constexpr, P_BATCH: tl.constexpr, P_PROLOGUE: tl.constexpr, P_PACKED: tl.constexpr,
    P_PADDED: tl.constexpr, P_WINDOW: tl.constexpr, P_BLOCK_M: tl.constexpr, P_BLOCK_N: tl.constexpr,
):  # fmt: skip
    if sum_p_ptr is not None:  # noqa: SIM102 (the compiler decides the outer condition, the program the inner one)
        if tl.program_id(0) >= own:
            reduce_splits_program(
                (tl.program_id(0) - own) * GROUPS + tl.program_id(1),
                sum_p_ptr, sum_q_ptr, sum_z_ptr, sum_coefficients_ptr, sum_grad_ptr, sum_v_ptr, sum_act_ptr, dw_ptr,
                splits, idle, dw_stride_co, dw_stride_ci, dw_stride_r, dw_stride_s, P_CI, P_CO, P_GROUPS, P_OWN_CI,
                P_OWN_CO, P_R, P_S, P_BATCH, P_PROLOGUE, P_PACKED, P_PADDED, P_WINDOW, P_BLOCK_M, P_BLOCK_N,
            )  # fmt: skip
            return
    dgrad_program(
        g_ptr, y_ptr, wt_ptr, grad_ptr, outside_ptr, add_ptr, strided_ptr, below_ptr, clamp_ptr, vectors_ptr,
        dx_ptr, partials_ptr, tiles_m, images, H, W, Ho, Wo, Hs, Ws, CO, CI, GROUPS, R, S, STRIDE_H, STRIDE_W,
        PAD_H, PAD_W, DIL_H, DIL_W, GCD_H, GCD_W, INVERSE_H, INVERSE_W, ADD_H, ADD_W, PADDED, PACKED, BATCH,
        BELOW_PACKED, ALIGN, WIDE, PRECISION, UPCAST, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M,
    )  # fmt: skip


def conv_dgrad(
    launch: LaunchSpec,
    config: Config,
    wt: Tensor,
    grad: Grad,
    below: Act | None,
    below_packed: bool,
    add: Tensor | None,
    add_strided: tuple[Tensor, tuple[int, int]] | None,
    compact: bool = False,
    reduction: Passenger = NO_REDUCTION,
) -> tuple[Tensor, Tensor | None]:
    """Compute the gradient of a convolution's input, and sums by tile for the BatchNorm before it. Deterministic.

    All tensors are dense NHWC.

    Args:
        launch: a launch of kernel ``conv_dgrad``.
        config: its tiles.
        wt: (Ci, R, S, Co/groups) of :func:`pack_dgrad`, with A if ``config.packed``.
        grad: the gradient of the raw output (N, Co, Ho, Wo), read through ``packed`` if ``config.packed``, otherwise
            through ``coefficients`` if there are any.
        below: the raw input (N, Ci, H, W) that the convolution read through a norm and ReLU, or, without vectors, the
            activation that it read; None if no ReLU is before it.
        below_packed: whether it was read through its ``clamp``.
        add: (N, Ci, H, W), added everywhere, or None.
        add_strided: (N, Ci, Hs, Ws) and (sh, sw), added at every sh-th row and sw-th column, or None.
        compact: for a 1x1 with strides and without padding: compute dx of the pixels that it read only.
        reduction: of :func:`conv_wgrad.conv_wgrad`, to take along.

    Returns:
        dx (N, Ci, H, W), or (N, Ci, Ho, Wo) if ``compact``, in the dtype of g; with a raw ``below`` also partials
        (2, tiles, Ci) fp32, sum dx and sum dx * (y - MEAN), otherwise None.
    """
    conv, groups, g = launch.last, merged_groups(launch.last), grad.g
    if compact:
        conv = conv.with_(h=conv.ho, w=conv.wo, stride=(1, 1))
    ci, co, (sh, sw) = conv.ci // groups, conv.co // groups, conv.stride
    tiles_m = -(-conv.n * -(-conv.h // sh) * -(-conv.w // sw) // config.block_m)
    tiles = tiles_m * sh * sw
    dx = empty_nhwc(g, conv.n, conv.ci, conv.h, conv.w)
    raw = below is not None and below.vectors is not None
    partials = g.new_empty((2, tiles, conv.ci), dtype=torch.float32) if raw else None
    padded = (conv.r, conv.s, *conv.stride, *conv.padding) != (1, 1, 1, 1, 0, 0)
    outside = grad.packed[vectors.NEG_GAMMA] if padded and config.packed and grad.batch else None  # type: ignore[index]
    bases = () if outside is None else (address_of(g), address_of(outside))
    strided, (add_h, add_w) = add_strided or (None, (1, 1))
    geometry = [_phases(stride, dilation) for stride, dilation in zip(conv.stride, conv.dilation, strict=True)]
    own = tiles * -(-ci // config.block_n)
    submit(
        _conv_dgrad_kernel, (own + -(-reduction.programs // groups), groups),
        g, grad.y if grad.batch else None, wt, grad.vectors(config.packed), outside,
        add, strided, None if below is None else below.y,
        below.clamp if below is not None and below_packed else None, None if below is None else below.vectors,
        dx, partials, tiles_m, conv.n, conv.h, conv.w, conv.ho, conv.wo,
        *((1, 1) if strided is None else strided.shape[2:]), own, *reduction.arguments,
        CO=co, CI=ci, GROUPS=groups, R=conv.r, S=conv.s, **steps_of(conv),
        GCD_H=geometry[0][0], GCD_W=geometry[1][0], INVERSE_H=geometry[0][1], INVERSE_W=geometry[1][1],
        ADD_H=add_h, ADD_W=add_w, PADDED=padded, PACKED=config.packed or launch.folded, BATCH=grad.batch,
        BELOW_PACKED=below_packed, ALIGN=alignment(g.element_size(), co * g.element_size(), *bases),
        WIDE=_wide(conv, config), BLOCK_N=config.block_n, GROUP_M=config.group_m, **product(conv, config, g.dtype),
        **reduction.constants,
    )  # fmt: skip
    return dx, partials


def _phases(stride: int, dilation: int) -> tuple[int, int]:
    """Return (gcd of both, inverse of dilation/gcd modulo stride/gcd), which determine a phase's taps."""
    common = gcd(stride, dilation)
    step = stride // common
    return common, pow(dilation // common, -1, step) if step > 1 else 0


def _wide(conv: ConvSpec, config: Config) -> bool:
    """Return whether a tile spans 2^31 or more elements of dy; with small images it spans many of them."""
    per_image = max(1, (conv.h // conv.stride[0]) * (conv.w // conv.stride[1]))
    images = min(conv.n, config.block_m // per_image + 2)
    return images * conv.ho * conv.wo * conv.co >= 1 << 31
