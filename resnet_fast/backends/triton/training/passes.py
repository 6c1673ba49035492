"""Parts shared by the passes over whole tensors: tiles, programs, and loads of the rows of ``vectors``.

These kernels have no products; the copy bandwidth limits them. A tensor (N, C, H, W) in NHWC is a matrix of N*H*W
rows of C channels. A tile is BLOCK_M rows of BLOCK_C channels, 16 bytes along c in every access of a thread:

      c ->                     elementwise: a program owns one tile and has all its loads in flight at once
    m  [ . . . . ]  BLOCK_M    reduction: a program walks ``steps`` tiles down m; every thread sums for its own
       [ . . . . ]             channels, and the threads are added up once, at the end of the walk
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import vectors

THREADS = 128
"""Threads of Triton's default launch of four warps."""

MEAN, SCALE, SHIFT = tl.constexpr(vectors.MEAN), tl.constexpr(vectors.SCALE), tl.constexpr(vectors.SHIFT)

NO_CACHE = tl.constexpr("")
"""A default that is a plain string does not compile in Triton 3.6: it makes constants of numbers alone."""


def rows_of(t: Tensor) -> int:
    """Return N * H * W."""
    return t.numel() // t.shape[1]


def tile_of(t: Tensor, accesses: int) -> tuple[int, int]:
    """Return (BLOCK_M, BLOCK_C) such that every thread holds ``accesses`` runs of 16 bytes of a tile.

    BLOCK_C is :func:`channel_block`.
    """
    channels = channel_block(t.shape[1])
    return max(1, THREADS * accesses * 16 // t.element_size() // channels), channels


def channel_block(c: int) -> int:
    """Return the power of two that divides ``c`` channels, if it is at least 32, so that no lane is idle; up to 128."""
    divides = c & -c
    return min(128, divides if divides >= 32 else triton.next_power_of_2(c))


def grid_of(tiles: int, t: Tensor, block_c: int) -> tuple[int]:
    """Return the programs for ``tiles`` tiles of rows, see :func:`channels_of_program`."""
    return (tiles * -(-t.shape[1] // block_c),)


def walk(t: Tensor, tile: tuple[int, int]) -> tuple[int, int]:
    """Return (steps, walks): the tiles that a program of a reduction walks, and the number of walks.

    Long walks give few partial sums, many programs an even load: 4,096 programs, a few rounds on every GPU, of at most
    64 steps. A small tensor gets fewer programs, so that its partial sums stay small. Only the shape decides, so that
    the order of sums is the same on every machine.
    """
    tiles = -(-rows_of(t) // tile[0])
    programs = grid_of(tiles, t, tile[1])[0]
    steps = max(1, min(64, max(programs // 4096, min(8, programs // 1024))))
    return steps, -(-tiles // steps)


def empty_image(t: Tensor) -> Tensor:
    """Return an uninitialised tensor of the shape and dtype of ``t``, dense NHWC."""
    return torch.empty_like(t, memory_format=torch.channels_last)


@triton.jit
def channels_of_program(C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return (tile of rows, channels) of this program; neighbours share rows, so that DRAM pages are read whole."""
    tiles_c: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    return pid // tiles_c, (pid % tiles_c) * BLOCK_C + tl.arange(0, BLOCK_C)


@triton.jit
def mask_of(row_mask, c, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return the mask of a tile; it is constant along a row, for 16-byte accesses, if BLOCK_C divides the channels."""
    if C % BLOCK_C == 0:
        return row_mask[:, None]
    else:
        return row_mask[:, None] & (c < C)[None, :]


@triton.jit
def vector(vectors_ptr, c, ROW: tl.constexpr, C: tl.constexpr, CACHE: tl.constexpr = NO_CACHE):
    """Load a row of ``vectors``, (1, BLOCK_C) fp32. CACHE: ".cg" for what programs of this launch stored."""
    return tl.load(vectors_ptr + ROW * C + c, mask=c < C, other=0.0, cache_modifier=CACHE)[None, :]
