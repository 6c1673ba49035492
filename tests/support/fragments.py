"""Where the lanes of a warp or warpgroup hold the values of matrices, from the PTX ISA's formulas.

Each function returns index arrays (rows, columns) of shape (lanes, values).
"""

from __future__ import annotations

import numpy as np


def _of(lanes: int, values: int, rule) -> tuple[np.ndarray, np.ndarray]:
    lane, value = np.meshgrid(np.arange(lanes), np.arange(values), indexing="ij")
    rows, columns = rule(lane // 4, lane % 4, value)
    return np.broadcast_to(rows, lane.shape), np.broadcast_to(columns, lane.shape)


def mma_a(depth: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Operand a of mma.m16n8k``depth``, (16, depth): row and k."""
    if bits == 32:
        return _of(32, depth // 2, lambda g, q, i: (g + 8 * (i % 2), q + 4 * (i // 2)))
    return _of(32, depth // 2, lambda g, q, i: (g + 8 * (i // 2 % 2), 2 * q + i % 2 + 8 * (i // 4)))


def mma_b(depth: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Operand b, (depth, 8): k and column."""
    if bits == 32:
        return _of(32, depth // 4, lambda g, q, i: (q + 4 * i, g))
    return _of(32, depth // 4, lambda g, q, i: (2 * q + i % 2 + 8 * (i // 2), g))


def mma_d() -> tuple[np.ndarray, np.ndarray]:
    """The accumulator, (16, 8)."""
    return _of(32, 4, lambda g, q, i: (g + 8 * (i // 2), 2 * q + i % 2))


def wgmma_d(columns: int) -> tuple[np.ndarray, np.ndarray]:
    """The accumulator of wgmma, (64, columns), in 128 threads."""
    return _of(
        128, columns // 2, lambda g, q, i: (g // 8 * 16 + g % 8 + 8 * (i // 2 % 2), 2 * q + i % 2 + 8 * (i // 4))
    )


def wgmma_a(bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Operand a of wgmma in registers: (64, 16) of 16 bits, or (64, 8) of 32."""
    rows, ks = mma_a(16 if bits == 16 else 8, bits)
    return np.concatenate([rows + 16 * warp for warp in range(4)]), np.concatenate([ks] * 4)


def to_lanes(matrix: np.ndarray, places: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Return the lanes' 32-bit registers (registers, lanes) of a matrix of 16- or 32-bit numbers."""
    values = np.ascontiguousarray(matrix[places])
    return np.ascontiguousarray(values.view(np.uint32).T)


def from_lanes(registers: np.ndarray, places: tuple[np.ndarray, np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """Return the matrix of fp32 numbers that the lanes' registers (registers, lanes) hold."""
    out = np.full(shape, np.nan, np.float32)
    out[places] = np.ascontiguousarray(registers.T).view(np.float32)
    return out
