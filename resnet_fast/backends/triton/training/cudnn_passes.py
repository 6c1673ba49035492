r"""The two passes of a BatchNorm around a convolution that runs on cuDNN, in a training step.

    statistics       partials[:, t, c] = mean and M2 = sum (y - mean)^2 of y[m, c] over the rows m of walk t
    apply_backward   dy = A*g + B*y + C                                                                     (vectors.py)

Behind our own convolutions the epilogue of conv_fwd computes the partials, and the prologues of conv_dgrad and
conv_wgrad compute dy as they read g and y.

Saved bytes. Stock BatchNorm reads y twice and writes the result; in backward it reads g and y twice and writes dy. Here
y is read once; g and y are read, and dy is written.

    statistics: a program walks down m         apply_backward: one tile per program
      [ y ] -> Welford in every slot             [ g ] [ y ] -> [ dy ]
      [ y ] ->   + once over the slots, Chan

Numerics: fp32. Statistics are not sums of y - pivot and of its square, which cancel where a first row is far from the
others: Welford's algorithm costs one more instruction per element, of eight.
Alone: ``TRITON_INTERPRET=1 python -m pytest tests/backends/triton/training/test_batch_norm.py``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import submit, upcasts
from ..tiles import round_to
from . import vectors as v
from .passes import channels_of_program, empty_image, grid_of, mask_of, rows_of, tile_of, vector, walk
from .vectors import Grad

A, B, CONSTANT = tl.constexpr(v.A), tl.constexpr(v.B), tl.constexpr(v.C)


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
        _statistics_kernel, grid_of(tiles, y, tile[1]),
        y, partials, rows_of(y), tiles, steps, C=c, BLOCK_M=tile[0], BLOCK_C=tile[1],
    )  # fmt: skip
    return partials, steps * tile[0]


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
