"""Parts shared by the convolution kernels: the tile of a program, the pixels of its rows, and the end of a tile.

    program -> (tile of gemm_m, tile of gemm_n)     tile_of_program, rows_and_channels
    gemm_m  -> (n, ho, wo) -> element offset        pixel_of_row
    tile   += A @ B.T                               multiply, accumulate_1x1
    split-K: a program's share of the K steps       steps_of_split, join_splits
    y       = relu(tile + bias + residual)          finish_tile

Offsets of rows are 64-bit (a batch of 4,096 images at stage 1 has more than 2^31 elements) and are computed once per
program; inside a main loop only 32-bit distances from a row's start are added to them.

Rounding: products of 16-bit operands are exact in fp32, sums are fp32, and a tile is rounded to the tensor's dtype
once, after bias, residual and ReLU. fp32 operands are rounded to TF32 or keep their 24 bits (PRECISION "ieee"), as
PyTorch's switch says (float32.py).

Triton's interpreter stores bfloat16 as raw 16-bit integers, multiplies those, and rounds towards zero (Triton 3.6 and
3.8). UPCAST, set for bfloat16 in the interpreter only, widens operands to fp32 first, which is exact, and rounds to
nearest as a GPU does.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def tile_of_program(pid, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Return the tile of a program, walking GROUP_M rows of tiles column by column.

    Programs that run at the same time then share x and the weight in L2.
    """
    per_group = GROUP_M * tiles_n
    first_m = (pid // per_group) * GROUP_M
    rows = min(tiles_m - first_m, GROUP_M)
    within = pid % per_group
    return first_m + within % rows, within // rows


@triton.jit
def rows_and_channels(pid_m, pid_n, g, gemm_m, GEMM_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return (rows m, channels co, row mask, channel mask) of tile (pid_m, pid_n) of group g with GEMM_N channels."""
    m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    within = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    return m, g * GEMM_N + within, m < gemm_m, within < GEMM_N


@triton.jit
def pixel_of_row(m, Ho, Wo):
    """Return the output pixel (n, ho, wo) of row m of the GEMM."""
    return m // (Ho * Wo), (m // Wo) % Ho, m % Wo


@triton.jit
def row_offset(m, stride):
    """Return the elements from a tensor's start to row m, in 64 bits because a large batch has more than 2^31."""
    return m.to(tl.int64) * stride


@triton.jit
def multiply(a, b, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """Return acc + a @ b.T for a (BLOCK_M, BLOCK_K) and b (BLOCK_N, BLOCK_K), both contiguous along K in memory."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, tl.trans(b), acc, input_precision=PRECISION)


@triton.jit
def relu(x):
    """Return max(x, 0), keeping NaN as ATen does, so that a broken checkpoint does not look plausible."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def round_to(x, dtype: tl.constexpr, UPCAST: tl.constexpr):
    """Round fp32 ``x`` to ``dtype``, to nearest with ties to even."""
    if UPCAST:
        bits = x.to(tl.int32, bitcast=True)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
        x = tl.where(x == x, nearest, x)
    return x.to(dtype)


@triton.jit
def store_rounded(at, x, mask):
    """Store fp32 ``x`` in the dtype that ``at`` points to."""
    dtype: tl.constexpr = at.dtype.element_ty
    tl.store(at, round_to(x, dtype, INTERPRETED and dtype == tl.bfloat16), mask=mask)


@triton.jit
def accumulate_1x1(
    acc, rows, row_mask, w_rows, w_mask, first, end, K, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Return acc + x[rows, first:end] @ w[:, first:end].T of K channels; ``first`` is a multiple of BLOCK_K.

    ``rows`` and ``w_rows`` point at channel 0.
    """
    for start in range(first, end, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        if EVEN_K:
            a = tl.load(rows[:, None] + k[None, :], mask=row_mask[:, None], other=0.0)
            b = tl.load(w_rows[:, None] + k[None, :], mask=w_mask[:, None], other=0.0)
        else:
            a = tl.load(rows[:, None] + k[None, :], mask=row_mask[:, None] & (k < K)[None, :], other=0.0)
            b = tl.load(w_rows[:, None] + k[None, :], mask=w_mask[:, None] & (k < K)[None, :], other=0.0)
        acc = multiply(a, b, acc, PRECISION, UPCAST)
    return acc


@triton.jit
def finish_tile(
    acc, bias_ptr, res_ptr, y_ptr, m, co, row_mask, co_mask, Co,
    RES: tl.constexpr, RELU: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Store y[m, co] = relu(acc + bias + residual), rounded once; y and residual are dense NHWC of Co channels."""
    acc += tl.load(bias_ptr + co, mask=co_mask, other=0.0)[None, :]
    at = row_offset(m, Co)[:, None] + co[None, :]
    mask = row_mask[:, None] & co_mask[None, :]
    if RES:
        acc += tl.load(res_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if RELU:
        acc = relu(acc)
    tl.store(y_ptr + at, round_to(acc, y_ptr.dtype.element_ty, UPCAST), mask=mask)


@triton.jit
def load_optional(ptr, c, c_mask, absent: tl.constexpr):
    """Load a parameter as fp32; ``absent`` if there is none."""
    if ptr is None:
        return tl.zeros_like(c).to(tl.float32) + absent
    else:
        return tl.load(ptr + c, mask=c_mask, other=0.0).to(tl.float32)


@triton.jit
def steps_of_split(steps, SPLITS: tl.constexpr):
    """Return (first, end) of this program's K steps; the splits of a tile differ by at most one step."""
    split = tl.program_id(2)
    return split * steps // SPLITS, (split + 1) * steps // SPLITS


@triton.jit
def join_splits(
    acc, partials_ptr, arrivals_ptr, tile, SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Return (whether this program finishes the tile, the sum of all splits if it does).

    Every program leaves its sum in ``partials`` (tiles, SPLITS, BLOCK_M, BLOCK_N) fp32 and counts its arrival. The last
    one adds all of them from the first split to the last, its own included, so the order of arrival does not show in
    the result. It sets the counter back to 0 for the next launch.

    Order in memory: the barrier puts every thread's stores before the counting, which releases and acquires at GPU
    scope. The sums of other multiprocessors are then read from L2 (``.cg``), since an L1 line may be older.
    """
    at = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    sums = partials_ptr + (tile * SPLITS).to(tl.int64) * (BLOCK_M * BLOCK_N)
    tl.store(sums + tl.program_id(2) * (BLOCK_M * BLOCK_N) + at, acc)
    tl.debug_barrier()
    finishes = tl.atomic_add(arrivals_ptr + tile, 1, sem="acq_rel", scope="gpu") == SPLITS - 1
    if finishes:
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for split in range(0, SPLITS):
            acc += tl.load(sums + split * (BLOCK_M * BLOCK_N) + at, cache_modifier=".cg")
        tl.store(arrivals_ptr + tile, 0)
    return finishes, acc
