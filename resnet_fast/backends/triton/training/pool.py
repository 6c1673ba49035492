r"""The end of the stem in training: BatchNorm + ReLU + max-pool of a raw output, and back, without the activation.

    z[n, i, j, c] = max over the window (i, j) of act        act[n, h, w, c] = round(relu(SCALE*y + SHIFT))
    g[n, h, w, c] = sum of dz over the windows whose maximum is pixel (h, w), where act > 0;  per tile sum g, sum g*(y - MEAN)

    y (N, C, H, W) and g NHWC   z, dz (N, C, Hp, Wp) NHWC   any square window, stride and padding

Saved bytes, per image of ResNet-50's stem in 16 bit (y 112x112x64, 1.61 MB; z 0.40): stock writes the activation twice
and reads it twice in forward, keeps 64-bit indices (1.61) for backward, and there writes and reads the full-size
gradient twice more. Here forward reads y and writes z (2.0 MB), backward reads y and dz and writes g (3.6 MB).

    rows of y    cells (STRIDE rows)    windows (KERNEL = 3, STRIDE = 2)
      u = 0      cell 0                 |0
      u = 1                             |0          u = h + PAD: a cell is the STRIDE x STRIDE pixels from which one
      u = 2      cell 1                 |0 |1       window starts; REACH = ceil(KERNEL / STRIDE) windows per axis
      u = 3                                |1       meet in it.
      u = 4      cell 2                    |1 |2

A program owns BLOCK_M columns of cells (n, column), linearised over the batch, times BLOCK_C channels, and walks down a
strip of cell rows. What a row of windows leaves unfinished is carried in registers to the next cell row: in forward the
extremes of windows that reach further down, in backward the gradient of pixels that later windows share. So memory sees
every row of y once; columns that two windows share meet in L1.

Forward: rounding, ReLU and the affine map are monotonic, so the maximum and the minimum of y are taken first, in the
dtype of y (two elements per instruction), and only these two are mapped: exactly the maximum of the rounded activations.

Backward: a window's winner is found as PyTorch does it, on the rounded activation: the first maximum in the order of the
window's rows, and the last NaN, if there is one. Padding is never the winner: coordinates are clamped to the image
instead of masked, which visits border pixels of the same window again and changes neither a maximum nor its first place.

Numerics: fp32 arithmetic, the gradient rounded once; sums are of g as stored. Alone: ``TRITON_INTERPRET=1 python -m
pytest tests/backends/triton/training/test_pool.py``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....calls import Pool
from ..launch import upcasts
from ..tiles import round_to
from .batch_norm import MEAN, SCALE, SHIFT, channels_of_program, mask_of, tile_shape, vector

PROGRAMS = 1024
"""Programs that a launch is cut into, if the rows of cells allow: every strip repeats REACH - 1 rows of windows."""


@triton.jit
def _clamped(x, size):
    return tl.minimum(tl.maximum(x, 0), size - 1)


@triton.jit
def _lanes(N, columns, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """(tile, strip, image, column, is there such a column, channels) of this program; channels run fastest, then columns."""
    rest, c = channels_of_program(C, BLOCK_C)
    blocks = tl.cdiv(N * columns, BLOCK_M)
    m = (rest % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    return rest, rest // blocks, tl.minimum(m // columns, N - 1), m % columns, m < N * columns, c


@triton.jit
def _larger(a, b):
    """max(a, b) that keeps NaN, as ATen's max-pool does."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _extended(best, row_best, r: tl.constexpr, KERNEL: tl.constexpr):
    """``best`` of a window and its row ``r``, if it has one."""
    if r < KERNEL:
        return _larger(best, row_best)
    else:
        return best


@triton.jit(do_not_specialize=["N", "H", "W", "Hp", "Wp", "strip"])
def _pool_end_fwd_kernel(
    y_ptr, vectors_ptr, z_ptr, N, H, W, Hp, Wp, strip,
    C: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PAD: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    REACH: tl.constexpr = (KERNEL + STRIDE - 1) // STRIDE
    tile, at_strip, n, j, exists, c = _lanes(N, Wp, C, BLOCK_M, BLOCK_C)
    image, pooled = n.to(tl.int64) * (H * W * C), n.to(tl.int64) * (Hp * Wp * C)
    c_mask = mask_of(tl.full((BLOCK_M,), True, dtype=tl.int1), c, C, BLOCK_C)
    scale, shift = vector(vectors_ptr, c, SCALE, C), vector(vectors_ptr, c, SHIFT, C)
    zero = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)  # the least that ReLU leaves
    first = at_strip * strip
    # maxima so far of the windows that begin in the last REACH - 1 rows of cells, oldest first
    windows = (zero,) * (REACH - 1)
    for cell in range(first, min(first + strip, Hp) + REACH - 1):
        windows = windows + (zero,)
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
                new = new + (_extended(windows[k], row_best, (REACH - 1 - k) * STRIDE + a, KERNEL),)
            windows = new
        # the oldest window is complete
        i = cell - (REACH - 1)
        at = (z_ptr + pooled)[:, None] + (((i * Wp + j) * C)[:, None] + c[None, :])
        z = round_to(windows[0], z_ptr.dtype.element_ty, UPCAST)
        tl.store(at, z, mask=mask_of(exists & (i >= first), c, C, BLOCK_C))
        windows = windows[1:]


def _pooled(size: int, pool: Pool) -> int:
    return (size + 2 * pool.padding - pool.kernel) // pool.stride + 1


def _strips(columns: int, rows: int, channels: int, tile: tuple[int, int]) -> tuple[int, int, int]:
    """(blocks of columns, strips, rows of cells in a strip)."""
    blocks = -(-columns // tile[0])
    strip = -(-rows // min(rows, -(-PROGRAMS // (blocks * -(-channels // tile[1])))))
    return blocks, -(-rows // strip), strip


def pool_end(y: Tensor, vectors: Tensor, pool: Pool) -> Tensor:
    """z (N, C, Hp, Wp) of raw y (N, C, H, W) and its vectors (10, C)."""
    n, c, h, w = y.shape
    hp, wp = _pooled(h, pool), _pooled(w, pool)
    z = y.new_empty((n, hp, wp, c)).permute(0, 3, 1, 2)
    tile = tile_shape(y, 1)
    blocks, strips, strip = _strips(n * wp, hp, c, tile)
    _pool_end_fwd_kernel[(blocks * strips * -(-c // tile[1]),)](
        y, vectors, z, n, h, w, hp, wp, strip, C=c, KERNEL=pool.kernel, STRIDE=pool.stride, PAD=pool.padding,
        UPCAST=upcasts(y.dtype), BLOCK_M=tile[0], BLOCK_C=tile[1],
    )  # fmt: skip
    return z


@triton.jit
def _contest(
    best, winner, tap, image, h, w, scale, shift, c, c_mask, H, W, C: tl.constexpr, KERNEL: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """``best`` or the activation at the window's pixel ``tap``, whichever wins, and where it lies: r * KERNEL + s."""
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
    """Where the maximum of the window at (h, w) lies, r * KERNEL + s; -1 where no activation is positive.

    That is ReLU and its mask at once: what does not exceed 0 cannot win, and gets no gradient.
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
def _received(grad, winner, dz, r: tl.constexpr, s: tl.constexpr, KERNEL: tl.constexpr):
    """``grad`` of the pixel at (r, s) of a window, with what the window passes on to it."""
    if r < KERNEL and s < KERNEL:
        return grad + tl.where(winner == r * KERNEL + s, dz, 0.0)
    else:
        return grad


@triton.jit(do_not_specialize=["N", "H", "W", "Hp", "Wp", "cells_h", "cells_w", "strip", "tiles"])
def _pool_end_bwd_kernel(
    dz_ptr, y_ptr, vectors_ptr, g_ptr, partials_ptr, N, H, W, Hp, Wp, cells_h, cells_w, strip, tiles,
    C: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PAD: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    REACH: tl.constexpr = (KERNEL + STRIDE - 1) // STRIDE
    PIXELS: tl.constexpr = STRIDE * STRIDE
    tile, at_strip, n, column, exists, c = _lanes(N, cells_w, C, BLOCK_M, BLOCK_C)
    image, pooled = n.to(tl.int64) * (H * W * C), n.to(tl.int64) * (Hp * Wp * C)
    c_mask = mask_of(tl.full((BLOCK_M,), True, dtype=tl.int1), c, C, BLOCK_C)
    scale, shift = vector(vectors_ptr, c, SCALE, C), vector(vectors_ptr, c, SHIFT, C)
    mean = vector(vectors_ptr, c, MEAN, C)
    nothing = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    sum_g, sum_y = nothing, nothing
    first = at_strip * strip
    # gradient so far of the pixels of this cell row and the next ones, from the rows of windows above
    grads = (nothing,) * ((REACH - 1) * PIXELS)
    for cell in range(first - (REACH - 1), min(first + strip, cells_h)):
        grads = grads + (nothing,) * PIXELS
        for left in tl.static_range(0, REACH):
            # the window that begins in this row of cells, ``left`` cells to the left
            j = column - left
            winner = _winner(
                y_ptr + image, cell * STRIDE - PAD, j * STRIDE - PAD, scale, shift, c, c_mask, H, W,
                C, KERNEL, UPCAST, BLOCK_M, BLOCK_C,
            )  # fmt: skip
            here = exists & (cell >= 0) & (cell < Hp) & (j >= 0) & (j < Wp)
            at = (dz_ptr + pooled)[:, None] + (((cell * Wp + j) * C)[:, None] + c[None, :])
            dz = tl.load(at, mask=mask_of(here, c, C, BLOCK_C), other=0.0).to(tl.float32)
            new = ()
            for k in tl.static_range(0, REACH * PIXELS):
                new = new + (
                    _received(
                        grads[k],
                        winner,
                        dz,
                        k // PIXELS * STRIDE + k % PIXELS // STRIDE,
                        left * STRIDE + k % STRIDE,
                        KERNEL,
                    ),
                )
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


def pool_end_backward(dz: Tensor, y: Tensor, vectors: Tensor, pool: Pool) -> tuple[Tensor, Tensor]:
    """g (N, C, H, W), gradient of the norm's output, and partial sums (2, tiles, C) fp32 of g and g * (y - MEAN).

    ``dz`` (N, C, Hp, Wp): gradient of the pool's output.
    """
    n, c, h, w = y.shape
    cells_h, cells_w = ((size - 1 + pool.padding) // pool.stride + 1 for size in (h, w))
    g = y.new_empty((n, h, w, c)).permute(0, 3, 1, 2)
    tile = tile_shape(y, 1)
    blocks, strips, strip = _strips(n * cells_w, cells_h, c, tile)
    partials = y.new_empty((2, blocks * strips, c), dtype=torch.float32)
    _pool_end_bwd_kernel[(blocks * strips * -(-c // tile[1]),)](
        dz, y, vectors, g, partials, n, h, w, _pooled(h, pool), _pooled(w, pool), cells_h, cells_w, strip,
        blocks * strips, C=c, KERNEL=pool.kernel, STRIDE=pool.stride, PAD=pool.padding,
        UPCAST=upcasts(y.dtype), BLOCK_M=tile[0], BLOCK_C=tile[1],
    )  # fmt: skip
    return g, partials
