r"""BatchNorm in a training step, forward: the vectors of a raw output, from its statistics.

    partials[:, t, c] = mean and M2 = sum (y - mean)^2 of y[m, c] over the rows m of tile t
    mean = pivot + sum_t n_t (mean_t - pivot) / n          M2 = sum_t M2_t + n_t (mean_t - mean)^2
    INVSTD = 1 / sqrt(M2/n + eps)      SCALE = gamma * INVSTD      SHIFT = beta - mean * SCALE      (vectors.py)
    running mean = (1 - momentum) * running mean + momentum * (mean + centre + bias)          the variance likewise

(Ioffe and Szegedy 2015, section 3; Chan, Golub and LeVeque 1979 for the merge.) The epilogue of conv_fwd computes the
partials, or behind a convolution on cuDNN a pass, cudnn_passes.py. norm_gradient.py has the other direction.

Saved bytes. Stock BatchNorm reads y twice and writes the result. Here nothing of that size moves: of a tile of 128 rows
8 bytes per channel are read. At batch 256 ResNet-50 has at most 6,272 tiles, 12.8 MB in the widest norm.

Saved launches: at most one per norm. Its programs merge the tiles, write the vectors, move the running statistics, and
pack the weight of the next convolution, which needs FOLD:

    tiles t ->                     A program owns BLOCK_C channels and a chunk of CHUNK tiles, read BLOCK_T at a time.
    c [ . . . . | . . . . | . ]    A chunk's result is a partial too, of CHUNK times as many rows. The program that
        chunk 0   chunk 1          arrives last in its channel block merges the chunks (arrival.py) and finalizes.
          \         |              Behind them in the grid, programs of pack.py load their first elements of the weight
            vectors, READY         and wait until all channel blocks are ready.
               |
        w = round(weight * FOLD)

Behind a block's last norms comes no weight but the block's end. It finalizes them itself (``finalize_first``): a
program of block_end.py or pool.py that finds them not ready takes what part of this work is left, then waits.

Numerics. fp32. A mean is a small distance from a pivot among the data, and M2 a sum of squared distances from the mean:
nothing cancels when |mean| >> std. Only the shape decides the order of sums, so the result is the same bits every time.
Only this file and ``folding`` compute with eps; this one because a batch's variance exists on the device only. Running
statistics are rounded to their own dtype, as stock does.

Several processes. (mean, M2, count) of each are merged in launches of their own, gathered, and merged by the same
kernel; counts may differ and be zero.

Alone: ``TRITON_INTERPRET=1 python -m pytest tests/backends/triton/training/test_batch_norm.py``.

Not taken: one pass over the partials by squared distances from the pivot. A first tile far from the others would cancel
digits, and the second pass reads L1. The merge as the end of conv_fwd: docs/notes/training-launches.md has the figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....calls import Norm
from ..launch import submit, upcasts
from ..tiles import load_optional, round_to, store_rounded
from . import vectors as v
from .arrival import BLOCKS, READY, TICKET, arrive, arrived, draw, wait
from .conv_fwd import usable_centre
from .pack import NO_FORWARD, Passenger, pack_forward_program

NUMBERS = ("tiles", "chunks", "chunk", "rows", "count", "eps", "keep", "momentum")
FINALIZATION_NUMBERS = (*NUMBERS, *(f"{name}_d" for name in NUMBERS))
"""Arguments whose values kernels are not compiled for: of one norm, and of two."""

CHUNK, LAST_TILES = 128, 256
BLOCK_T, BLOCK_C = 128, 16
"""Tiles and channels of a merge; a thread has 16 loads, all in flight."""
FIRST_T = 64
"""Tiles of a merge within the end of a block, which has other values to hold."""

CENTRE, MEAN, INVSTD = tl.constexpr(v.CENTRE), tl.constexpr(v.MEAN), tl.constexpr(v.INVSTD)
SCALE, SHIFT, INV_COUNT = tl.constexpr(v.SCALE), tl.constexpr(v.SHIFT), tl.constexpr(v.INV_COUNT)
BATCH_MEAN, BATCH_VAR = tl.constexpr(v.BATCH_MEAN), tl.constexpr(v.BATCH_VAR)
FOLD, THR = tl.constexpr(v.FOLD), tl.constexpr(v.THR)
LO, HI, THRESHOLD = tl.constexpr(v.LO), tl.constexpr(v.HI), tl.constexpr(v.THRESHOLD)


@triton.jit
def _counts(partials_ptr, GATHERED: tl.constexpr, t, end, rows, count, C: tl.constexpr):
    """Return the rows of tile t as fp32: as gathered, or ``rows``, except that the last tile may be shorter."""
    if GATHERED:
        return tl.load(partials_ptr + (t * 3 + 2) * C, mask=t < end, other=0.0)
    else:
        return tl.where(t < end, tl.minimum(rows, count - t * rows), 0).to(tl.float32)


@triton.jit
def _merged(
    partials_ptr, GATHERED: tl.constexpr, first, end, tiles, rows, count, c,
    C: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, CACHE: tl.constexpr,
):  # fmt: skip
    """Return (n, mean, M2) of the tiles ``first`` to ``end`` by Chan's formula; zeros if they have no rows.

    GATHERED: (tiles, 3, C) of mean, M2 and count per process; otherwise (2, tiles, C). CACHE: ".cg" to read past L1
    what programs of this launch stored, arrival.py.
    """
    stride_t: tl.constexpr = 3 * C if GATHERED else C
    stride_what = C if GATHERED else tiles * C
    c_mask = c < C
    pivot = tl.load(partials_ptr + first * stride_t + c, mask=c_mask & (first < end), other=0.0, cache_modifier=CACHE)
    pivot = pivot[None, :]
    n = tl.zeros((BLOCK_T,), dtype=tl.float32)
    total = tl.zeros((BLOCK_T, BLOCK_C), dtype=tl.float32)
    for start in range(first, end, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        n_t = _counts(partials_ptr, GATHERED, t, end, rows, count, C)
        mask = (n_t > 0)[:, None] & c_mask[None, :]
        at = partials_ptr + t[:, None] * stride_t + c[None, :]
        mean_t = tl.load(at, mask=mask, other=0.0, cache_modifier=CACHE)
        n += n_t
        total += tl.where(mask, n_t[:, None] * (mean_t - pivot), 0.0)
    rows_seen = tl.sum(n, axis=0)
    delta = (tl.sum(total, axis=0) / tl.maximum(rows_seen, 1.0))[None, :]
    total = tl.zeros((BLOCK_T, BLOCK_C), dtype=tl.float32)
    for start in range(first, end, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        n_t = _counts(partials_ptr, GATHERED, t, end, rows, count, C)
        mask = (n_t > 0)[:, None] & c_mask[None, :]
        at = partials_ptr + t[:, None] * stride_t + c[None, :]
        away = tl.load(at, mask=mask, other=0.0, cache_modifier=CACHE) - pivot - delta
        m2_t = tl.load(at + stride_what, mask=mask, other=0.0, cache_modifier=CACHE)
        total += tl.where(mask, m2_t + n_t[:, None] * (away * away), 0.0)
    return rows_seen, tl.reshape(pivot + delta, (BLOCK_C,)), tl.sum(total, axis=0)


@triton.jit(do_not_specialize=["tiles", "chunks", "chunk", "rows", "count"])
def _merge_kernel(
    partials_ptr, out_ptr, tiles, chunks, chunk, rows, count, C: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    first = tl.program_id(0) * chunk
    end = min(first + chunk, tiles)
    _, mean, m2 = _merged(partials_ptr, False, first, end, tiles, rows, count, c, C, BLOCK_T, BLOCK_C, "")
    out = out_ptr + tl.program_id(0) * C + c
    tl.store(out, mean, mask=c < C)
    tl.store(out + chunks * C, m2, mask=c < C)


@triton.jit
def _store_vectors(
    centre, mean, var, inv_count, batch_mean, batch_var, gamma_ptr, beta_ptr, eps, vectors_ptr, clamp_ptr, c,
    C: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Store all rows of ``vectors`` and of ``clamp`` from the statistics of y."""
    c_mask = c < C
    gamma, beta = load_optional(gamma_ptr, c, c_mask, 1.0), load_optional(beta_ptr, c, c_mask, 0.0)
    invstd = tl.div_rn(1.0, tl.sqrt_rn(var + eps))
    scale = gamma * invstd
    shift = beta - mean * scale
    # relu(scale * y + shift) = fold * (clamp(y) - thr); constant where 16 bit cannot hold the threshold
    constant = (scale == 0.0) | (tl.abs(shift) > 65504.0 * tl.abs(scale))
    thr = tl.where(constant, 0.0, tl.div_rn(-shift, tl.where(constant, 1.0, scale)))
    fold = tl.where(constant, tl.where(shift > 0.0, shift, 0.0), scale)
    if clamp_ptr is not None:
        dtype: tl.constexpr = clamp_ptr.dtype.element_ty
        rounded = round_to(thr, dtype, UPCAST)
        thr = rounded.to(tl.float32)
        fixed = tl.where(shift > 0.0, 1.0, 0.0)
        lo = tl.where(constant, fixed, tl.where(scale < 0.0, float("-inf"), thr))
        hi = tl.where(constant, fixed, tl.where(scale < 0.0, thr, float("inf")))
        tl.store(clamp_ptr + LO * C + c, round_to(lo, dtype, UPCAST), mask=c_mask)
        tl.store(clamp_ptr + HI * C + c, round_to(hi, dtype, UPCAST), mask=c_mask)
        tl.store(clamp_ptr + THRESHOLD * C + c, rounded, mask=c_mask)
    tl.store(vectors_ptr + CENTRE * C + c, centre, mask=c_mask)
    tl.store(vectors_ptr + MEAN * C + c, mean, mask=c_mask)
    tl.store(vectors_ptr + INVSTD * C + c, invstd, mask=c_mask)
    tl.store(vectors_ptr + SCALE * C + c, scale, mask=c_mask)
    tl.store(vectors_ptr + SHIFT * C + c, shift, mask=c_mask)
    tl.store(vectors_ptr + INV_COUNT * C + c, tl.zeros_like(mean) + inv_count, mask=c_mask)
    tl.store(vectors_ptr + BATCH_MEAN * C + c, batch_mean, mask=c_mask)
    tl.store(vectors_ptr + BATCH_VAR * C + c, batch_var, mask=c_mask)
    tl.store(vectors_ptr + FOLD * C + c, fold, mask=c_mask)
    tl.store(vectors_ptr + THR * C + c, thr, mask=c_mask)


@triton.jit
def _centre(centre_ptr, bias_ptr, c, C: tl.constexpr):
    """Return (what the convolution subtracted before its one rounding, its bias); see conv_fwd.py."""
    bias = load_optional(bias_ptr, c, c < C, 0.0)
    if centre_ptr is None:
        return tl.zeros_like(bias), bias
    else:
        return usable_centre(load_optional(centre_ptr, c, c < C, 0.0) - bias), bias


@triton.jit
def _update(running_ptr, stride, value, keep, momentum, c, C: tl.constexpr):
    """running = keep * running + momentum * value, in fp32, rounded to the dtype of the running statistic."""
    at = running_ptr + c * stride
    moved = tl.load(at, mask=c < C, other=0.0).to(tl.float32) * keep + value * momentum
    store_rounded(at, moved, c < C)


@triton.jit
def finalize_program(
    pid, ready_ptr, partials_ptr, merged_ptr, counters_ptr, gamma_ptr, beta_ptr, bias_ptr, centre_ptr,
    mean_ptr, var_ptr, vectors_ptr, clamp_ptr,
    tiles, chunks, chunk, rows, count, eps, keep, momentum, mean_stride, var_stride,
    GATHERED: tl.constexpr, C: tl.constexpr, UPCAST: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Merge ``chunk`` tiles of a channel block; the last program of a channel block merges the chunks and finalizes.

    ``ready_ptr``: where each channel block arrives once its vectors are stored; None if the launch does not read them.
    """
    blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    block, part = pid % blocks, pid // blocks
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    first = part * chunk
    n, mean, m2 = _merged(
        partials_ptr, GATHERED, first, min(first + chunk, tiles), tiles, rows, count, c, C, BLOCK_T, BLOCK_C, ""
    )
    last = True
    if merged_ptr is not None:
        out = merged_ptr + part * C + c
        tl.store(out, mean, mask=c < C)
        tl.store(out + chunks * C, m2, mask=c < C)
        last = arrive(counters_ptr + BLOCKS + block) == chunks - 1
        if last:
            n, mean, m2 = _merged(
                merged_ptr, False, 0, chunks, chunks, rows * chunk, count, c, C, BLOCK_T, BLOCK_C, ".cg"
            )
    if last:
        n = tl.maximum(n, 1.0)
        centre, bias = _centre(centre_ptr, bias_ptr, c, C)
        batch_mean, batch_var = mean + centre + bias, m2 / tl.maximum(n - 1.0, 1.0)
        _store_vectors(
            centre, mean, m2 / n, 1.0 / n, batch_mean, batch_var,
            gamma_ptr, beta_ptr, eps, vectors_ptr, clamp_ptr, c, C, UPCAST,
        )  # fmt: skip
        # the running mean may be the centre: it has been read
        if mean_ptr is not None:
            _update(mean_ptr, mean_stride, batch_mean, keep, momentum, c, C)
            _update(var_ptr, var_stride, batch_var, keep, momentum, c, C)
        if ready_ptr is not None:
            arrive(ready_ptr)


@triton.jit
def finalize_first(
    partials_ptr, merged_ptr, counters_ptr, gamma_ptr, beta_ptr, bias_ptr, centre_ptr, mean_ptr, var_ptr, vectors_ptr,
    tiles, chunks, chunk, rows, count, eps, keep, momentum, mean_stride, var_stride,
    partials_d_ptr, merged_d_ptr, counters_d_ptr, gamma_d_ptr, beta_d_ptr, bias_d_ptr, centre_d_ptr, mean_d_ptr,
    var_d_ptr, vectors_d_ptr, tiles_d, chunks_d, chunk_d, rows_d, count_d, eps_d, keep_d, momentum_d,
    mean_stride_d, var_stride_d,
    C: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Do what no other program has begun of one or two norms' finalization, in a program that reads their vectors.

    Return whether it was not ready; then :func:`wait_for_vectors` before reading the vectors.
    """
    blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    expected: tl.constexpr = blocks if partials_d_ptr is None else 2 * blocks
    early = arrived(counters_ptr + READY) < expected
    if early:
        own, every = blocks * chunks, blocks * chunks
        if partials_d_ptr is not None:
            every += blocks * chunks_d
        number = draw(counters_ptr + TICKET)
        while number < every:
            if number < own:
                finalize_program(
                    number, counters_ptr + READY, partials_ptr, merged_ptr, counters_ptr,
                    gamma_ptr, beta_ptr, bias_ptr, centre_ptr, mean_ptr, var_ptr, vectors_ptr, None,
                    tiles, chunks, chunk, rows, count, eps, keep, momentum, mean_stride, var_stride,
                    False, C, False, BLOCK_T, BLOCK_C,
                )  # fmt: skip
            else:
                if partials_d_ptr is not None:
                    finalize_program(
                        number - own, counters_ptr + READY, partials_d_ptr, merged_d_ptr, counters_d_ptr,
                        gamma_d_ptr, beta_d_ptr, bias_d_ptr, centre_d_ptr, mean_d_ptr, var_d_ptr, vectors_d_ptr, None,
                        tiles_d, chunks_d, chunk_d, rows_d, count_d, eps_d, keep_d, momentum_d,
                        mean_stride_d, var_stride_d, False, C, False, BLOCK_T, BLOCK_C,
                    )  # fmt: skip
            number = draw(counters_ptr + TICKET)
    return early


@triton.jit
def wait_for_vectors(early, counters_ptr, partials_d_ptr, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return once the vectors of :func:`finalize_first`, which returned ``early``, are ready."""
    blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    expected: tl.constexpr = blocks if partials_d_ptr is None else 2 * blocks
    if early:
        wait(counters_ptr + READY, expected)


@triton.jit(do_not_specialize=NUMBERS)
def _finalize_kernel(
    partials_ptr, merged_ptr, counters_ptr, gamma_ptr, beta_ptr, bias_ptr, centre_ptr, mean_ptr, var_ptr, vectors_ptr,
    tiles, chunks, chunk, rows, count, eps, keep, momentum, mean_stride, var_stride, clamp_ptr,
    weight_ptr, fold_ptr, w_ptr, const_ptr, stride_co, stride_ci, stride_r, stride_s,
    GATHERED: tl.constexpr, C: tl.constexpr, UPCAST: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
    CI: tl.constexpr, CO: tl.constexpr, GROUPS: tl.constexpr, OWN_CI: tl.constexpr, OWN_CO: tl.constexpr,
    R: tl.constexpr, S: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, UPCAST_W: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    AWAITED: tl.constexpr = fold_ptr is not None
    ready_ptr = counters_ptr + READY if AWAITED else None
    pid = draw(counters_ptr + TICKET) if AWAITED else tl.program_id(0)
    if weight_ptr is None:
        finalize_program(
            pid, ready_ptr, partials_ptr, merged_ptr, counters_ptr, gamma_ptr, beta_ptr, bias_ptr, centre_ptr,
            mean_ptr, var_ptr, vectors_ptr, clamp_ptr,
            tiles, chunks, chunk, rows, count, eps, keep, momentum, mean_stride, var_stride,
            GATHERED, C, UPCAST, BLOCK_T, BLOCK_C,
        )  # fmt: skip
    else:
        if pid < blocks * chunks:
            finalize_program(
                pid, ready_ptr, partials_ptr, merged_ptr, counters_ptr, gamma_ptr, beta_ptr, bias_ptr, centre_ptr,
                mean_ptr, var_ptr, vectors_ptr, clamp_ptr,
                tiles, chunks, chunk, rows, count, eps, keep, momentum, mean_stride, var_stride,
                GATHERED, C, UPCAST, BLOCK_T, BLOCK_C,
            )  # fmt: skip
        else:
            pack_forward_program(
                pid - blocks * chunks, ready_ptr, blocks,
                weight_ptr, fold_ptr, w_ptr, const_ptr, stride_co, stride_ci, stride_r, stride_s,
                CI, CO, GROUPS, OWN_CI, OWN_CO, R, S, ROWS, WIDTH, UPCAST_W,
            )  # fmt: skip


@triton.jit(do_not_specialize=["eps"])
def _constant_kernel(
    mean_ptr, var_ptr, gamma_ptr, beta_ptr, bias_ptr, centre_ptr, vectors_ptr, clamp_ptr, eps,
    C: tl.constexpr, UPCAST: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    centre, bias = _centre(centre_ptr, bias_ptr, c, C)
    given, var = load_optional(mean_ptr, c, c < C, 0.0), load_optional(var_ptr, c, c < C, 1.0)
    mean = given - centre - bias
    _store_vectors(centre, mean, var, 0.0, given, var, gamma_ptr, beta_ptr, eps, vectors_ptr, clamp_ptr, c, C, UPCAST)


def _dense(*parameters: Tensor | None) -> list[Tensor | None]:
    return [None if p is None else p.detach().contiguous() for p in parameters]


def outputs(channels: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Return uninitialised ``vectors`` (10, C) fp32 and ``clamp`` (3, C) in ``dtype``, None for fp32."""
    vectors = torch.empty((10, channels), dtype=torch.float32, device=device)
    return vectors, None if dtype == torch.float32 else torch.empty((3, channels), dtype=dtype, device=device)


def _own(partials: Tensor, rows: int, count: int) -> Tensor:
    """Merge all tiles of ``partials`` (2, tiles, C), for the other processes of a group: (3, 1, C), the count last."""
    c = partials.shape[2]
    while True:
        tiles = partials.shape[1]
        chunk = CHUNK if tiles > LAST_TILES else LAST_TILES
        chunks = max(1, -(-tiles // chunk))  # a process without images has no tile
        own = partials.new_full((3, chunks, c), count)
        submit(
            _merge_kernel, (chunks, blocks_of(c)), partials, own, tiles, chunks, chunk, rows, count,
            C=c, BLOCK_T=BLOCK_T, BLOCK_C=BLOCK_C,
        )  # fmt: skip
        if chunk == LAST_TILES:
            return own
        partials, rows = own[:2], rows * chunk


def chunks_of(tiles: int) -> tuple[int, int]:
    """Return (chunks, tiles per chunk): one chunk if a program can merge all tiles, else at most LAST_TILES of them."""
    if tiles <= LAST_TILES:
        return 1, tiles
    chunk = max(CHUNK, -(-tiles // LAST_TILES))
    return -(-tiles // chunk), chunk


def blocks_of(channels: int) -> int:
    """Return the channel blocks of a norm."""
    return -(-channels // BLOCK_C)


def finalize(
    partials: Tensor,
    rows: int,
    count: int,
    norm: Norm,
    bias: Tensor | None,
    centre: Tensor | None,
    out: tuple[Tensor, Tensor | None],
    group: str = "",
    update: bool = False,
    counters: Tensor | None = None,
    passenger: Passenger = NO_FORWARD,
) -> None:
    """Compute the vectors of a norm on the batch's statistics, in one launch.

    Args:
        partials: (2, tiles, C), mean and M2 of each tile.
        rows: rows of a tile; the last tile may be shorter.
        count: rows in total.
        norm: its parameters and eps.
        bias, centre: (C,) or None: the convolution's bias, which y does not contain, and the mean that ``conv_fwd``
            subtracted less that bias. ``centre`` may be ``norm.mean``.
        out: ``vectors`` (10, C) fp32 and ``clamp`` (3, C) in the dtype of y, None for fp32; of :func:`outputs`.
        group: name of the process group that normalises together; empty for this process alone.
        update: whether to move ``norm.mean`` and ``norm.var``, if there are any, towards the batch's statistics with
            ``norm.momentum``, as :func:`torch.nn.functional.batch_norm` does.
        counters: (2 + blocks,) int32, zeros that this launch uses up; None to make them.
        passenger: of :func:`pack.forward_passenger`; with a packed prologue it reads ``vectors``.
    """
    if group:
        partials = _gathered(_own(partials, rows, count), group)
    vectors, clamp = out
    own = finalization(partials, rows, count, norm, bias, centre, vectors, update, counters, bool(group))
    submit(
        _finalize_kernel, (own.programs + passenger.programs,), *own.arguments, clamp, *passenger.arguments,
        GATHERED=bool(group), UPCAST=_upcasts(clamp), **own.constants, **passenger.constants,
    )  # fmt: skip


def finalization(
    partials: Tensor,
    rows: int,
    count: int,
    norm: Norm,
    bias: Tensor | None,
    centre: Tensor | None,
    vectors: Tensor,
    update: bool = False,
    counters: Tensor | None = None,
    gathered: bool = False,
) -> Passenger:
    """Return the programs that compute the vectors of a norm on the batch's statistics, for :func:`finalize_first`.

    Arguments are those of :func:`finalize`. There is no clamp: the end of a block reads the vectors. ``gathered``:
    ``partials`` are (processes, 3, C), of :func:`_gathered`.
    """
    tiles, c = partials.shape[0 if gathered else 1], partials.shape[2]
    chunks, chunk = (1, tiles) if gathered else chunks_of(tiles)
    merged = partials.new_empty((2, chunks, c)) if chunks > 1 else None
    if counters is None:
        counters = partials.new_zeros(2 + blocks_of(c), dtype=torch.int32)
    running = norm[2:4] if update and norm.mean is not None and norm.var is not None else (None, None)
    arguments = (
        partials, merged, counters, *_dense(norm.weight, norm.bias, bias, centre), *running, vectors,
        tiles, chunks, chunk, rows, count, norm.eps, 1 - norm.momentum, norm.momentum,
        *(1 if t is None else t.stride(0) for t in running),
    )  # fmt: skip
    return Passenger(blocks_of(c) * chunks, arguments, {"C": c, "BLOCK_T": BLOCK_T, "BLOCK_C": BLOCK_C})


_NO_FINALIZATION = (*[None] * 10, 0, 0, 0, 0, 0, 0.0, 0.0, 0.0, 1, 1)


def finalization_arguments(finalizations: Sequence[Passenger], norms: int = 2) -> tuple[Any, ...]:
    """Return the arguments of :func:`finalize_first` for up to ``norms`` of :func:`finalization`; None for the rest."""
    given = [*(f.arguments for f in finalizations), *[_NO_FINALIZATION] * (norms - len(finalizations))]
    return tuple(argument for arguments in given for argument in arguments)


def finalized(partials: Tensor, rows: int, count: int, norm: Norm, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Return ``vectors`` and ``clamp`` of :func:`finalize` for a raw output in ``dtype``, of a convolution alone."""
    out = outputs(partials.shape[2], dtype, partials.device)
    finalize(partials, rows, count, norm, None, None, out)
    return out


def constant(norm: Norm, bias: Tensor | None, centre: Tensor | None, out: tuple[Tensor, Tensor | None]) -> None:
    """Compute ``vectors`` and ``clamp`` of a norm on constant statistics, or of an absent one.

    y is conv - (centre - bias), so ``relu(bn(conv + bias))`` is a norm of y with the mean ``norm.mean - centre``, in
    the form of :func:`resnet_fast.folding.scale_shift`. Arguments are those of :func:`finalize`.
    """
    vectors, clamp = out
    channels = vectors.shape[1]
    given = norm.mean is not None and norm.var is not None
    mean, var, eps = (norm.mean, norm.var, norm.eps) if given else (None, None, 0.0)
    submit(
        _constant_kernel, (blocks_of(channels),),
        *_dense(mean, var, norm.weight, norm.bias, bias, centre), vectors, clamp, eps,
        C=channels, UPCAST=_upcasts(clamp), BLOCK_C=BLOCK_C,
    )  # fmt: skip


def _upcasts(clamp: Tensor | None) -> bool:
    return clamp is not None and upcasts(clamp.dtype)


def _gathered(own: Tensor, group: str) -> Tensor:
    """Gather ``own`` (3, 1, C) of every process of the group: (processes, 3, C)."""
    from torch.distributed.distributed_c10d import _resolve_process_group

    size = _resolve_process_group(group).size()  # type: ignore[arg-type]
    gathered = torch.ops._c10d_functional.all_gather_into_tensor(own, size, group)
    return torch.ops._c10d_functional.wait_tensor(gathered).view(size, 3, own.shape[2])
