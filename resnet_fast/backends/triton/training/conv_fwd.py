r"""Forward convolution of a training step, with the BatchNorm and ReLU before it and the statistics for the next one.

    y[m, co] = round( sum_rs sum_ci act(x)[n, ho*stride - pad + r*dil, wo*stride - pad + s*dil, ci] * w[co, r, s, ci]
                      + const[co] - (centre[co] - bias[co]) )                           m = (n, ho, wo)
    mean[t, co], M2[t, co] = mean of y and sum of (y - mean)^2 over tile t's rows         statistics of y as stored

    x (N, H, W, Ci)   w (Co, R, S, Ci/groups), pack.py   const (Co) fp32   centre, bias (Co)   y (N, Ho, Wo, Co)
    act(x): nothing | relu(SCALE*x + SHIFT) in fp32, rounded (exact) | clamp(x) in 16-bit pairs (packed), vectors.py

Saved bytes. Stock runs three kernels per convolution: it writes y, reads it for the statistics, reads it again and
writes the activation. Here y is written once, plus 8 bytes per channel and tile. The activation is never written: the
next convolution computes it from y as it reads.

GEMM. gemm_m = N*Ho*Wo, gemm_n = Co/groups, gemm_k = R*S*Ci/groups: a step of the one loop is a tap and BLOCK_K channels
of it (fewer than 16 channels: one axis of taps and channels, conv_bn_act.py). Groups are the grid's second axis.

           BLOCK_K channels of a tap           co                 rows even | odd          one column of a thread:
         +-----------------------+          +------+             +----------+----------+   every eighth row or so,
    rows | x -> registers ->     |  @  w -> | acc  | -> round -> | registers, a column |   summed without a shuffle
     m   | clamp -> tensor core  |          +------+    |        | or two per thread   | -> mean, M2 of the tile
         +-----------------------+                      +-> y    +----------+----------+

Padding. A pixel outside the image is activation 0, which a packed prologue reads as THR (vectors.py). Instead of
replacing elements, its load is redirected to the row THRESHOLD of the ``clamp`` tensor: two selects per 16 bytes, and
nothing per element. A word of bits per row, R for h and S for w, built before the loop, says which taps are inside.

Statistics. Two passes over the registers, first the mean, then M2 around it, are safe even if |mean| is a hundred
standard deviations. In the layout of the tensor cores' accumulator a column is spread over the lanes of a warp, which
costs three shuffles per register and pass. ``tl.split`` of even and odd rows makes the compiler move the 16-bit tile
through shared memory into a layout with columns in registers.

Numerics: tiles.py. ``const - (centre - bias)`` is added in fp32 before the one rounding. A difference that is not
finite, or too large for a 16-bit tensor, counts as 0, so that a bad running mean does not spoil the batch. Limits:
tuning/training_configs.py.
Alone: ``TRITON_INTERPRET=1 python -m pytest tests/backends/triton/training/test_conv_fwd.py``.

Tried, compiled for sm_90 (issue slots per scheduler and K step of a 3x3; tensor cycles in brackets):
    128x128x64 [512]: packed 342; with padding replaced after the load 440 (as a 1x1); exact 690 with ``where``, 614
    with a minimum per row; two compares per axis for the padding instead of bits: 60 more in any prologue.
    Epilogue of a 128x128 tile: 1,680 slots without statistics, 4,490 with sums over the accumulator's layout, 3,230
    with ``tl.split``, 2,990 with row weights in place of selects; reading y back from memory instead: 2,960.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....spec import LaunchSpec
from ....tuning.configs import Config
from ....tuning.routes import MIN_CHANNELS, merged_groups
from ..launch import INTERPRETED, address_of, alignment, grid_of, new_output, product, steps_of, submit
from ..tiles import multiply, pixel_of_row, relu, round_to, row_offset, rows_and_channels, tile_of_program
from . import vectors
from .vectors import Act

SCALE, SHIFT = tl.constexpr(vectors.SCALE), tl.constexpr(vectors.SHIFT)
LO, HI, THRESHOLD = tl.constexpr(vectors.LO), tl.constexpr(vectors.HI), tl.constexpr(vectors.THRESHOLD)

COMPILED = tl.constexpr(not INTERPRETED)

CLAMP_BF16 = tl.constexpr("{ .reg .b32 t; max.NaN.bf16x2 t, $1, $2; min.NaN.bf16x2 $0, t, $3; }")
CLAMP_FP16 = tl.constexpr("{ .reg .b32 t; max.NaN.f16x2 t, $1, $2; min.NaN.f16x2 $0, t, $3; }")

LARGEST_CENTRE = tl.constexpr(65504.0)
"""The largest finite fp16."""

MASK_BITS = 16
"""Most taps per axis that half a word of bits can describe; a longer filter runs in windows."""


@triton.jit
def clamp(x, lo, hi, UPCAST: tl.constexpr):
    """Return min(max(x, lo), hi), exact in the 16-bit dtype of ``x``, keeping NaN: two instructions for two elements.

    It is PTX because ``tl.maximum`` computes bfloat16 in fp32, which Triton 3.8 narrows again and 3.6 does not. The
    interpreter uses Triton's functions; with UPCAST the result stays fp32, with the same values.
    """
    if COMPILED:
        code: tl.constexpr = CLAMP_BF16 if x.dtype == tl.bfloat16 else CLAMP_FP16
        return tl.inline_asm_elementwise(code, "=r,r,r,r", [x, lo, hi], dtype=x.dtype, is_pure=True, pack=2)
    else:
        if UPCAST:
            x, lo, hi = x.to(tl.float32), lo.to(tl.float32), hi.to(tl.float32)
        x = tl.maximum(x, lo, propagate_nan=tl.PropagateNan.ALL)
        return tl.minimum(x, hi, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def activate(x, scale, shift, inside, PADDED: tl.constexpr, UPCAST: tl.constexpr):
    """Return relu(scale*x + shift), computed in fp32 and rounded to the dtype of ``x``; 0 in the padding.

    A minimum with 0 or infinity per row takes half the instructions of a select per element.
    """
    z = x.to(tl.float32) * scale + shift
    if PADDED:
        z = tl.minimum(z, tl.where(inside, float("inf"), 0.0), propagate_nan=tl.PropagateNan.ALL)
    return round_to(relu(z), x.dtype, UPCAST)


@triton.jit
def usable_centre(centre):
    """Return ``centre``, or 0 if it is NaN or too large for fp16: rows after the last consist of it, and are summed."""
    return tl.where(tl.abs(centre) <= LARGEST_CENTRE, centre, 0.0)


@triton.jit
def inside_bits(at, size, ok, TAPS: tl.constexpr, DIL: tl.constexpr):
    """Return bits per row: bit t is set if the row is ``ok`` and tap t of the window at ``at`` is inside ``size``."""
    bits = tl.zeros_like(at)
    for t in tl.static_range(TAPS):
        bits |= (ok & (at + t * DIL >= 0) & (at + t * DIL < size)).to(tl.int32) << t
    return bits


@triton.jit
def accumulate_taps(
    acc, x_rows, h, w, row_mask, w_rows, w_mask, act_ptr, steps, H, W,
    CI: tl.constexpr, C: tl.constexpr, R: tl.constexpr, S: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    PADDED: tl.constexpr, PROLOGUE: tl.constexpr, PACKED: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Return acc plus all taps, in ``steps`` = R * S * blocks of channels. ``x_rows`` point at the top left tap (h, w).

    ``act_ptr``: row 0 of ``clamp`` or ``vectors`` at the group's first channel. ALIGN: bytes that divide the address of
    every row's first channel in x and in ``clamp``; the compiler does not see it after the select of a row.
    """
    blocks: tl.constexpr = (CI + BLOCK_K - 1) // BLOCK_K
    lane = tl.arange(0, BLOCK_K)
    x_rows = x_rows[:, None] + lane[None, :]
    w_rows = w_rows[:, None] + lane[None, :]
    outside = (act_ptr + (THRESHOLD * C + lane))[None, :] if PACKED else x_rows
    if PADDED:
        bits = inside_bits(h, H, row_mask, R, DIL_H) | (inside_bits(w, W, row_mask, S, DIL_W) << 16)
    for step in range(0, steps):
        # tap (r, s) and channels ci of this step
        tap = step // blocks
        first = (step % blocks) * BLOCK_K
        ci = first + lane
        r, s = tap // S, tap % S
        shift = (r * DIL_H * W + s * DIL_W) * C + first
        inside = (((bits >> r) & (bits >> (16 + s)) & 1) != 0)[:, None] if PADDED else row_mask[:, None]
        if CI % BLOCK_K == 0:
            b = tl.load(w_rows + (tap * CI + first), mask=w_mask[:, None], other=0.0)
        else:
            b = tl.load(w_rows + (tap * CI + first), mask=w_mask[:, None] & (ci < CI)[None, :], other=0.0)
        # a = act(x[n, h + r*dil, w + s*dil, ci]), 0 outside the image; any finite value after the last channel
        if PACKED:
            at = tl.where(inside, x_rows + shift, outside + first)
            at = tl.max_contiguous(tl.multiple_of(at, (ALIGN, ALIGN)), (1, BLOCK_K))
            if CI % BLOCK_K == 0:
                a = tl.load(at)
                lo, hi = tl.load(act_ptr + LO * C + ci), tl.load(act_ptr + HI * C + ci)
            else:
                a = tl.load(at, mask=(ci < CI)[None, :], other=0.0)
                lo = tl.load(act_ptr + LO * C + ci, mask=ci < CI, other=0.0)
                hi = tl.load(act_ptr + HI * C + ci, mask=ci < CI, other=0.0)
            a = clamp(a, lo[None, :], hi[None, :], UPCAST)
        else:
            if CI % BLOCK_K == 0:
                a = tl.load(x_rows + shift, mask=inside, other=0.0)
            else:
                a = tl.load(x_rows + shift, mask=inside & (ci < CI)[None, :], other=0.0)
            if PROLOGUE:
                scale = tl.load(act_ptr + SCALE * C + ci, mask=ci < CI, other=0.0)
                add = tl.load(act_ptr + SHIFT * C + ci, mask=ci < CI, other=0.0)
                a = activate(a, scale[None, :], add[None, :], inside, PADDED, UPCAST)
        acc = multiply(a, b, acc, PRECISION, UPCAST)
    return acc


@triton.jit
def padding_excess(act_ptr, ci, mask, C: tl.constexpr):
    """Return clamp(THR) - THR by channel, fp32: 1 if a channel is constant and positive, otherwise 0."""
    lo = tl.load(act_ptr + LO * C + ci, mask=mask, other=0.0).to(tl.float32)
    zero = tl.load(act_ptr + THRESHOLD * C + ci, mask=mask, other=0.0).to(tl.float32)
    return tl.where(lo > zero, lo - zero, 0.0)


@triton.jit
def take_back_constants(
    acc, h, w, row_mask, w_rows, w_mask, act_ptr, steps, H, W,
    CI: tl.constexpr, C: tl.constexpr, R: tl.constexpr, S: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return acc without what packed padding added in constant channels, where the clamp turns a THR of 0 into 1.

    A channel is constant where gamma is 0. Most launches have none; for them this costs one read of ``clamp``.
    """
    blocks: tl.constexpr = (CI + BLOCK_K - 1) // BLOCK_K
    channels = tl.arange(0, triton.next_power_of_2(CI))
    every = padding_excess(act_ptr, channels, channels < CI, C)
    for step in tl.range(0, tl.max((every > 0).to(tl.int32), 0) * steps, num_stages=1):
        # tap (r, s) and channels ci of this step; acc -= outside * sum over ci of w * excess
        tap = step // blocks
        ci = (step % blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
        y_in, x_in = h + tap // S * DIL_H, w + tap % S * DIL_W
        outside = row_mask & ((y_in < 0) | (y_in >= H) | (x_in < 0) | (x_in >= W))
        b = tl.load(w_rows[:, None] + (tap * CI + ci)[None, :], mask=w_mask[:, None] & (ci < CI)[None, :], other=0.0)
        added = tl.sum(b.to(tl.float32) * padding_excess(act_ptr, ci, ci < CI, C)[None, :], 1)
        acc -= outside.to(tl.float32)[:, None] * added[None, :]
    return acc


@triton.jit
def accumulate_windows(
    acc, x_rows, h, w, row_mask, w_rows, w_mask, act_ptr, H, W,
    CI: tl.constexpr, C: tl.constexpr, R: tl.constexpr, S: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    PROLOGUE: tl.constexpr, PACKED: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Return acc plus the window that starts at pixel (h, w), where ``x_rows`` point; k runs over taps and channels."""
    for start in range(0, R * S * CI, BLOCK_K):
        # k -> (r, s, ci)
        k = start + tl.arange(0, BLOCK_K)
        r, s, ci = k // (S * CI), (k // CI) % S, k % CI
        real = k < R * S * CI
        y_in, x_in = h[:, None] + (r * DIL_H)[None, :], w[:, None] + (s * DIL_W)[None, :]
        inside = row_mask[:, None] & (y_in >= 0) & (y_in < H) & (x_in >= 0) & (x_in < W)
        at = x_rows[:, None] + ((r * DIL_H * W + s * DIL_W) * C + ci)[None, :]
        # a = act(x[n, h + r*dil, w + s*dil, ci]), 0 outside the image; any finite value after the last k
        a = tl.load(at, mask=inside & real[None, :], other=0.0)
        if PACKED:
            lo = tl.load(act_ptr + LO * C + ci, mask=real, other=0.0)
            hi = tl.load(act_ptr + HI * C + ci, mask=real, other=0.0)
            zero = tl.load(act_ptr + THRESHOLD * C + ci, mask=real, other=0.0)
            a = tl.where(inside, clamp(a, lo[None, :], hi[None, :], UPCAST), zero[None, :])
        elif PROLOGUE:
            scale = tl.load(act_ptr + SCALE * C + ci, mask=real, other=0.0)
            add = tl.load(act_ptr + SHIFT * C + ci, mask=real, other=0.0)
            a = activate(a, scale[None, :], add[None, :], inside, True, UPCAST)
        b = tl.load(w_rows[:, None] + k[None, :], mask=w_mask[:, None] & real[None, :], other=0.0)
        acc = multiply(a, b, acc, PRECISION, UPCAST)
    return acc


@triton.jit
def column_moments(v, first, count, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return (mean, M2) per column of the tile ``v`` over its rows below ``count``; ``first`` is the tile's first row.

    Rows after the last have weight 0, which costs less than a select; they must be finite.
    """
    even, odd = tl.split(tl.permute(tl.reshape(v, (BLOCK_M // 2, 2, BLOCK_N)), (0, 2, 1)))
    row = first + 2 * tl.arange(0, BLOCK_M // 2)
    even_weight, odd_weight = (row < count).to(tl.float32)[:, None], (row + 1 < count).to(tl.float32)[:, None]
    even, odd = even.to(tl.float32) * even_weight, odd.to(tl.float32) * odd_weight
    mean = tl.sum(even + odd, 0) / tl.minimum(count - first, BLOCK_M).to(tl.float32)
    even, odd = even - mean[None, :] * even_weight, odd - mean[None, :] * odd_weight
    return mean, tl.sum(even * even + odd * odd, 0)


@triton.jit(do_not_specialize=["gemm_m", "steps", "H", "W", "Ho", "Wo"])
def _conv_fwd_kernel(
    x_ptr, w_ptr, act_ptr, const_ptr, centre_ptr, bias_ptr, y_ptr, partials_ptr,
    gemm_m, steps, H, W, Ho, Wo, x_stride_n,
    CI: tl.constexpr, GEMM_N: tl.constexpr, GROUPS: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr, WINDOWS: tl.constexpr,
    PROLOGUE: tl.constexpr, PACKED: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    # tile (pid_m, pid_n) of group g; CI and GEMM_N count channels per group, C and CO all of them
    C: tl.constexpr = CI * GROUPS
    CO: tl.constexpr = GEMM_N * GROUPS
    tiles_m, tiles_n = tl.cdiv(gemm_m, BLOCK_M), tl.cdiv(GEMM_N, BLOCK_N)
    pid_m, pid_n = tile_of_program(tl.program_id(0), tiles_m, tiles_n, GROUP_M)
    g = tl.program_id(1)
    m, co, row_mask, co_mask = rows_and_channels(pid_m, pid_n, g, gemm_m, GEMM_N, BLOCK_M, BLOCK_N)

    # the top left tap of each pixel: (n, ho * stride - pad, wo * stride - pad)
    n, ho, wo = pixel_of_row(m, Ho, Wo)
    h, w = ho * STRIDE_H - PAD_H, wo * STRIDE_W - PAD_W
    x_rows = x_ptr + row_offset(n, x_stride_n) + ((h * W + w) * C + g * CI)
    w_rows = w_ptr + co * (R * S * CI)
    if PROLOGUE:
        act_ptr += g * CI

    # tile = const - centre + sum over taps and channels; const first, because the end has no free registers
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if const_ptr is not None:
        acc += tl.load(const_ptr + co, mask=co_mask, other=0.0)[None, :]
    if centre_ptr is not None:
        centre = tl.load(centre_ptr + co, mask=co_mask, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            centre -= tl.load(bias_ptr + co, mask=co_mask, other=0.0).to(tl.float32)
        acc -= usable_centre(centre)[None, :]
    if WINDOWS:
        acc = accumulate_windows(
            acc, x_rows, h, w, row_mask, w_rows, co_mask, act_ptr, H, W,
            CI, C, R, S, DIL_H, DIL_W, PROLOGUE, PACKED, BLOCK_K, PRECISION, UPCAST,
        )  # fmt: skip
    else:
        acc = accumulate_taps(
            acc, x_rows, h, w, row_mask, w_rows, co_mask, act_ptr, steps, H, W,
            CI, C, R, S, DIL_H, DIL_W, PAD_H + PAD_W > 0, PROLOGUE, PACKED, ALIGN, BLOCK_K, PRECISION, UPCAST,
        )  # fmt: skip

        if PACKED and PAD_H + PAD_W > 0:
            acc = take_back_constants(
                acc, h, w, row_mask, w_rows, co_mask, act_ptr, steps, H, W, CI, C, R, S, DIL_H, DIL_W, BLOCK_K
            )

    # y = round(tile)
    y = round_to(acc, y_ptr.dtype.element_ty, UPCAST)
    tl.store(y_ptr + row_offset(m, CO)[:, None] + co[None, :], y, mask=row_mask[:, None] & co_mask[None, :])

    # partials[0, t, co], partials[1, t, co] = mean, M2 of y as stored
    if partials_ptr is not None:
        mean, m2 = column_moments(y, pid_m * BLOCK_M, gemm_m, BLOCK_M, BLOCK_N)
        tl.store(partials_ptr + (row_offset(pid_m, CO) + co), mean, mask=co_mask)
        tl.store(partials_ptr + (row_offset(tiles_m + pid_m, CO) + co), m2, mask=co_mask)


def conv_fwd(
    launch: LaunchSpec,
    config: Config,
    weight: Tensor,
    const: Tensor | None,
    x: Act,
    centre: Tensor | None,
    statistics: bool,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Compute the raw output of a convolution, and its statistics by tile. Deterministic.

    Args:
        launch: a launch of kernel ``conv_fwd``.
        config: its tiles.
        weight: (Co, R, S, Ci/groups), dense, of :func:`pack_forward` for the same prologue.
        const: (Co,) fp32 of :func:`pack_forward`, or None.
        x: the input; each image of ``x.y`` (N, Ci, H, W) is dense NHWC. With ``launch.prologue`` it is raw, and read
            through ``x.clamp`` if ``config.packed``, otherwise through ``x.vectors``.
        centre: (Co,), subtracted, or None: the running mean, whose convolution includes ``bias``.
        statistics: whether to compute them.
        bias: (Co,) or None: y does not contain it, so it is taken from ``centre``.

    Returns:
        y (N, Co, Ho, Wo), dense NHWC, in the dtype of ``x.y``; with ``statistics`` also partials (2, tiles, Co) fp32,
        mean and M2 of y over the rows of each tile, otherwise None. Tile t has min(block_m, gemm_m - t * block_m) rows.
    """
    conv, groups, packed = launch.last, merged_groups(launch.last), launch.prologue and config.packed
    ci, co, images = conv.ci // groups, conv.co // groups, x.y
    rows = (x.clamp if packed else x.vectors) if launch.prologue else None
    y = new_output(conv, images)
    partials = None
    if statistics:
        tiles = -(-conv.gemm_m // config.block_m)
        partials = torch.empty((2, tiles, conv.co), dtype=torch.float32, device=images.device)
    submit(
        _conv_fwd_kernel, grid_of(conv, config),
        images, weight, rows, const, centre, bias, y, partials,
        conv.gemm_m, conv.r * conv.s * -(-ci // config.block_k), conv.h, conv.w, conv.ho, conv.wo, images.stride(0),
        CI=ci, GEMM_N=co, GROUPS=groups, R=conv.r, S=conv.s, **steps_of(conv),
        WINDOWS=ci < MIN_CHANNELS or max(conv.r, conv.s) > MASK_BITS,
        PROLOGUE=launch.prologue, PACKED=packed, ALIGN=_alignment(images, rows, ci) if packed else 1,
        BLOCK_N=config.block_n, GROUP_M=config.group_m, **product(conv, config, images.dtype),
    )  # fmt: skip
    return y, partials


def _alignment(images: Tensor, clamp_rows: Tensor | None, ci: int) -> int:
    """Return 16 if every pixel's ``ci`` channels of a group and the rows of ``clamp`` start 16-byte aligned.

    Otherwise return an element's size.
    """
    size = images.element_size()
    bases = (address_of(images),) if clamp_rows is None else (address_of(images), address_of(clamp_rows))
    return alignment(size, *bases, images.stride(0) * size, ci * size)
