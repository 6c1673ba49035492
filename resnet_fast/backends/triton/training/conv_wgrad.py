r"""Gradient of a convolution's weight: a matrix product over all output pixels, split over programs, summed in order.

    dW[co, r, s, ci] = sum_m dy[m, co] * act(x[n, ho*stride - pad + r*dil, wo*stride - pad + s*dil, ci])
    m = (n, ho, wo)

    g, y (N, Ho, Wo, Co)   x (N, H, W, Ci) raw or an activation   dW as the parameter

Saved bytes. Neither operand is in memory: dy is computed from g and y, act from the raw x (vectors.py), as they are
read. dy and act are each written once and read once less.

GEMM. gemm_m = Co, gemm_n = Ci of one tap (or all taps and channels as one axis if a group has fewer than 16 channels),
gemm_k = N*Ho*Wo, which is long while the other two are short. So the pixels are divided, in two ways:

    streams   The batch is divided into STREAMS parts of whole images. A K step is BLOCK_K / STREAMS neighbouring pixels
              of every stream, at the same (ho, wo) in each. What depends on the pixel (its place in the image, whether
              a tap of it is inside) is computed once for all streams, of which a thread has one element each. The
              streams differ only by an address that does not change.
    splits    Every stream's pixels, as one run over its images, are divided into the same number of splits.

    stream 0  | split 0 | split 1 | split 2 |            a program: one tile (co, tap, ci) of one split, fp32 sums
    stream 1  | split 0 | split 1 | split 2 |
      ...       tile 0    tile 0    tile 0      \        other programs add the splits from the first to the last
                  +---->----+---->----+------> dW        and apply factors and corrections: no atomics

Saved launches. The grid has further layers of programs behind the splits, for passengers: the coefficients of the norm
below with the packing of its dgrad weight (norm_gradient.py), which need the dgrad of this layer and not this launch,
and the addition of the splits of the wgrad before (wgrad_sum.py).

    grid z    0 .. splits - 1                     splits ..
              tiles x groups of one split         coefficients | packing | another dW | idle

They go behind the tiles, because a tile takes ten times as long as a passenger. The GPU starts programs in order: short
ones at the end fill the gaps that unequal tiles leave, and where all programs run at once, each multiprocessor has its
share of the tiles before. In front they would delay some multiprocessors and hand their tiles to the others. A program
holds registers and shared memory of the whole launch, so with whole tiles a multiprocessor runs one passenger at a
time. Their tiles are as large as they need to be for it (pack.tile_behind), and a launch whose blocks per
multiprocessor would become fewer takes none (pack.takes_passengers).

Place of a pixel. It is carried along: a step adds BLOCK_K / STREAMS pixels as (images, rows, pixels), computed once,
with one carry for each. A division per step and row would cost more time than the products leave.

Packed operands are q and z = clamp(x) with dy = A*q and act = FOLD*(z - THR), so A and FOLD are a row factor and a
column factor of the sum, and

    dW = A * FOLD * (P - THR * Q)             P = sum q*z    Q = sum q         constant statistics
    dW = A * FOLD * (P - mean(z) * Q)                                          batch statistics

In exact arithmetic the second Q is zero. Rounding leaves a systematic rest. Multiplied by the mean of an activation,
which is not small, it would be most of the error, so the rest is subtracted at the mean of z. Q comes from the tensor
cores, as a product with columns of ones. mean(z) comes from the middle step of each split; its own error has a
second-order effect.

Rows without a pixel (after the last of a split, or in a stream with one image less) read g = y = 0, so their q is GAMMA
and their z is one constant per channel. The loop does not distinguish these ``idle`` rows. What adds the splits
subtracts their contribution to P and Q, because their number is known. Taps outside the image read x at the row
THRESHOLD, conv_fwd.py, and constant channels are corrected as there.

Numerics: tiles.py. Limits: tuning/training_configs.py. Loads of both operands: wgrad_tiles.py.
Alone: ``TRITON_INTERPRET=1 python -m pytest tests/backends/triton/training/test_conv_wgrad.py``.

Tried, compiled for sm_90 (issue slots per scheduler and K step of a 128x128x64 tile; tensor cycles 544):
    3x3 packed 482, exact 1,066; 1x1 with a prologue 398, 942. With the place of every row computed by division, selects
    for the padding, and the mean of z in the loop: about 1,600.
    64-bit row starts instead of 32-bit distances: 466, but 16 registers more, which spill on sm_80.
    One grid axis for tiles, splits and passengers: their places are divided out of it, and 3x3 spills on sm_80.
    128x256x64: 0.72 of the tensor cycles instead of 0.89, and spills.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....spec import ConvSpec, LaunchSpec
from ....tuning.configs import Config
from ....tuning.routes import MIN_CHANNELS, merged_groups
from ....tuning.training_configs import gemm
from ..launch import address_of, alignment, product, steps_of, submit
from ..tiles import pixel_of_row, row_offset
from . import vectors, wgrad_sum
from .conv_fwd import padding_excess
from .norm_gradient import norm_program, without_norm
from .pack import Passenger
from .vectors import Act, Grad
from .wgrad_tiles import (
    activation_tile,
    activation_vectors,
    gradient_tile,
    gradient_vectors,
    next_places,
    of_rows,
    place_in_x,
)

THRESHOLD = tl.constexpr(vectors.THRESHOLD)

NO_PASSENGER = without_norm()

ONES = tl.constexpr(8)
"""Columns of ones, as many as the narrowest product of the tensor cores has."""

STREAMS = 4
"""Most streams; a thread of a 128 x 128 x 64 tile has four rows of a step."""


@triton.jit
def columns_of_tile(
    pid_n, g, CI: tl.constexpr, COLUMNS: tl.constexpr, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Return (column of dW, channel of x, whether it is one, tap) of a tile; the tap is a scalar, or (1, columns)."""
    if WINDOW:
        column = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
        ci, ci_mask = g * CI + column % CI, column < COLUMNS
        tap = (column // CI)[None, :]
    else:
        tiles_n: tl.constexpr = (CI + BLOCK_N - 1) // BLOCK_N
        within_n = (pid_n % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
        ci, ci_mask = g * CI + within_n, within_n < CI
        tap = pid_n // tiles_n
        column = tap * CI + within_n
    return column, ci, ci_mask, tap


@triton.jit
def middle_mean(
    start, steps, rows_left, lane, x_tile, first_n, outside, down, across, ci_mask, act_first, act_second,
    H, W, Ho, Wo, x_stride_n, C_IN: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PROLOGUE: tl.constexpr, PACKED: tl.constexpr, PADDED: tl.constexpr, WINDOW: tl.constexpr, LINEAR: tl.constexpr,
    EVEN: tl.constexpr, ALIGN: tl.constexpr, UPCAST: tl.constexpr, STREAMS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return the mean of z (columns,) over the middle one of a split's ``steps``."""
    done = steps // 2 * (BLOCK_K // STREAMS)
    n, ho, wo = pixel_of_row(start + done + lane, Ho, Wo)
    x_at, inside = place_in_x(
        x_tile, n - first_n, ho, wo, rows_left > done, down, across, H, W, x_stride_n, done,
        C_IN, STRIDE_H, STRIDE_W, WINDOW, PADDED, LINEAR, STREAMS, BLOCK_K,
    )  # fmt: skip
    z = activation_tile(
        x_at, outside, inside, ci_mask, act_first, act_second,
        PROLOGUE, PACKED, PADDED, WINDOW, EVEN, ALIGN, UPCAST,
    )  # fmt: skip
    weight = (rows_left > done).to(tl.float32)
    return tl.sum(z.to(tl.float32) * weight[:, None], 0) / tl.sum(weight, 0)


@triton.jit
def take_back_padding(
    acc, excess, start, steps, rows_left, lane, x_tile, first_n, down, across, g_ptr, y_ptr, dy_tile, co_mask,
    grad_first, grad_second, grad_third, H, W, Ho, Wo, x_stride_n,
    C_IN: tl.constexpr, C_OUT: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    BATCH: tl.constexpr, PACKED: tl.constexpr, PADDED: tl.constexpr, WINDOW: tl.constexpr, EVEN: tl.constexpr,
    UPCAST: tl.constexpr, STREAMS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return acc without what packed padding added: ``excess`` (columns,) times q, summed over the rows outside.

    No steps run where no channel is constant, that is, where ``excess`` is 0.
    """
    for step in tl.range(0, tl.max((excess > 0).to(tl.int32), 0) * steps, num_stages=1):
        done = step * (BLOCK_K // STREAMS)
        real = rows_left > done
        n, ho, wo = pixel_of_row(start + done + lane, Ho, Wo)
        _, inside = place_in_x(
            x_tile, n - first_n, ho, wo, real, down, across, H, W, x_stride_n, done,
            C_IN, STRIDE_H, STRIDE_W, WINDOW, PADDED, False, STREAMS, BLOCK_K,
        )  # fmt: skip
        y_at = y_ptr + done * C_OUT + dy_tile if BATCH else None
        a = gradient_tile(
            g_ptr + done * C_OUT + dy_tile, y_at, real, co_mask, grad_first, grad_second, grad_third,
            BATCH, PACKED, EVEN, UPCAST,
        )  # fmt: skip
        outside_rows = (real[:, None] & ~inside).reshape((1, BLOCK_K))
        added = tl.sum(tl.where(outside_rows, a.to(tl.float32), 0.0), 1)
        acc -= added[:, None] * excess[None, :]
    return acc


@triton.jit
def wgrad_program(
    g_ptr, y_ptr, grad_ptr, x_ptr, act_ptr, p_ptr, q_ptr, z_ptr,
    images, H, W, Ho, Wo, x_stride_n, per_stream, per_split,
    CI: tl.constexpr, CO: tl.constexpr, GROUPS: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr, WINDOW: tl.constexpr, LINEAR: tl.constexpr,
    BATCH: tl.constexpr, PROLOGUE: tl.constexpr, PACKED: tl.constexpr, SUMS: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, STREAMS: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute the partial sums of a tile over one split; programs of a split are neighbours."""
    # tile (co, column) of group g over one split; CI and CO count channels per group, C_IN and C_OUT all of them
    C_IN: tl.constexpr = CI * GROUPS
    C_OUT: tl.constexpr = CO * GROUPS
    COLUMNS: tl.constexpr = R * S * CI
    PIXELS: tl.constexpr = BLOCK_K // STREAMS
    PADDED: tl.constexpr = PAD_H + PAD_W > 0
    EVEN_M: tl.constexpr = CO % BLOCK_M == 0
    EVEN_N: tl.constexpr = (COLUMNS if WINDOW else CI) % BLOCK_N == 0
    tiles_m: tl.constexpr = (CO + BLOCK_M - 1) // BLOCK_M
    pid_m, pid_n = tl.program_id(0) % tiles_m, tl.program_id(0) // tiles_m
    g, split = tl.program_id(1), tl.program_id(2)
    within_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    co, co_mask = g * CO + within_m, within_m < CO

    # columns: channels of one tap, or taps and channels at once
    column, ci, ci_mask, tap = columns_of_tile(pid_n, g, CI, COLUMNS, WINDOW, BLOCK_N)
    down, across = tap // S * DIL_H - PAD_H, tap % S * DIL_W - PAD_W

    # rows of a step: PIXELS neighbours in every stream; ``left``: how many a stream has left in this split
    stream, lane = tl.arange(0, STREAMS), tl.arange(0, PIXELS)
    start = split * per_split
    first_n = start // (Ho * Wo)
    left = tl.minimum(tl.minimum(images - stream * per_stream, per_stream) * (Ho * Wo) - start, per_split)
    steps = tl.cdiv(tl.minimum(per_stream * (Ho * Wo) - start, per_split), PIXELS)
    rows_left = of_rows(left, -lane, STREAMS, BLOCK_K)

    # what does not change from step to step: rows less their pixel's place, vectors of the channels
    first_of_stream = (stream.to(tl.int64) if WIDE else stream) * per_stream
    dy_tile = (of_rows(first_of_stream * (Ho * Wo), lane, STREAMS, BLOCK_K) * C_OUT)[None, :] + co[:, None]
    g_ptr += row_offset(start, C_OUT)
    if BATCH:
        y_ptr += row_offset(start, C_OUT)
    x_rows = of_rows(first_of_stream, 0 * lane, STREAMS, BLOCK_K) * x_stride_n
    x_ptr += row_offset(start, C_IN) if LINEAR else row_offset(first_n, x_stride_n)
    x_tile = x_ptr + (x_rows[:, None] + ((down * W + across) * C_IN + ci[None, :]))
    outside = (act_ptr + THRESHOLD * C_IN + ci)[None, :] if PROLOGUE and PACKED and PADDED else x_tile
    grad_first, grad_second, grad_third = gradient_vectors(grad_ptr, co, co_mask, BATCH, PACKED, C_OUT)
    act_first, act_second = activation_vectors(act_ptr, ci, ci_mask, PROLOGUE, PACKED, C_IN)

    # mean of z over the middle step
    if PACKED and BATCH:  # noqa: SIM102 (the compiler decides the outer condition, the program the inner one)
        if pid_m == 0:
            mean = middle_mean(
                start, steps, rows_left, lane, x_tile, first_n, outside, down, across, ci_mask, act_first, act_second,
                H, W, Ho, Wo, x_stride_n, C_IN, STRIDE_H, STRIDE_W,
                PROLOGUE, PACKED, PADDED, WINDOW, LINEAR, EVEN_N, ALIGN, UPCAST, STREAMS, BLOCK_K,
            )  # fmt: skip
            tl.store(z_ptr + (split * GROUPS + g) * COLUMNS + column, mean, mask=ci_mask)

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    sum_q = tl.zeros((BLOCK_M, ONES), dtype=tl.float32)
    n, ho, wo = pixel_of_row(start + lane, Ho, Wo)
    n -= first_n
    on_n, on_h, on_w = pixel_of_row(PIXELS, Ho, Wo)
    for done in range(0, steps * PIXELS, PIXELS):
        real = rows_left > done
        # a = dy or q
        y_at = y_ptr + done * C_OUT + dy_tile if BATCH else None
        a = gradient_tile(
            g_ptr + done * C_OUT + dy_tile, y_at, real, co_mask, grad_first, grad_second, grad_third,
            BATCH, PACKED, EVEN_M, UPCAST,
        )  # fmt: skip
        # b = act, z or x
        x_at, inside = place_in_x(
            x_tile, n, ho, wo, real, down, across, H, W, x_stride_n, done,
            C_IN, STRIDE_H, STRIDE_W, WINDOW, PADDED, LINEAR, STREAMS, BLOCK_K,
        )  # fmt: skip
        b = activation_tile(
            x_at, outside, inside, ci_mask, act_first, act_second,
            PROLOGUE, PACKED, PADDED, WINDOW, EVEN_N, ALIGN, UPCAST,
        )  # fmt: skip
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        if SUMS:
            sum_q = tl.dot(a, tl.full((BLOCK_K, ONES), 1.0, dtype=a.dtype), sum_q, input_precision=PRECISION)
        if not LINEAR:
            n, ho, wo = next_places(n, ho, wo, on_n, on_h, on_w, Ho, Wo)

    # constant channels: what padding added where the clamp turns a THR of 0 into 1, conv_fwd.py
    if PACKED and PROLOGUE and PADDED and not WINDOW:
        acc = take_back_padding(
            acc, padding_excess(act_ptr, ci, ci_mask, C_IN), start, steps, rows_left, lane, x_tile, first_n,
            down, across, g_ptr, y_ptr, dy_tile, co_mask, grad_first, grad_second, grad_third,
            H, W, Ho, Wo, x_stride_n, C_IN, C_OUT, STRIDE_H, STRIDE_W,
            BATCH, PACKED, PADDED, WINDOW, EVEN_M, UPCAST, STREAMS, BLOCK_K,
        )  # fmt: skip

    # the split's tile, and its part of the sums
    at = row_offset(split * C_OUT + co, COLUMNS)[:, None] + column[None, :]
    tl.store(p_ptr + at, acc, mask=co_mask[:, None] & ci_mask[None, :])
    if SUMS:  # noqa: SIM102
        if pid_n == 0:
            ones = tl.arange(0, ONES)[None, :]
            tl.store(q_ptr + (split * C_OUT + co)[:, None] + ones, sum_q, mask=co_mask[:, None] & (ones == 0))


@triton.jit(do_not_specialize=[
    "images", "H", "W", "Ho", "Wo", "per_stream", "per_split", "all_splits",
    "tiles", "chunks", "chunk", "packing", "splits", "idle",
])  # fmt: skip
def _conv_wgrad_kernel(
    g_ptr, y_ptr, grad_ptr, x_ptr, act_ptr, p_ptr, q_ptr, z_ptr,
    images, H, W, Ho, Wo, x_stride_n, per_stream, per_split, all_splits,
    partials_ptr, merged_ptr, counters_ptr, own_ptr, vectors_ptr, coefficients_ptr, packed_ptr,
    dgamma_ptr, dbeta_ptr, dbias_ptr, tiles, chunks, chunk, packing,
    weight_ptr, a_ptr, wt_ptr, stride_co, stride_ci, stride_r, stride_s,
    sum_p_ptr, sum_q_ptr, sum_z_ptr, sum_coefficients_ptr, sum_grad_ptr, sum_v_ptr, sum_act_ptr, dw_ptr,
    splits, idle, dw_stride_co, dw_stride_ci, dw_stride_r, dw_stride_s,
    CI: tl.constexpr, CO: tl.constexpr, GROUPS: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr, WINDOW: tl.constexpr, LINEAR: tl.constexpr,
    BATCH: tl.constexpr, PROLOGUE: tl.constexpr, PACKED: tl.constexpr, SUMS: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, STREAMS: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    HOSTS: tl.constexpr, N_C: tl.constexpr, N_BATCH: tl.constexpr, N_UPCAST: tl.constexpr, N_BLOCK_T: tl.constexpr,
    N_BLOCK_C: tl.constexpr, N_CI: tl.constexpr, N_CO: tl.constexpr, N_GROUPS: tl.constexpr, N_OWN_CI: tl.constexpr,
    N_OWN_CO: tl.constexpr, N_R: tl.constexpr, N_S: tl.constexpr, N_UPCAST_W: tl.constexpr, N_TILE: tl.constexpr,
    N_P_CI: tl.constexpr, N_P_CO: tl.constexpr, N_P_GROUPS: tl.constexpr, N_P_OWN_CI: tl.constexpr,
    N_P_OWN_CO: tl.constexpr, N_P_R: tl.constexpr, N_P_S: tl.constexpr, N_P_BATCH: tl.constexpr,
    N_P_PROLOGUE: tl.constexpr, N_P_PACKED: tl.constexpr, N_P_PADDED: tl.constexpr, N_P_WINDOW: tl.constexpr,
    N_P_BLOCK_M: tl.constexpr, N_P_BLOCK_N: tl.constexpr,
):  # fmt: skip
    if HOSTS:  # noqa: SIM102 (the compiler decides the outer condition, the program the inner one)
        if tl.program_id(2) >= all_splits:
            layer = (tl.program_id(2) - all_splits) * GROUPS + tl.program_id(1)
            norm_program(
                layer * tl.num_programs(0) + tl.program_id(0),
                partials_ptr, merged_ptr, counters_ptr, own_ptr, vectors_ptr, coefficients_ptr, packed_ptr, dgamma_ptr,
                dbeta_ptr, dbias_ptr, tiles, chunks, chunk, packing, weight_ptr, a_ptr, wt_ptr, stride_co, stride_ci,
                stride_r, stride_s, sum_p_ptr, sum_q_ptr, sum_z_ptr, sum_coefficients_ptr, sum_grad_ptr, sum_v_ptr,
                sum_act_ptr, dw_ptr, splits, idle, dw_stride_co, dw_stride_ci, dw_stride_r, dw_stride_s, N_C, N_BATCH,
                N_UPCAST, N_BLOCK_T, N_BLOCK_C, N_CI, N_CO, N_GROUPS, N_OWN_CI, N_OWN_CO, N_R, N_S, N_UPCAST_W, N_TILE,
                N_P_CI, N_P_CO, N_P_GROUPS, N_P_OWN_CI, N_P_OWN_CO, N_P_R, N_P_S, N_P_BATCH, N_P_PROLOGUE, N_P_PACKED,
                N_P_PADDED, N_P_WINDOW, N_P_BLOCK_M, N_P_BLOCK_N,
            )  # fmt: skip
            return
    wgrad_program(
        g_ptr, y_ptr, grad_ptr, x_ptr, act_ptr, p_ptr, q_ptr, z_ptr, images, H, W, Ho, Wo, x_stride_n, per_stream,
        per_split, CI, CO, GROUPS, R, S, STRIDE_H, STRIDE_W, PAD_H, PAD_W, DIL_H, DIL_W, WINDOW, LINEAR, BATCH,
        PROLOGUE, PACKED, SUMS, ALIGN, PRECISION, UPCAST, STREAMS, WIDE, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip


def streams_of(conv: ConvSpec) -> tuple[int, int]:
    """Return (streams, images per stream); the last streams may have fewer."""
    streams = next(s for s in (STREAMS, 2, 1) if s <= conv.n)
    return streams, -(-conv.n // streams)


def splits_of(launch: LaunchSpec, config: Config, sms: int) -> tuple[int, int]:
    """Return (splits, pixels of a stream per split): about two programs per multiprocessor, with at least four K steps.

    Of the numbers just below and above two, the one that takes less time where a multiprocessor runs one program after
    another: docs/notes/wgrad-splits.md. Distances within a program are 32-bit, so very large images get more splits.
    """
    conv = launch.last
    rows, columns, _, products = gemm(launch)
    streams, images = streams_of(conv)
    tiles = -(-rows // config.block_m) * -(-columns // config.block_n) * products
    per_image, per_step = conv.ho * conv.wo, config.block_k // streams
    steps = -(-images * per_image // per_step)
    far = max(conv.h * conv.w * conv.ci, per_image * conv.co)
    most = max(1, ((1 << 31) - 1) // far - 2) * per_image // per_step
    few = max(1, 2 * sms // tiles)
    wanted = min((few, few + 1), key=lambda splits: -(-tiles * splits // sms) / splits)
    splits = max(1, min(wanted, steps // 4), -(-steps // most))
    per_split = -(-steps // splits)
    return -(-steps // per_split), per_split * per_step


def _wide(conv: ConvSpec, x_stride_n: int) -> bool:
    """Return whether a batch has 2^31 or more elements of x or dy, so that distances between streams need 64 bits."""
    return conv.n * max(x_stride_n, conv.ho * conv.wo * conv.co) >= 1 << 31


class Products(NamedTuple):
    """What the programs of a wgrad leave of each split. ``p`` (splits, Co, R*S*Ci/groups), ``q`` (splits, Co), ``z``
    (splits, groups, R*S*Ci/groups), all fp32, of merged groups; ``q`` and ``z`` are None where they are not computed.
    """

    p: Tensor
    q: Tensor | None
    z: Tensor | None


def products(
    launch: LaunchSpec,
    config: Config,
    grad: Grad,
    x: Act,
    sms: int,
    sums: bool = False,
    passenger: Passenger = NO_PASSENGER,
) -> Products:
    """Compute the partial sums of a wgrad. Arguments as of :func:`conv_wgrad`; ``sums``: compute ``q`` in any case."""
    conv, groups = launch.last, merged_groups(launch.last)
    ci, co, taps = conv.ci // groups, conv.co // groups, conv.r * conv.s
    window, packed, size = ci < MIN_CHANNELS, config.packed, x.y.element_size()
    padded = max(conv.padding) > 0
    columns = taps * ci
    streams, images = streams_of(conv)
    splits, per_split = splits_of(launch, config, sms)
    tiles_n = -(-columns // config.block_n) if window else taps * -(-ci // config.block_n)
    sums |= packed and (grad.batch or launch.prologue)

    def new(*shape: int) -> Tensor:
        return grad.g.new_empty(shape, dtype=torch.float32)

    p = new(splits, conv.co, columns)
    q = new(splits, conv.co) if packed or sums else None
    z = new(splits, groups, columns) if packed and grad.batch else None
    rows = (x.clamp if packed else x.vectors) if launch.prologue else None
    y = grad.y if grad.batch else None
    linear = taps == 1 and not padded and conv.stride == (1, 1) and x.y.stride(0) == conv.h * conv.w * conv.ci
    starts = [address_of(t) for t in (x.y, rows) if t is not None]
    tiles = -(-co // config.block_m) * tiles_n
    submit(
        _conv_wgrad_kernel, (tiles, groups, splits + -(-passenger.programs // (tiles * groups))),
        grad.g, y, grad.vectors(packed), x.y, rows, p, q, z,
        conv.n, conv.h, conv.w, conv.ho, conv.wo, x.y.stride(0), images, per_split, splits, *passenger.arguments,
        CI=ci, CO=co, GROUPS=groups, R=conv.r, S=conv.s, **steps_of(conv),
        WINDOW=window, LINEAR=linear, BATCH=grad.batch, PROLOGUE=launch.prologue, PACKED=packed or launch.folded,
        SUMS=sums, ALIGN=alignment(size, ci * size, x.y.stride(0) * size, *starts),
        STREAMS=streams, WIDE=_wide(conv, x.y.stride(0)), BLOCK_N=config.block_n, **product(conv, config, x.y.dtype),
        HOSTS=passenger.programs > 0, **passenger.named("N_"),
    )  # fmt: skip
    return Products(p, q, z)


def conv_wgrad(
    launch: LaunchSpec,
    config: Config,
    grad: Grad,
    x: Act,
    sms: int,
    weight: Tensor,
    passenger: Passenger = NO_PASSENGER,
) -> tuple[Tensor, Passenger]:
    """Compute the gradient of a convolution's weight. Deterministic.

    Args:
        launch: a launch of kernel ``conv_wgrad``.
        config: its tiles.
        grad: the gradient of the raw output, dense NHWC, read through ``packed`` if ``config.packed``, otherwise
            through ``coefficients``.
        x: the input; each image of ``x.y`` is dense NHWC. With ``launch.prologue`` it is raw, and read through
            ``clamp`` if ``config.packed``, otherwise through ``vectors``.
        sms: multiprocessors to fill.
        weight: the parameter (Co, Ci/groups, R, S).
        passenger: of :func:`norm_gradient.passenger` or :func:`norm_gradient.without_norm`, to take along.

    Returns:
        dW in the dtype and strides of ``weight``, and the programs that write it from the splits: for another launch to
        take along, or for :func:`wgrad_sum.reduce_splits`.
    """
    conv, groups, packed = launch.last, merged_groups(launch.last), config.packed
    ci, (streams, images) = conv.ci // groups, streams_of(conv)
    p, q, z = products(launch, config, grad, x, sms, passenger=passenger)
    rows = (x.clamp if packed else x.vectors) if launch.prologue else None
    dw = torch.empty_like(weight)
    per_step = config.block_k // streams
    idle = -(-images * conv.ho * conv.wo // per_step) * config.block_k - conv.gemm_m
    arguments = (
        p, q, z, grad.coefficients, grad.packed if packed else None,
        x.vectors if launch.prologue else None, rows if packed else None, dw, p.shape[0], idle, *dw.stride(),
    )  # fmt: skip
    own = (ci, conv.co // groups, groups, conv.ci // conv.groups, conv.co // conv.groups, conv.r, conv.s)
    kind = (grad.batch, launch.prologue, packed, max(conv.padding) > 0, ci < MIN_CHANNELS)
    return dw, wgrad_sum.reduction(conv.co, p.shape[2], arguments, (*own, *kind))
