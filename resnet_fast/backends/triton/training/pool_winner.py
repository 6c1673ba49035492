r"""Max-pool of an activation that is not kept: the forward pass stores which pixel won each window.

    z[n, i, j, c] = max over the window (i, j) of act           act (N, C, H, W): an output of ReLU, 0 or more
    won[n, i, j, c] = 1 + r*KERNEL + s of the winner; 0 if no activation of the window is positive
    g[n, h, w, c] = sum of dz over the windows that (h, w) wins

    z, dz, won (N, C, Hp, Wp) NHWC   act, g (N, C, H, W) NHWC   any square window, stride and padding

Saved bytes. Kept for the backward pass per image of ResNet-50's stem in 16 bit (act 112x112x64): stock keeps act (1.61
MB) and PyTorch's 64-bit indices (1.61 MB); here 0.20 MB of bytes. To keep act and search the winner again (pool.py)
would hold 1.61 MB; to keep nothing and compute the convolution again would hold none, but multiplies 118 million pairs
and writes and reads act once more, which costs more than the bytes that it spares: x and z are kept anyway. The
backward pass moves dz, won and g, 2.2 MB; pool.py moves 3.6.

     won     [ 5 | 0 | 9 ]        a window's winner as its place in the window, row by row from 1
     window   3x3, stride 2       a pixel asks the REACH x REACH windows that include it whether it is their winner

The winner is found as in PyTorch: the first maximum in row order, but the last NaN if there is any. Where no activation
is positive the ReLU passes no gradient, so nobody wins. Coordinates are clamped to the image: a tap in the padding
reads the window's nearest pixel inside again, which changes neither the maximum nor its first position.

Numerics: z is one of the values of act; sums of dz in fp32, in the order of the windows, rounded once.
Alone: ``TRITON_INTERPRET=1 python -m pytest tests/backends/triton/training/test_frozen_chain.py``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....calls import Pool
from ..launch import empty_nhwc, submit, upcasts
from ..tiles import round_to
from .passes import channels_of_program, grid_of, mask_of, tile_of


@triton.jit
def _clamped(x, size):
    return tl.minimum(tl.maximum(x, 0), size - 1)


@triton.jit
def _pixels(tile, rows, H, W, BLOCK_M: tl.constexpr):
    """Return (image, h, w, whether it exists) of BLOCK_M pixels of ``rows`` over all images."""
    m = tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    return m // (H * W), (m // W % H).to(tl.int32), (m % W).to(tl.int32), m < rows


@triton.jit(do_not_specialize=["rows", "H", "W", "Hp", "Wp"])
def _pool_fwd_kernel(
    act_ptr, z_ptr, won_ptr, rows, H, W, Hp, Wp,
    C: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    tile, c = channels_of_program(C, BLOCK_C)
    n, i, j, exists = _pixels(tile, rows, Hp, Wp, BLOCK_M)
    mask = mask_of(exists, c, C, BLOCK_C)
    h, w = i * STRIDE - PAD, j * STRIDE - PAD
    image = act_ptr + n * (H * W * C)
    best = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    won = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.int32)
    for tap in range(0, KERNEL * KERNEL):
        row, column = _clamped(h + tap // KERNEL, H), _clamped(w + tap % KERNEL, W)
        at = image[:, None] + (((row * W + column) * C)[:, None] + c[None, :])
        act = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        better = (act > best) | (act != act)
        best = tl.where(better, act, best)
        won = tl.where(better, ((row - h) * KERNEL + (column - w) + 1)[:, None], won)
    at = (((n * Hp + i) * Wp + j) * C)[:, None] + c[None, :]
    tl.store(z_ptr + at, best.to(z_ptr.dtype.element_ty), mask=mask)
    tl.store(won_ptr + at, won.to(won_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "H", "W", "Hp", "Wp"])
def _pool_bwd_kernel(
    dz_ptr, won_ptr, g_ptr, rows, H, W, Hp, Wp,
    C: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PAD: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    REACH: tl.constexpr = (KERNEL + STRIDE - 1) // STRIDE
    tile, c = channels_of_program(C, BLOCK_C)
    n, h, w, exists = _pixels(tile, rows, H, W, BLOCK_M)
    last_i, last_j = (h + PAD) // STRIDE, (w + PAD) // STRIDE
    g = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    for window in range(0, REACH * REACH):
        # the windows that may include the pixel, the first in row order first
        i, j = last_i - (REACH - 1) + window // REACH, last_j - (REACH - 1) + window % REACH
        r, s = h + PAD - i * STRIDE, w + PAD - j * STRIDE
        inside = exists & (i >= 0) & (i < Hp) & (j >= 0) & (j < Wp) & (r < KERNEL) & (s < KERNEL)
        mask = mask_of(inside, c, C, BLOCK_C)
        at = (((n * Hp + i) * Wp + j) * C)[:, None] + c[None, :]
        won = tl.load(won_ptr + at, mask=mask, other=0).to(tl.int32)
        dz = tl.load(dz_ptr + at, mask=mask, other=0.0).to(tl.float32)
        g += tl.where(won == (r * KERNEL + s + 1)[:, None], dz, 0.0)
    at = (((n * H + h) * W + w) * C)[:, None] + c[None, :]
    tl.store(g_ptr + at, round_to(g, g_ptr.dtype.element_ty, UPCAST), mask=mask_of(exists, c, C, BLOCK_C))


def pooled_hw(h: int, w: int, pool: Pool) -> tuple[int, int]:
    """Return the height and width of the pool's output."""
    hp, wp = ((size + 2 * pool.padding - pool.kernel) // pool.stride + 1 for size in (h, w))
    return hp, wp


def winner_dtype(pool: Pool) -> torch.dtype:
    """Return the dtype of ``won``: bytes, where they can count the window's pixels."""
    return torch.uint8 if pool.kernel**2 < 256 else torch.int32


def pool_forward(act: Tensor, pool: Pool) -> tuple[Tensor, Tensor]:
    """Return (z, won), (N, C, Hp, Wp) each, dense NHWC, of an output of ReLU (N, C, H, W), dense NHWC."""
    n, c, h, w = act.shape
    hp, wp = pooled_hw(h, w, pool)
    z = empty_nhwc(act, n, c, hp, wp)
    won = torch.empty_like(z, dtype=winner_dtype(pool))
    tile = tile_of(act, 1)
    submit(
        _pool_fwd_kernel, grid_of(-(-n * hp * wp // tile[0]), act, tile[1]),
        act, z, won, n * hp * wp, h, w, hp, wp, C=c, KERNEL=pool.kernel, STRIDE=pool.stride, PAD=pool.padding,
        BLOCK_M=tile[0], BLOCK_C=tile[1],
    )  # fmt: skip
    return z, won


def pool_backward(dz: Tensor, won: Tensor, h: int, w: int, pool: Pool) -> Tensor:
    """Return the gradient (N, C, h, w) of the convolution's output, dense NHWC, after the mask of the ReLU.

    Args:
        dz: gradient of the pool's output (N, C, Hp, Wp), dense NHWC.
        won: of :func:`pool_forward`.
        h, w: size of the pool's input.
        pool: the max-pool.
    """
    n, c, hp, wp = dz.shape
    g = empty_nhwc(dz, n, c, h, w)
    tile = tile_of(g, 1)
    submit(
        _pool_bwd_kernel, grid_of(-(-n * h * w // tile[0]), g, tile[1]),
        dz, won, g, n * h * w, h, w, hp, wp, C=c, KERNEL=pool.kernel, STRIDE=pool.stride, PAD=pool.padding,
        UPCAST=upcasts(dz.dtype), BLOCK_M=tile[0], BLOCK_C=tile[1],
    )  # fmt: skip
    return g
