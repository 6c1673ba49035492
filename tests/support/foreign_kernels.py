"""Kernels of the kinds that other projects write in Triton, for the tests of the PTX machine: none is of this package.

Softmax, layer norm with its gradients (partial sums under locks), products of matrices (grouped tiles; a grid that
stays), dropout, attention without the matrix of weights. Rows are dense.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def softmax_rows(x_ptr, y_ptr, rows, width, BLOCK: tl.constexpr):
    """y[r, :width] = softmax(x[r, :width]), rows shared out over the programs."""
    i = tl.arange(0, BLOCK)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        x = tl.load(x_ptr + row * width + i, mask=i < width, other=float("-inf"))
        e = tl.exp(x - tl.max(x, axis=0))
        tl.store(y_ptr + row * width + i, e / tl.sum(e, axis=0), mask=i < width)


@triton.jit
def norm_rows(x_ptr, gamma_ptr, beta_ptr, y_ptr, mean_ptr, scale_ptr, width, eps, BLOCK: tl.constexpr):
    """y[r] = (x[r] - mean) * scale * gamma + beta, in steps of BLOCK columns; mean and scale are kept."""
    row = tl.program_id(0)
    total, squares = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(x_ptr + row * width + i, mask=i < width, other=0.0)
    mean = tl.sum(total, axis=0) / width
    for start in range(0, width, BLOCK):
        i = start + tl.arange(0, BLOCK)
        away = tl.where(i < width, tl.load(x_ptr + row * width + i, mask=i < width, other=0.0) - mean, 0.0)
        squares += away * away
    scale = tl.rsqrt(tl.sum(squares, axis=0) / width + eps)
    tl.store(mean_ptr + row, mean)
    tl.store(scale_ptr + row, scale)
    for start in range(0, width, BLOCK):
        i = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * width + i, mask=i < width, other=0.0)
        gamma, beta = tl.load(gamma_ptr + i, mask=i < width), tl.load(beta_ptr + i, mask=i < width)
        tl.store(y_ptr + row * width + i, (x - mean) * scale * gamma + beta, mask=i < width)


@triton.jit
def norm_rows_backward(
    dy_ptr, x_ptr, gamma_ptr, mean_ptr, scale_ptr, dx_ptr, sums_ptr, locks_ptr, width,
    GROUPS: tl.constexpr, BLOCK: tl.constexpr, ORDERED: tl.constexpr = True,
):  # fmt: skip
    """dx of ``norm_rows``; and dgamma and dbeta of each group of rows, (GROUPS, 2, width), added up under a lock.

    ``locks``: zeros, (2, GROUPS): the lock, and whether the group's sums were written before. Each warp reads that, and
    one sets it: a barrier lies between, unless not ORDERED.
    """
    row, i = tl.program_id(0), tl.arange(0, BLOCK)
    mask = i < width
    x = tl.load(x_ptr + row * width + i, mask=mask, other=0.0)
    dy = tl.load(dy_ptr + row * width + i, mask=mask, other=0.0)
    scale = tl.load(scale_ptr + row)
    normed = tl.where(mask, (x - tl.load(mean_ptr + row)) * scale, 0.0)
    g = dy * tl.load(gamma_ptr + i, mask=mask, other=0.0)
    along, constant = tl.sum(normed * g, axis=0) / width, tl.sum(g, axis=0) / width
    tl.store(dx_ptr + row * width + i, (g - (normed * along + constant)) * scale, mask=mask)

    group = row % GROUPS
    lock, used = locks_ptr + group, locks_ptr + GROUPS + group
    dgamma, dbeta, at = dy * normed, dy, sums_ptr + group * 2 * width + i
    while tl.atomic_cas(lock, 0, 1) == 1:
        pass
    first = tl.load(used) == 0
    if ORDERED:
        tl.debug_barrier()
    if first:
        tl.atomic_xchg(used, 1)
    else:
        dgamma += tl.load(at, mask=mask)
        dbeta += tl.load(at + width, mask=mask)
    tl.store(at, dgamma, mask=mask)
    tl.store(at + width, dbeta, mask=mask)
    tl.debug_barrier()
    tl.atomic_xchg(lock, 0)


@triton.jit
def _tile(pid, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Return the tile of a program: GROUP rows of tiles share their columns."""
    group = pid // (GROUP * tiles_n)
    rows = min(tiles_m - group * GROUP, GROUP)
    return group * GROUP + pid % (GROUP * tiles_n) % rows, pid % (GROUP * tiles_n) // rows


@triton.jit
def _product_tile(
    a_ptr, b_ptr, c_ptr, M, N, K, tile_m, tile_n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    m, n = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        inside = start + k < K
        a = tl.load(a_ptr + m[:, None] * K + (start + k)[None, :], mask=(m < M)[:, None] & inside[None, :], other=0.0)
        b = tl.load(b_ptr + (start + k)[:, None] * N + n[None, :], mask=inside[:, None] & (n < N)[None, :], other=0.0)
        acc = tl.dot(a, b, acc)
    acc = tl.where(acc >= 0, acc, 0.01 * acc)
    at = c_ptr + m[:, None] * N + n[None, :]
    tl.store(at, acc.to(c_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def grouped_product(
    a_ptr, b_ptr, c_ptr, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """c = leaky_relu(a (M, K) @ b (K, N)), a tile per program."""
    tile_m, tile_n = _tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    _product_tile(a_ptr, b_ptr, c_ptr, M, N, K, tile_m, tile_n, BLOCK_M, BLOCK_N, BLOCK_K)


@triton.jit
def lasting_product(
    a_ptr, b_ptr, c_ptr, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The same by programs that walk over the tiles."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = _tile(tile, tiles_m, tiles_n, GROUP)
        _product_tile(a_ptr, b_ptr, c_ptr, M, N, K, tile_m, tile_n, BLOCK_M, BLOCK_N, BLOCK_K)


@triton.jit
def drop(x_ptr, y_ptr, n, p, seed, BLOCK: tl.constexpr):
    """y[i] = x[i] / (1 - p) where the i-th random number is above p, else 0."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    kept = tl.rand(seed, i) > p
    x = tl.load(x_ptr + i, mask=i < n)
    tl.store(y_ptr + i, tl.where(kept, x / (1 - p), 0.0), mask=i < n)


@triton.jit
def attend(
    q_ptr, k_ptr, v_ptr, o_ptr, length, factor, CAUSAL: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """o = softmax(q k^T / sqrt(WIDTH)) v of each head, (heads, length, WIDTH); factor: log2(e) / sqrt(WIDTH)."""
    head = tl.program_id(1) * length * WIDTH
    i, w = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q), tl.arange(0, WIDTH)
    rows = head + i[:, None] * WIDTH + w[None, :]
    q = tl.load(q_ptr + rows, mask=(i < length)[:, None], other=0.0)
    largest, total = tl.full((BLOCK_Q,), float("-inf"), tl.float32), tl.zeros((BLOCK_Q,), tl.float32)
    acc = tl.zeros((BLOCK_Q, WIDTH), tl.float32)
    end = min(length, (tl.program_id(0) + 1) * BLOCK_Q) if CAUSAL else length
    for start in range(0, end, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        at = head + j[:, None] * WIDTH + w[None, :]
        k = tl.load(k_ptr + at, mask=(j < length)[:, None], other=0.0)
        v = tl.load(v_ptr + at, mask=(j < length)[:, None], other=0.0)
        seen = (j < length)[None, :] & ((j[None, :] <= i[:, None]) if CAUSAL else True)
        score = tl.where(seen, tl.dot(q, tl.trans(k)) * factor, float("-inf"))
        above = tl.maximum(largest, tl.max(score, axis=1))
        e, shrink = tl.exp2(score - above[:, None]), tl.exp2(largest - above)
        total, largest = total * shrink + tl.sum(e, axis=1), above
        acc = tl.dot(e.to(v.dtype), v, acc * shrink[:, None])
    tl.store(o_ptr + rows, (acc / total[:, None]).to(q.dtype), mask=(i < length)[:, None])
