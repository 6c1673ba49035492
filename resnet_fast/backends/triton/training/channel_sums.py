r"""Sums of a gradient over images and pixels, for parameters that are added: beta of a folded norm, or a bias.

    q[t, c] = sum of g[m, c] over the rows m of walk t

    g (N, C, H, W) NHWC, read as (M, C)     q (walks, C) fp32, added up by fold_gradient.py

conv_wgrad.py sums g beside its products. This kernel runs where there are none: no weight and no gamma is trained, or
the products run on cuDNN.

Saved bytes. A gradient of beta alone reads g once. A wgrad would read the convolution's input too, which is four times
as large in front of a bottleneck's first convolution, and multiply.

      c ->
    m [ g ]  BLOCK_M rows a step     a program walks down m; every slot of the tile sums for itself,
      [ g ]    +                     and the slots are added once, at the end
      [ g ]    +

Numerics: fp32, in an order that only the shape decides.
Alone: ``TRITON_INTERPRET=1 python -m pytest tests/backends/triton/training/test_frozen_chain.py -k constant``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import submit
from .passes import channels_of_program, grid_of, mask_of, rows_of, tile_of, walk


@triton.jit(do_not_specialize=["M", "steps"])
def _channel_sums_kernel(g_ptr, q_ptr, M, steps, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    tile, c = channels_of_program(C, BLOCK_C)
    first = tile * steps * BLOCK_M
    rows = min(M - first, steps * BLOCK_M)
    base = g_ptr + first.to(tl.int64) * C
    slot = tl.arange(0, BLOCK_M)
    q = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    for step in range(0, steps):
        row = step * BLOCK_M + slot
        mask = mask_of(row < rows, c, C, BLOCK_C)
        q += tl.load(base + (row[:, None] * C + c[None, :]), mask=mask, other=0.0).to(tl.float32)
    tl.store(q_ptr + tile * C + c, tl.sum(q, axis=0), mask=c < C)


def channel_sums(g: Tensor) -> Tensor:
    """Return (walks, C) fp32, the sums over the rows of each walk, of g (N, C, H, W), dense NHWC."""
    c, tile = g.shape[1], tile_of(g, 4)
    steps, walks = walk(g, tile)
    q = g.new_empty((walks, c), dtype=torch.float32)
    submit(
        _channel_sums_kernel, grid_of(walks, g, tile[1]),
        g, q, rows_of(g), steps, C=c, BLOCK_M=tile[0], BLOCK_C=tile[1],
    )  # fmt: skip
    return q
