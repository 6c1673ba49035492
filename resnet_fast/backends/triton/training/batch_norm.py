r"""BatchNorm in a training step: the vectors of a raw output, from its statistics, and the gradient's coefficients.

    forward     partials[:, t, c] = mean and M2 = sum (y - mean)^2 of y[m, c] over the rows m of tile t
                mean = pivot + sum_t n_t (mean_t - pivot) / n        M2 = sum_t M2_t + n_t (mean_t - mean)^2
                INVSTD = 1 / sqrt(M2/n + eps)    SCALE = gamma * INVSTD    SHIFT = beta - mean * SCALE      (vectors.py)

    backward    partials[:, t, c] = sum g and sum g * (y - MEAN) over the rows of tile t
                s1 = sum_t / n      s2 = INVSTD * sum_t / n      dgamma = INVSTD * sum_t      dbeta = sum_t
                A = SCALE           B = -A * INVSTD * s2         C = A * (INVSTD * s2 * MEAN - s1)

(Ioffe and Szegedy 2015, section 3; Chan, Golub and LeVeque 1979 for the merge.) The epilogues of conv_fwd, conv_dgrad,
block_end and pool compute the partials. Around a convolution on cuDNN two passes replace them: ``statistics`` reads y,
and ``apply_backward`` writes dy = A*g + B*y + C.

Saved bytes. Stock BatchNorm reads y twice and writes the result; in backward it reads g and y twice and writes dy. Here
nothing of that size moves, except around cuDNN: y is read once; g and y are read, and dy is written.

    tiles t ->                     Merge: a program owns BLOCK_C channels and a chunk of CHUNK tiles, read BLOCK_T at a
    c [ . . . . | . . . . | . ]    time. A chunk's result is a partial too, of CHUNK times as many rows, so launches
        chunk 0   chunk 1          repeat until at most LAST_TILES are left for the final kernel.

Numerics. fp32. A mean is a small distance from a pivot among the data, and M2 a sum of squared distances from the mean:
nothing cancels when |mean| >> std. Only the shape decides the order of sums, so the result is the same bits every time.
Only this file and ``folding`` compute with eps; this one because a batch's variance exists on the device only.

Several processes. (mean, M2, count) of each are gathered and merged by the same kernel; counts may differ and be zero.
The backward sums are all-reduced for A, B and C; dgamma and dbeta remain those of this process, for DDP to average.

Alone: ``TRITON_INTERPRET=1 python -m pytest tests/backends/triton/training/test_batch_norm.py``.

Not taken: one pass over the partials by squared distances from the pivot. A first tile far from the others would cancel
digits, and the second pass reads L1. For the same reason, statistics are not sums of y - pivot and of its square:
Welford's algorithm costs one more instruction per element, of eight.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....calls import Norm
from ..launch import submit, upcasts
from ..tiles import round_to, store_rounded
from . import vectors as v
from .conv_fwd import usable_centre
from .passes import (
    MEAN,
    SCALE,
    SHIFT,
    channels_of_program,
    empty_image,
    grid_of,
    mask_of,
    rows_of,
    tile_of,
    vector,
    walk,
)
from .vectors import Grad

CHUNK, LAST_TILES = 128, 256
BLOCK_T, BLOCK_C = 128, 16
"""Tiles and channels of a merge; a thread has 16 loads, all in flight."""

CENTRE, INVSTD, INV_COUNT = tl.constexpr(v.CENTRE), tl.constexpr(v.INVSTD), tl.constexpr(v.INV_COUNT)
BATCH_MEAN, BATCH_VAR = tl.constexpr(v.BATCH_MEAN), tl.constexpr(v.BATCH_VAR)
FOLD, THR = tl.constexpr(v.FOLD), tl.constexpr(v.THR)
LO, HI, THRESHOLD = tl.constexpr(v.LO), tl.constexpr(v.HI), tl.constexpr(v.THRESHOLD)
A, B, CONSTANT = tl.constexpr(v.A), tl.constexpr(v.B), tl.constexpr(v.C)
BETA_HI, BETA_LO, GAMMA = tl.constexpr(v.BETA_HI), tl.constexpr(v.BETA_LO), tl.constexpr(v.GAMMA)


@triton.jit(do_not_specialize=["M", "tiles", "steps"])
def _statistics_kernel(
    y_ptr, partials_ptr, M, tiles, steps, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr
):
    tile, c = channels_of_program(C, BLOCK_C)
    first = tile * steps * BLOCK_M
    rows = min(M - first, steps * BLOCK_M)
    base = y_ptr + first.to(tl.int64) * C
    slot = tl.arange(0, BLOCK_M)
    # Welford (1962) in every slot of the tile: mean += (y - mean) / n, M2 += (y - mean_before) * (y - mean)
    mean = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    m2 = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    for step in range(0, steps):
        row = step * BLOCK_M + slot
        mask = mask_of(row < rows, c, C, BLOCK_C)
        y = tl.load(base + (row[:, None] * C + c[None, :]), mask=mask, other=0.0).to(tl.float32)
        distance = tl.where(mask, y - mean, 0.0)
        mean += distance * (1.0 / (step + 1))
        m2 += distance * (y - mean)
    # Chan over the slots, relative to the first row
    n = ((rows - slot + (BLOCK_M - 1)) // BLOCK_M).to(tl.float32)[:, None]
    pivot = tl.load(base + c, mask=c < C, other=0.0).to(tl.float32)
    delta = tl.sum(n * (mean - pivot[None, :]), axis=0) / rows.to(tl.float32)
    away = mean - pivot[None, :] - delta[None, :]
    m2_tile = tl.sum(m2 + n * away * away, axis=0)
    out = partials_ptr + tile * C + c
    tl.store(out, pivot + delta, mask=c < C)
    tl.store(out + tiles * C, m2_tile, mask=c < C)


def statistics(y: Tensor) -> tuple[Tensor, int]:
    """Return (partials, rows): (2, tiles, C) fp32, mean and M2 of y (N, C, H, W) in each tile of ``rows`` rows."""
    c, tile = y.shape[1], tile_of(y, 4)
    steps, tiles = walk(y, tile)
    partials = y.new_empty((2, tiles, c), dtype=torch.float32)
    submit(
        _statistics_kernel,
        grid_of(tiles, y, tile[1]),
        y,
        partials,
        rows_of(y),
        tiles,
        steps,
        C=c,
        BLOCK_M=tile[0],
        BLOCK_C=tile[1],
    )
    return partials, steps * tile[0]


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
    C: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Return (n, mean, M2) of the tiles ``first`` to ``end`` by Chan's formula; zeros if they have no rows.

    GATHERED: (tiles, 3, C) of mean, M2 and count per process; otherwise (2, tiles, C).
    """
    stride_t: tl.constexpr = 3 * C if GATHERED else C
    stride_what = C if GATHERED else tiles * C
    c_mask = c < C
    pivot = tl.load(partials_ptr + first * stride_t + c, mask=c_mask & (first < end), other=0.0)[None, :]
    n = tl.zeros((BLOCK_T,), dtype=tl.float32)
    total = tl.zeros((BLOCK_T, BLOCK_C), dtype=tl.float32)
    for start in range(first, end, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        n_t = _counts(partials_ptr, GATHERED, t, end, rows, count, C)
        mask = (n_t > 0)[:, None] & c_mask[None, :]
        mean_t = tl.load(partials_ptr + t[:, None] * stride_t + c[None, :], mask=mask, other=0.0)
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
        away = tl.load(at, mask=mask, other=0.0) - pivot - delta
        m2_t = tl.load(at + stride_what, mask=mask, other=0.0)
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
    _, mean, m2 = _merged(partials_ptr, False, first, end, tiles, rows, count, c, C, BLOCK_T, BLOCK_C)
    out = out_ptr + tl.program_id(0) * C + c
    tl.store(out, mean, mask=c < C)
    tl.store(out + chunks * C, m2, mask=c < C)


@triton.jit
def _optional(ptr, c, c_mask, absent: tl.constexpr, C: tl.constexpr):
    """Load a parameter as fp32; ``absent`` if there is none."""
    if ptr is None:
        return tl.zeros_like(c).to(tl.float32) + absent
    else:
        return tl.load(ptr + c, mask=c_mask, other=0.0).to(tl.float32)


@triton.jit
def _store_vectors(
    centre, mean, var, inv_count, batch_mean, batch_var, gamma_ptr, beta_ptr, eps, vectors_ptr, clamp_ptr, c,
    C: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Store all rows of ``vectors`` and of ``clamp`` from the statistics of y."""
    c_mask = c < C
    gamma, beta = _optional(gamma_ptr, c, c_mask, 1.0, C), _optional(beta_ptr, c, c_mask, 0.0, C)
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
    bias = _optional(bias_ptr, c, c < C, 0.0, C)
    if centre_ptr is None:
        return tl.zeros_like(bias), bias
    else:
        return usable_centre(_optional(centre_ptr, c, c < C, 0.0, C) - bias), bias


@triton.jit
def _update(running_ptr, stride, value, keep, momentum, c, C: tl.constexpr):
    """running = keep * running + momentum * value, in fp32, rounded to the dtype of the running statistic."""
    at = running_ptr + c * stride
    moved = tl.load(at, mask=c < C, other=0.0).to(tl.float32) * keep + value * momentum
    store_rounded(at, moved, c < C)


@triton.jit(do_not_specialize=["tiles", "rows", "count", "eps", "keep", "momentum"])
def _finalize_kernel(
    partials_ptr, gamma_ptr, beta_ptr, bias_ptr, centre_ptr, mean_ptr, var_ptr, vectors_ptr, clamp_ptr,
    tiles, rows, count, eps, keep, momentum, mean_stride, var_stride, GATHERED: tl.constexpr,
    C: tl.constexpr, UPCAST: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    n, mean, m2 = _merged(partials_ptr, GATHERED, 0, tiles, tiles, rows, count, c, C, BLOCK_T, BLOCK_C)
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


@triton.jit(do_not_specialize=["eps"])
def _constant_kernel(
    mean_ptr, var_ptr, gamma_ptr, beta_ptr, bias_ptr, centre_ptr, vectors_ptr, clamp_ptr, eps,
    C: tl.constexpr, UPCAST: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    centre, bias = _centre(centre_ptr, bias_ptr, c, C)
    given, var = _optional(mean_ptr, c, c < C, 0.0, C), _optional(var_ptr, c, c < C, 1.0, C)
    mean = given - centre - bias
    _store_vectors(centre, mean, var, 0.0, given, var, gamma_ptr, beta_ptr, eps, vectors_ptr, clamp_ptr, c, C, UPCAST)


def _dense(*parameters: Tensor | None) -> list[Tensor | None]:
    return [None if p is None else p.detach().contiguous() for p in parameters]


def _outputs(channels: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor | None]:
    vectors = torch.empty((10, channels), dtype=torch.float32, device=device)
    return vectors, None if dtype == torch.float32 else torch.empty((3, channels), dtype=dtype, device=device)


def _merge(partials: Tensor, rows: int, count: int, chunk: int, out: Tensor) -> None:
    """Merge chunks of ``chunk`` tiles of ``partials`` (2, tiles, C) into ``out`` (2, chunks, C)."""
    tiles, c = partials.shape[1:]
    submit(
        _merge_kernel,
        (out.shape[1], -(-c // BLOCK_C)),
        partials,
        out,
        tiles,
        out.shape[1],
        chunk,
        rows,
        count,
        C=c,
        BLOCK_T=BLOCK_T,
        BLOCK_C=BLOCK_C,
    )


def finalize(
    partials: Tensor,
    rows: int,
    count: int,
    norm: Norm,
    bias: Tensor | None,
    centre: Tensor | None,
    dtype: torch.dtype,
    group: str = "",
    update: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Compute the vectors of a norm on the batch's statistics.

    Args:
        partials: (2, tiles, C), mean and M2 of each tile.
        rows: rows of a tile; the last tile may be shorter.
        count: rows in total.
        norm: its parameters and eps.
        bias, centre: (C,) or None: the convolution's bias, which y does not contain, and the mean that ``conv_fwd``
            subtracted less that bias. ``centre`` may be ``norm.mean``.
        dtype: of y.
        group: name of the process group that normalises together; empty for this process alone.
        update: whether to move ``norm.mean`` and ``norm.var``, if there are any, towards the batch's statistics with
            ``norm.momentum``, as :func:`torch.nn.functional.batch_norm` does.

    Returns:
        ``vectors`` (10, C) fp32 and ``clamp`` (3, C), None for fp32.
    """
    while partials.shape[1] > LAST_TILES:
        merged = partials.new_empty((2, -(-partials.shape[1] // CHUNK), partials.shape[2]))
        _merge(partials, rows, count, CHUNK, merged)
        partials, rows = merged, rows * CHUNK
    tiles, c = partials.shape[1:]
    if group:
        own = partials.new_full((3, 1, c), count)
        _merge(partials, rows, count, LAST_TILES, own[:2])
        partials = _gathered(own, group)
        tiles = partials.shape[0]
    vectors, clamp = _outputs(c, dtype, partials.device)
    running = norm[2:4] if update and norm.mean is not None and norm.var is not None else (None, None)
    submit(
        _finalize_kernel, (-(-c // BLOCK_C),),
        partials, *_dense(norm.weight, norm.bias, bias, centre), *running, vectors, clamp,
        tiles, rows, count, norm.eps, 1 - norm.momentum, norm.momentum,
        *(1 if t is None else t.stride(0) for t in running),
        GATHERED=bool(group), C=c, UPCAST=upcasts(dtype), BLOCK_T=BLOCK_T, BLOCK_C=BLOCK_C,
    )  # fmt: skip
    return vectors, clamp


def constant(
    norm: Norm,
    channels: int,
    bias: Tensor | None,
    centre: Tensor | None,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, Tensor | None]:
    """Compute ``vectors`` and ``clamp`` of a norm on constant statistics, or of an absent one.

    y is conv - (centre - bias), so ``relu(bn(conv + bias))`` is a norm of y with the mean ``norm.mean - centre``, in
    the form of :func:`resnet_fast.folding.scale_shift`. Arguments and results are those of :func:`finalize`.
    """
    vectors, clamp = _outputs(channels, dtype, device)
    given = norm.mean is not None and norm.var is not None
    mean, var, eps = (norm.mean, norm.var, norm.eps) if given else (None, None, 0.0)
    submit(
        _constant_kernel, (-(-channels // BLOCK_C),),
        *_dense(mean, var, norm.weight, norm.bias, bias, centre), vectors, clamp, eps,
        C=channels, UPCAST=upcasts(dtype), BLOCK_C=BLOCK_C,
    )  # fmt: skip
    return vectors, clamp


def _gathered(own: Tensor, group: str) -> Tensor:
    """Gather ``own`` (3, 1, C) of every process of the group: (processes, 3, C)."""
    from torch.distributed.distributed_c10d import _resolve_process_group

    size = _resolve_process_group(group).size()  # type: ignore[arg-type]
    gathered = torch.ops._c10d_functional.all_gather_into_tensor(own, size, group)
    return torch.ops._c10d_functional.wait_tensor(gathered).view(size, 3, own.shape[2])


def _reduced(own: Tensor, group: str) -> Tensor:
    """Return the sum of ``own`` over the processes of the group."""
    return torch.ops._c10d_functional.wait_tensor(torch.ops._c10d_functional.all_reduce(own, "sum", group))


@triton.jit
def _summed(partials_ptr, first, end, tiles, c, C: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return both sums over the tiles ``first`` to ``end``."""
    one = tl.zeros((BLOCK_T, BLOCK_C), dtype=tl.float32)
    two = tl.zeros((BLOCK_T, BLOCK_C), dtype=tl.float32)
    for start in range(first, end, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        mask = (t < end)[:, None] & (c < C)[None, :]
        at = partials_ptr + t[:, None] * C + c[None, :]
        one += tl.load(at, mask=mask, other=0.0)
        two += tl.load(at + tiles * C, mask=mask, other=0.0)
    return tl.sum(one, axis=0), tl.sum(two, axis=0)


@triton.jit(do_not_specialize=["tiles", "chunks", "chunk"])
def _sum_kernel(
    partials_ptr, out_ptr, tiles, chunks, chunk, C: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr
):
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    first = tl.program_id(0) * chunk
    one, two = _summed(partials_ptr, first, min(first + chunk, tiles), tiles, c, C, BLOCK_T, BLOCK_C)
    out = out_ptr + tl.program_id(0) * C + c
    tl.store(out, one, mask=c < C)
    tl.store(out + chunks * C, two, mask=c < C)


@triton.jit(do_not_specialize=["tiles"])
def _coefficients_kernel(
    partials_ptr, own_ptr, vectors_ptr, coefficients_ptr, packed_ptr, dgamma_ptr, dbeta_ptr, tiles,
    C: tl.constexpr, BATCH: tl.constexpr, UPCAST: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_mask = c < C
    one, two = _summed(partials_ptr, 0, tiles, tiles, c, C, BLOCK_T, BLOCK_C)
    own_one, own_two = one, two
    if own_ptr is not None:
        own_one = tl.load(own_ptr + c, mask=c_mask, other=0.0)
        own_two = tl.load(own_ptr + C + c, mask=c_mask, other=0.0)
    invstd = tl.load(vectors_ptr + INVSTD * C + c, mask=c_mask, other=0.0)
    a = tl.load(vectors_ptr + SCALE * C + c, mask=c_mask, other=0.0)
    tl.store(dgamma_ptr + c, invstd * own_two, mask=c_mask)
    tl.store(dbeta_ptr + c, own_one, mask=c_mask)
    # dy = a * (g + beta * y + gamma)
    beta, gamma = tl.zeros_like(a), tl.zeros_like(a)
    if BATCH:
        inv_count = tl.load(vectors_ptr + INV_COUNT * C + c, mask=c_mask, other=0.0)
        s1, s2 = one * inv_count, two * invstd * inv_count
        beta = -invstd * s2
        gamma = -beta * tl.load(vectors_ptr + MEAN * C + c, mask=c_mask, other=0.0) - s1
    tl.store(coefficients_ptr + A * C + c, a, mask=c_mask)
    tl.store(coefficients_ptr + B * C + c, a * beta, mask=c_mask)
    tl.store(coefficients_ptr + CONSTANT * C + c, a * gamma, mask=c_mask)
    if packed_ptr is not None:
        dtype: tl.constexpr = packed_ptr.dtype.element_ty
        # dy is 0 where a is 0, and a coefficient that overflows 16 bit must not turn it into NaN
        beta, gamma = tl.where(a == 0.0, 0.0, beta), tl.where(a == 0.0, 0.0, gamma)
        hi = round_to(beta, dtype, UPCAST)
        tl.store(packed_ptr + BETA_HI * C + c, hi, mask=c_mask)
        tl.store(packed_ptr + BETA_LO * C + c, round_to(beta - hi.to(tl.float32), dtype, UPCAST), mask=c_mask)
        tl.store(packed_ptr + GAMMA * C + c, round_to(gamma, dtype, UPCAST), mask=c_mask)


def _sum(partials: Tensor, chunk: int) -> Tensor:
    """Sum chunks of ``chunk`` tiles: (2, tiles, C) -> (2, chunks, C)."""
    tiles, c = partials.shape[1:]
    out = partials.new_empty((2, -(-tiles // chunk), c))
    submit(
        _sum_kernel,
        (out.shape[1], -(-c // BLOCK_C)),
        partials,
        out,
        tiles,
        out.shape[1],
        chunk,
        C=c,
        BLOCK_T=BLOCK_T,
        BLOCK_C=BLOCK_C,
    )
    return out


def coefficients(
    sums_partials: Tensor, vectors: Tensor, batch: bool, dtype: torch.dtype, group: str = ""
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Compute the coefficients of a raw output's gradient, and the gradients of gamma and beta.

    Args:
        sums_partials: (2, tiles, C), sum g and sum g * (y - MEAN) of each tile.
        vectors: (10, C) of the norm.
        batch: whether the norm used the batch's statistics.
        dtype: of y.
        group: name of the process group that normalises together; empty for this process alone.

    Returns:
        ``coefficients`` (3, C) fp32 and ``packed`` (3, C) in ``dtype`` (None for fp32), over all processes of the
        group; dgamma and dbeta (C,) fp32 of this process.
    """
    partials, own = sums_partials, None
    while partials.shape[1] > LAST_TILES:
        partials = _sum(partials, CHUNK)
    if group and batch:
        own = _sum(partials, LAST_TILES)
        partials = _reduced(own, group)
    tiles, c = partials.shape[1:]
    result = vectors.new_empty((3, c))
    packed = None if dtype == torch.float32 else vectors.new_empty((3, c), dtype=dtype)
    dgamma, dbeta = vectors.new_empty(c), vectors.new_empty(c)
    submit(
        _coefficients_kernel, (-(-c // BLOCK_C),),
        partials, own, vectors, result, packed, dgamma, dbeta, tiles,
        C=c, BATCH=batch, UPCAST=upcasts(dtype), BLOCK_T=BLOCK_T, BLOCK_C=BLOCK_C,
    )  # fmt: skip
    return result, packed, dgamma, dbeta


@triton.jit(do_not_specialize=["M"])
def _apply_backward_kernel(
    g_ptr, y_ptr, coefficients_ptr, dy_ptr, M,
    C: tl.constexpr, BATCH: tl.constexpr, UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    tile, c = channels_of_program(C, BLOCK_C)
    first = tile * BLOCK_M
    row = tl.arange(0, BLOCK_M)
    mask = mask_of(row < M - first, c, C, BLOCK_C)
    start, at = first.to(tl.int64) * C, row[:, None] * C + c[None, :]
    # dy = A * g + B * y + C
    g = tl.load(g_ptr + start + at, mask=mask, other=0.0).to(tl.float32)
    dy = g * vector(coefficients_ptr, c, A, C)
    if BATCH:
        y = tl.load(y_ptr + start + at, mask=mask, other=0.0).to(tl.float32)
        dy += y * vector(coefficients_ptr, c, B, C) + vector(coefficients_ptr, c, CONSTANT, C)
    tl.store(dy_ptr + start + at, round_to(dy, dy_ptr.dtype.element_ty, UPCAST), mask=mask)


def apply_backward(grad: Grad) -> Tensor:
    """Return dy (N, C, H, W) of a raw output, for a convolution with its backward on cuDNN."""
    g, tile = grad.g, tile_of(grad.g, 4)
    dy = empty_image(g)
    submit(
        _apply_backward_kernel, grid_of(-(-rows_of(g) // tile[0]), g, tile[1]),
        g, grad.y if grad.batch else None, grad.coefficients, dy, rows_of(g),
        C=g.shape[1], BATCH=grad.batch, UPCAST=upcasts(g.dtype), BLOCK_M=tile[0], BLOCK_C=tile[1],
    )  # fmt: skip
    return dy
