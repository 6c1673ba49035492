r"""The end of the stem in training: BatchNorm + ReLU + max-pool of a raw output, and its gradient.

No activation is stored.

    z[n, i, j, c] = max over the window (i, j) of act           act[n, h, w, c] = round(relu(SCALE*y + SHIFT))
    g[n, h, w, c] = sum of dz over the windows that (h, w) wins, where act > 0;  and sum g,  sum g * (y - MEAN)

    y, g (N, C, H, W) NHWC   z, dz (N, C, Hp, Wp) NHWC   any square window, stride and padding

Saved bytes, per image of ResNet-50's stem in 16 bit (y 112x112x64, 1.61 MB): stock moves 10.0 MB in forward (norm,
ReLU, pool and its 64-bit indices) and 11.7 in backward (pool, ReLU, the sums of BatchNorm); here 2.0 and 3.6.

    rows of pixels    cells     windows of 3 rows, stride 2
      u = 0           0         |0
      u = 1           0         |0             u = h + PAD. A cell is the STRIDE x STRIDE pixels where one window
      u = 2           1         |0 |1          starts; per axis REACH = ceil(KERNEL / STRIDE) windows meet
      u = 3           1            |1          in it.
      u = 4           2            |1 |2

A program owns BLOCK_M columns of cells (n, column), linearised over the batch, times BLOCK_C channels, and walks down a
strip of rows of cells. Unfinished results are carried in registers to the next row of cells: in forward the maximum so
far of windows that extend further down, in backward the gradient so far of pixels that the next windows share. So
memory is read once for any overlap; L1 serves the columns that neighbours share.

Forward: rounding is monotonic, so it follows the maximum, once per pooled pixel; the result is exactly the maximum of
rounded values. ReLU is the 0 that every maximum starts from.

Backward: a window's winner is found as in PyTorch, on the rounded activations: the first maximum in row order, but the
last NaN if there is any. The search starts from 0 too: if nothing is positive, no pixel wins. That is the ReLU's mask.

Saved launches. The forward's first programs finalize the norm, and the backward's last ones write its coefficients, as
in block_end.py.

Coordinates are clamped to the image instead of masked: a tap in the padding reads the window's nearest pixel inside
again, which changes neither the maximum nor its first position, and saves a select per element.

Numerics: fp32; g is rounded once, sums are of g as stored. Alone: ``TRITON_INTERPRET=1 python -m pytest
tests/backends/triton/training/test_pool.py``.

Not taken: recomputing all windows of every pixel without a carry (2,600 instructions per 16 bytes of g on sm_90, now
445). The maximum and the minimum of y in packed 16 bit, mapped at the end (as many instructions, as both are needed).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....calls import Pool
from ..launch import at_most, empty_nhwc, submit, upcasts
from ..tiles import round_to
from .arrival import clear_in_first_program
from .batch_norm import BLOCK_C as MERGED_C
from .batch_norm import FIRST_T, NUMBERS, finalization_arguments, finalize_first, wait_for_vectors
from .norm_gradient import SUMMED, Finish, finish_arguments, finish_last
from .pack import Passenger
from .passes import MEAN, SCALE, SHIFT, channels_of_program, empty_image, grid_of, mask_of, tile_of, vector

PROGRAMS = 1024
"""Programs of a launch, if there are enough rows of cells; each repeats REACH - 1 rows of its neighbour."""


REGISTERS = 72
"""Of the forward kernel: with fewer, which ptxas would take, it spills on sm_90; with more, seven blocks do not fit."""


@triton.jit
def _clamped(x, size):
    return tl.minimum(tl.maximum(x, 0), size - 1)


@triton.jit
def _columns(N, columns, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return (tile, strip, image, column, whether it exists, channels); lanes without a column get the last image."""
    tile, c = channels_of_program(C, BLOCK_C)
    blocks = tl.cdiv(N * columns, BLOCK_M)
    m = (tile % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    return tile, tile // blocks, tl.minimum(m // columns, N - 1).to(tl.int64), m % columns, m < N * columns, c


@triton.jit
def _larger(a, b):
    """Return max(a, b), keeping NaN as ATen's max-pool does."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _extended(best, row_best, r: tl.constexpr, KERNEL: tl.constexpr):
    """Return the larger of ``best`` and the best of the window's row ``r``, if the window has that row."""
    if r < KERNEL:
        return _larger(best, row_best)
    else:
        return best


@triton.jit(do_not_specialize=["N", "H", "W", "Hp", "Wp", "strip", *NUMBERS])
def _pool_end_fwd_kernel(
    y_ptr, vectors_ptr, z_ptr, N, H, W, Hp, Wp, strip,
    partials_ptr, merged_ptr, counters_ptr, gamma_ptr, beta_ptr, bias_ptr, centre_ptr, mean_ptr, var_ptr, found_ptr,
    tiles, chunks, chunk, rows, count, eps, keep, momentum, mean_stride, var_stride,
    C: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PAD: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, MERGED_T: tl.constexpr, MERGED_C: tl.constexpr,
):  # fmt: skip
    CACHE: tl.constexpr = "" if partials_ptr is None else ".cg"
    if partials_ptr is not None:
        early = finalize_first(
            partials_ptr, merged_ptr, counters_ptr, gamma_ptr, beta_ptr, bias_ptr, centre_ptr, mean_ptr, var_ptr,
            found_ptr, tiles, chunks, chunk, rows, count, eps, keep, momentum, mean_stride, var_stride,
            # a stem has one norm
            None, None, None, None, None, None, None, None, None, None, 0, 0, 0, 0, 0, 0.0, 0.0, 0.0, 1, 1,
            C, MERGED_T, MERGED_C,
        )  # fmt: skip
        wait_for_vectors(early, counters_ptr, None, C, MERGED_C)
    REACH: tl.constexpr = (KERNEL + STRIDE - 1) // STRIDE
    _, strip_of_program, n, j, exists, c = _columns(N, Wp, C, BLOCK_M, BLOCK_C)
    image, pooled = n * (H * W * C), n * (Hp * Wp * C)
    c_mask = mask_of(tl.full((BLOCK_M,), True, dtype=tl.int1), c, C, BLOCK_C)
    scale, shift = vector(vectors_ptr, c, SCALE, C, CACHE), vector(vectors_ptr, c, SHIFT, C, CACHE)
    zero = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)  # the least that ReLU leaves
    first = strip_of_program * strip
    # maxima so far of the windows that begin in the last REACH - 1 rows of cells, oldest first
    windows = (zero,) * (REACH - 1)
    for cell in range(first, min(first + strip, Hp) + REACH - 1):
        windows += (zero,)
        for a in tl.static_range(0, min(STRIDE, KERNEL)):
            # one row of pixels: max over the window's columns of SCALE*y + SHIFT
            row = _clamped(cell * STRIDE + a - PAD, H) * W
            row_best = zero
            for s in tl.static_range(0, KERNEL):
                pixel = row + _clamped(j * STRIDE + s - PAD, W)
                at = (y_ptr + image)[:, None] + ((pixel * C)[:, None] + c[None, :])
                row_best = _larger(row_best, tl.load(at, mask=c_mask, other=0.0).to(tl.float32) * scale + shift)
            new = ()
            for k in tl.static_range(0, REACH):
                new += (_extended(windows[k], row_best, (REACH - 1 - k) * STRIDE + a, KERNEL),)  # type: ignore[assignment]
            windows = new
        # the oldest window is complete
        i = cell - (REACH - 1)
        at = (z_ptr + pooled)[:, None] + (((i * Wp + j) * C)[:, None] + c[None, :])
        z = round_to(windows[0], z_ptr.dtype.element_ty, UPCAST)
        tl.store(at, z, mask=mask_of(exists & (i >= first), c, C, BLOCK_C))
        windows = windows[1:]


def _pooled(size: int, pool: Pool) -> int:
    return (size + 2 * pool.padding - pool.kernel) // pool.stride + 1


def _strips(columns: int, rows: int, y: Tensor, tile: tuple[int, int]) -> tuple[int, int]:
    """Return (tiles, rows of cells per strip) of ``columns`` x ``rows`` cells."""
    blocks = -(-columns // tile[0])
    strip = -(-rows // min(rows, -(-PROGRAMS // grid_of(blocks, y, tile[1])[0])))
    return blocks * -(-rows // strip), strip


def pool_end(y: Tensor, vectors: Tensor, pool: Pool, finalizations: Sequence[Passenger] = ()) -> Tensor:
    """Return z (N, C, Hp, Wp), dense NHWC, of raw y (N, C, H, W) and its vectors (10, C).

    ``finalizations``: of :func:`batch_norm.finalization`, which computes the vectors if they are not known yet.
    """
    n, c, h, w = y.shape
    hp, wp = _pooled(h, pool), _pooled(w, pool)
    z = empty_nhwc(y, n, c, hp, wp)
    tile = tile_of(y, 1)
    tiles, strip = _strips(n * wp, hp, y, tile)
    usual = pool.kernel <= 3 and pool.stride == 2  # others hold more windows at once
    submit(
        _pool_end_fwd_kernel, grid_of(tiles, y, tile[1]),
        y, vectors, z, n, h, w, hp, wp, strip, *finalization_arguments(finalizations, 1),
        C=c, KERNEL=pool.kernel, STRIDE=pool.stride, PAD=pool.padding,
        UPCAST=upcasts(y.dtype), BLOCK_M=tile[0], BLOCK_C=tile[1], MERGED_T=FIRST_T, MERGED_C=MERGED_C,
        **(at_most(REGISTERS) if usual else {}),
    )  # fmt: skip
    return z


@triton.jit
def _contest(
    best, winner, tap, image, h, w, scale, shift, c, c_mask, H, W, C: tl.constexpr, KERNEL: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Return the winner of ``best`` and the activation at the window's pixel ``tap``, and its place r * KERNEL + s."""
    row, column = _clamped(h + tap // KERNEL, H), _clamped(w + tap % KERNEL, W)
    y = tl.load(image[:, None] + (((row * W + column) * C)[:, None] + c[None, :]), mask=c_mask, other=0.0)
    act = round_to(y.to(tl.float32) * scale + shift, y.dtype, UPCAST).to(tl.float32)
    better = (act > best) | (act != act)
    place = ((row - h) * KERNEL + (column - w))[:, None]
    return tl.where(better, act, best), tl.where(better, place, winner)


@triton.jit
def _winner(
    image, h, w, scale, shift, c, c_mask, H, W, C: tl.constexpr, KERNEL: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Return the place r * KERNEL + s of the maximum of the window at (h, w); -1 if no activation is positive.

    This includes the mask of ReLU: a value that does not exceed 0 cannot win, and gets no gradient.
    """
    best = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    winner = tl.full((BLOCK_M, BLOCK_C), -1, dtype=tl.int32)
    if KERNEL <= 3:
        for tap in tl.static_range(0, KERNEL * KERNEL):
            best, winner = _contest(best, winner, tap, image, h, w, scale, shift, c, c_mask, H, W, C, KERNEL, UPCAST)
    else:
        for tap in range(0, KERNEL * KERNEL):
            best, winner = _contest(best, winner, tap, image, h, w, scale, shift, c, c_mask, H, W, C, KERNEL, UPCAST)
    return winner


@triton.jit
def _received(grad, winner, dz, k: tl.constexpr, left: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr):
    """Return ``grad`` of pixel k of a cell plus the gradient from the window that starts ``left`` cells before it."""
    r: tl.constexpr = k // STRIDE
    s: tl.constexpr = left * STRIDE + k % STRIDE
    if r < KERNEL and s < KERNEL:
        return grad + tl.where(winner == r * KERNEL + s, dz, 0.0)
    else:
        return grad


@triton.jit(
    do_not_specialize=["N", "H", "W", "Hp", "Wp", "cells_h", "cells_w", "strip", "tiles", "counters", "chunks", "chunk"]
)
def _pool_end_bwd_kernel(
    dz_ptr, y_ptr, vectors_ptr, g_ptr, partials_ptr, counters_ptr, counters, arrivals_ptr,
    N, H, W, Hp, Wp, cells_h, cells_w, strip, tiles, chunks, chunk,
    merged_ptr, coefficients_ptr, packed_ptr, dgamma_ptr, dbeta_ptr, dbias_ptr,
    C: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PAD: tl.constexpr,
    BATCH: tl.constexpr, BATCH_D: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, SUMMED_T: tl.constexpr,
):  # fmt: skip
    REACH: tl.constexpr = (KERNEL + STRIDE - 1) // STRIDE
    PIXELS: tl.constexpr = STRIDE * STRIDE
    clear_in_first_program(counters_ptr, counters)
    tile, strip_of_program, n, column, exists, c = _columns(N, cells_w, C, BLOCK_M, BLOCK_C)
    image, pooled = n * (H * W * C), n * (Hp * Wp * C)
    c_mask = mask_of(tl.full((BLOCK_M,), True, dtype=tl.int1), c, C, BLOCK_C)
    scale, shift = vector(vectors_ptr, c, SCALE, C), vector(vectors_ptr, c, SHIFT, C)
    mean = vector(vectors_ptr, c, MEAN, C)
    nothing = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    sum_g, sum_y = nothing, nothing
    first = strip_of_program * strip
    # gradient so far of the pixels of this cell row and the next ones, from the rows of windows above
    grads = (nothing,) * ((REACH - 1) * PIXELS)
    for cell in range(max(first - (REACH - 1), 0), min(first + strip, cells_h)):
        grads += (nothing,) * PIXELS
        for left in tl.static_range(0, REACH):
            # the window that begins in this row of cells, ``left`` cells to the left
            j = column - left
            winner = _winner(
                y_ptr + image, cell * STRIDE - PAD, j * STRIDE - PAD, scale, shift, c, c_mask, H, W,
                C, KERNEL, UPCAST, BLOCK_M, BLOCK_C,
            )  # fmt: skip
            here = exists & (cell < Hp) & (j >= 0) & (j < Wp)
            at = (dz_ptr + pooled)[:, None] + (((cell * Wp + j) * C)[:, None] + c[None, :])
            dz = tl.load(at, mask=mask_of(here, c, C, BLOCK_C), other=0.0).to(tl.float32)
            new = ()
            for k in tl.static_range(0, REACH * PIXELS):
                new += (_received(grads[k], winner, dz, k, left, KERNEL, STRIDE),)  # type: ignore[assignment]
            grads = new
        # this row of cells is complete: store, sum
        for k in tl.static_range(0, PIXELS):
            h, w = cell * STRIDE + k // STRIDE - PAD, column * STRIDE + k % STRIDE - PAD
            inside = exists & (cell >= first) & (h >= 0) & (h < H) & (w >= 0) & (w < W)
            mask = mask_of(inside, c, C, BLOCK_C)
            at = image[:, None] + (((h * W + w) * C)[:, None] + c[None, :])
            y = tl.load(y_ptr + at, mask=mask, other=0.0)
            g = round_to(tl.where(mask, grads[k], 0.0), y.dtype, UPCAST)
            tl.store(g_ptr + at, g, mask=mask)
            g = g.to(tl.float32)
            sum_g += g
            sum_y += g * (y.to(tl.float32) - mean)
        grads = grads[PIXELS:]
    out = partials_ptr + tile * C + c
    tl.store(out, tl.sum(sum_g, axis=0), mask=c < C)
    tl.store(out + tiles * C, tl.sum(sum_y, axis=0), mask=c < C)
    if coefficients_ptr is not None:
        tiles_c: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
        finish_last(
            tile, tl.program_id(0) % tiles_c, c, tiles, chunks, chunk, arrivals_ptr,
            partials_ptr, merged_ptr, vectors_ptr, coefficients_ptr, packed_ptr, dgamma_ptr, dbeta_ptr, dbias_ptr,
            None, None, None, None, None, None, None, None,  # a stem has one norm
            C, BATCH, BATCH_D, UPCAST, SUMMED_T, BLOCK_C,
        )  # fmt: skip


def pool_end_backward(
    dz: Tensor,
    y: Tensor,
    vectors: Tensor,
    pool: Pool,
    counters: Tensor | None = None,
    g: Tensor | None = None,
    finishes: Sequence[Finish] = (),
    arrivals: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the gradient of the stem's end.

    Args:
        dz: gradient of the pool's output (N, C, Hp, Wp), dense NHWC.
        y: raw output (N, C, H, W), dense NHWC.
        vectors: (10, C) of its norm.
        pool: the max-pool.
        counters: int32 of the launches behind this one, set to 0 (arrival.py), or None.
        g: where to write g, like y; None to allocate it.
        finishes, arrivals: as of :func:`block_end.block_end_backward`, for y.

    Returns:
        g (N, C, H, W), the gradient of the norm's output, and partial sums (2, tiles, C) fp32 of g and g * (y - MEAN).
    """
    n, c, h, w = y.shape
    cells_h, cells_w = ((size - 1 + pool.padding) // pool.stride + 1 for size in (h, w))
    g, tile = empty_image(y) if g is None else g, tile_of(y, 1)
    tiles, strip = _strips(n * cells_w, cells_h, y, tile)
    partials = y.new_empty((2, tiles, c), dtype=torch.float32)
    finish, batch = finish_arguments(finishes, tiles, partials, 1)
    submit(
        _pool_end_bwd_kernel, grid_of(tiles, y, tile[1]),
        dz, y, vectors, g, partials, counters, 0 if counters is None else counters.numel(), arrivals,
        n, h, w, _pooled(h, pool), _pooled(w, pool), cells_h, cells_w, strip, tiles, *finish,
        C=c, KERNEL=pool.kernel, STRIDE=pool.stride, PAD=pool.padding,
        UPCAST=upcasts(y.dtype), BLOCK_M=tile[0], BLOCK_C=tile[1], SUMMED_T=max(1, SUMMED // tile[1]), **batch,
    )  # fmt: skip
    return g, partials
