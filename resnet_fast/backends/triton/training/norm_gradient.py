r"""BatchNorm in a training step, backward: the coefficients of a raw output's gradient, from the sums of its tiles.

    partials[:, t, c] = sum g and sum g * (y - MEAN) over the rows of tile t
    s1 = sum_t / n      s2 = INVSTD * sum_t / n      dgamma = INVSTD * sum_t      dbeta = sum_t
    A = SCALE           B = -A * INVSTD * s2         C = A * (INVSTD * s2 * MEAN - s1)               (vectors.py)

(Ioffe and Szegedy 2015, section 3.) The epilogues of conv_dgrad, block_end and pool compute the partials. dgamma, dbeta
and the gradient of a bias of the convolution are written in the dtype of the parameter: the sum of dy is exactly 0 with
batch statistics, because the norm removes any constant, and otherwise A * dbeta.

Saved bytes. Stock BatchNorm reads g and y twice and writes dy. Here nothing of that size moves.

Saved launches: one per norm, as in batch_norm.py. Two passengers travel behind its programs and wait for nothing: the
packing of this convolution's weight for its dgrad (pack.py), because A is known since the forward pass, and the sum
over the splits of the wgrad before (wgrad_sum.py).

    [ sums: chunks x channel blocks, the last of a block writes its coefficients ][ wt = weight * A ][ dW of layer i+2 ]

All of them need the dgrad of layer i+1, but not its wgrad. So they travel in turn behind the tiles of that wgrad
(conv_wgrad.py), and have a launch of their own (:func:`coefficients`) only where no such wgrad of ours runs, or where
an all-reduce comes first.

A block's last norms have no launch either: the end of the block, which computes their sums, finishes them
(``finish_last``). Walks are long, so an arrival per program costs little:

    walks of a channel block   [ . . . . | . . . . | . . ]   each program stores its sums and arrives at its chunk
                                   \         |       /        the last of a chunk adds it up and arrives at the block
                                        coefficients         the last chunk's adds up the chunks

Numerics: fp32, in an order that only the shape decides.
Several processes. The sums are added up in launches of their own and all-reduced for A, B and C; dgamma and dbeta
remain those of this process, for DDP to average.
Alone: ``TRITON_INTERPRET=1 python -m pytest tests/backends/triton/training/test_batch_norm.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import submit, upcasts
from ..tiles import round_to, store_rounded
from . import vectors as v
from .arrival import BLOCKS, arrive
from .batch_norm import BLOCK_C, BLOCK_T, CHUNK, LAST_TILES, blocks_of, chunks_of
from .pack import NO_DGRAD, Passenger, pack_dgrad_program
from .passes import channel_block
from .vectors import Grad
from .wgrad_sum import NO_REDUCTION, reduce_splits_program

MEAN, INVSTD = tl.constexpr(v.MEAN), tl.constexpr(v.INVSTD)
SCALE, INV_COUNT = tl.constexpr(v.SCALE), tl.constexpr(v.INV_COUNT)
A, B, CONSTANT = tl.constexpr(v.A), tl.constexpr(v.B), tl.constexpr(v.C)
BETA_HI, BETA_LO = tl.constexpr(v.BETA_HI), tl.constexpr(v.BETA_LO)
SUMMED = 2048
"""Elements of a step of a sum at the end of a block: 16 per thread, as in a launch of its own."""

LEAST_CHUNK, MOST_CHUNKS = 32, tl.constexpr(64)
ARRIVALS = tl.constexpr(MOST_CHUNKS.value + 1)
"""Tiles of a chunk and chunks at the end of a block; its counters per channel block, one per chunk and one for all."""

GAMMA, NEG_GAMMA = tl.constexpr(v.GAMMA), tl.constexpr(v.NEG_GAMMA)


@triton.jit
def _summed(
    partials_ptr, first, end, tiles, c,
    C: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, CACHE: tl.constexpr,
):  # fmt: skip
    """Return both sums over the tiles ``first`` to ``end``. CACHE: ".cg" for what programs of this launch stored."""
    one = tl.zeros((BLOCK_T, BLOCK_C), dtype=tl.float32)
    two = tl.zeros((BLOCK_T, BLOCK_C), dtype=tl.float32)
    for start in range(first, end, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        mask = (t < end)[:, None] & (c < C)[None, :]
        at = partials_ptr + t[:, None] * C + c[None, :]
        one += tl.load(at, mask=mask, other=0.0, cache_modifier=CACHE)
        two += tl.load(at + tiles * C, mask=mask, other=0.0, cache_modifier=CACHE)
    return tl.sum(one, axis=0), tl.sum(two, axis=0)


@triton.jit(do_not_specialize=["tiles", "chunks", "chunk"])
def _sum_kernel(
    partials_ptr, out_ptr, tiles, chunks, chunk, C: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr
):
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    first = tl.program_id(0) * chunk
    one, two = _summed(partials_ptr, first, min(first + chunk, tiles), tiles, c, C, BLOCK_T, BLOCK_C, "")
    out = out_ptr + tl.program_id(0) * C + c
    tl.store(out, one, mask=c < C)
    tl.store(out + chunks * C, two, mask=c < C)


@triton.jit
def store_coefficients(
    one, two, own_ptr, vectors_ptr, coefficients_ptr, packed_ptr, dgamma_ptr, dbeta_ptr, dbias_ptr, c,
    C: tl.constexpr, BATCH: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Store what follows from both sums of all rows, and dgamma, dbeta and dbias from those of this process."""
    c_mask = c < C
    own_one, own_two = one, two
    if own_ptr is not None:
        own_one = tl.load(own_ptr + c, mask=c_mask, other=0.0)
        own_two = tl.load(own_ptr + C + c, mask=c_mask, other=0.0)
    invstd = tl.load(vectors_ptr + INVSTD * C + c, mask=c_mask, other=0.0)
    a = tl.load(vectors_ptr + SCALE * C + c, mask=c_mask, other=0.0)
    if dgamma_ptr is not None:
        store_rounded(dgamma_ptr + c, invstd * own_two, c_mask)
    if dbeta_ptr is not None:
        store_rounded(dbeta_ptr + c, own_one, c_mask)
    if dbias_ptr is not None:
        store_rounded(dbias_ptr + c, tl.zeros_like(a) if BATCH else a * own_one, c_mask)
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
        tl.store(packed_ptr + NEG_GAMMA * C + c, round_to(-gamma, dtype, UPCAST), mask=c_mask)


@triton.jit
def coefficients_program(
    pid, partials_ptr, merged_ptr, counters_ptr, own_ptr, vectors_ptr, coefficients_ptr, packed_ptr,
    dgamma_ptr, dbeta_ptr, dbias_ptr, tiles, chunks, chunk,
    C: tl.constexpr, BATCH: tl.constexpr, UPCAST: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sum ``chunk`` tiles of a channel block; the last program of a channel block sums the chunks and goes on."""
    blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    block, part = pid % blocks, pid // blocks
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    c_mask = c < C
    first = part * chunk
    one, two = _summed(partials_ptr, first, min(first + chunk, tiles), tiles, c, C, BLOCK_T, BLOCK_C, "")
    last = True
    if merged_ptr is not None:
        out = merged_ptr + part * C + c
        tl.store(out, one, mask=c_mask)
        tl.store(out + chunks * C, two, mask=c_mask)
        last = arrive(counters_ptr + BLOCKS + block) == chunks - 1
        if last:
            one, two = _summed(merged_ptr, 0, chunks, chunks, c, C, BLOCK_T, BLOCK_C, ".cg")
    if last:
        store_coefficients(
            one, two, own_ptr, vectors_ptr, coefficients_ptr, packed_ptr, dgamma_ptr, dbeta_ptr, dbias_ptr, c,
            C, BATCH, UPCAST,
        )  # fmt: skip


@triton.jit
def _finish(
    partials_ptr, tiles, vectors_ptr, coefficients_ptr, packed_ptr, dgamma_ptr, dbeta_ptr, dbias_ptr, c,
    C: tl.constexpr, BATCH: tl.constexpr, UPCAST: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    one, two = _summed(partials_ptr, 0, tiles, tiles, c, C, BLOCK_T, BLOCK_C, ".cg")
    store_coefficients(
        one, two, None, vectors_ptr, coefficients_ptr, packed_ptr, dgamma_ptr, dbeta_ptr, dbias_ptr, c, C, BATCH, UPCAST
    )


@triton.jit
def _merge(
    partials_ptr, merged_ptr, part, first, end, tiles, chunks, c,
    C: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    one, two = _summed(partials_ptr, first, end, tiles, c, C, BLOCK_T, BLOCK_C, ".cg")
    out = merged_ptr + part * C + c
    tl.store(out, one, mask=c < C)
    tl.store(out + chunks * C, two, mask=c < C)


@triton.jit
def finish_last(
    tile, block, c, tiles, chunks, chunk, arrivals_ptr,
    partials_ptr, merged_ptr, vectors_ptr, coefficients_ptr, packed_ptr, dgamma_ptr, dbeta_ptr, dbias_ptr,
    partials_d_ptr, merged_d_ptr, vectors_d_ptr, coefficients_d_ptr, packed_d_ptr, dgamma_d_ptr, dbeta_d_ptr,
    dbias_d_ptr,
    C: tl.constexpr, BATCH: tl.constexpr, BATCH_D: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Arrive with the stored sums of a tile, for one or two norms; the last program of a channel block finishes them.

    The last of a chunk of tiles adds them up, the last chunk's adds up the chunks and stores the coefficients. Counters
    that have served are 0 again. ``block``: of BLOCK_C channels.
    """
    part = tile // chunk
    first = part * chunk
    end = min(first + chunk, tiles)
    own_ptr = arrivals_ptr + block * ARRIVALS
    if arrive(own_ptr + part) == end - first - 1:
        tl.store(own_ptr + part, 0)
        last = True
        if merged_ptr is not None:
            _merge(partials_ptr, merged_ptr, part, first, end, tiles, chunks, c, C, BLOCK_T, BLOCK_C)
            if partials_d_ptr is not None:
                _merge(partials_d_ptr, merged_d_ptr, part, first, end, tiles, chunks, c, C, BLOCK_T, BLOCK_C)
            last = arrive(own_ptr + MOST_CHUNKS) == chunks - 1
        if last:
            tl.store(own_ptr + MOST_CHUNKS, 0)
            _finish(
                partials_ptr if merged_ptr is None else merged_ptr, chunks if merged_ptr is not None else tiles,
                vectors_ptr, coefficients_ptr, packed_ptr, dgamma_ptr, dbeta_ptr, dbias_ptr, c,
                C, BATCH, UPCAST, BLOCK_T, BLOCK_C,
            )  # fmt: skip
            if partials_d_ptr is not None:
                _finish(
                    partials_d_ptr if merged_ptr is None else merged_d_ptr, chunks if merged_ptr is not None else tiles,
                    vectors_d_ptr, coefficients_d_ptr, packed_d_ptr, dgamma_d_ptr, dbeta_d_ptr, dbias_d_ptr, c,
                    C, BATCH_D, UPCAST, BLOCK_T, BLOCK_C,
                )  # fmt: skip


@triton.jit
def norm_program(
    pid, partials_ptr, merged_ptr, counters_ptr, own_ptr, vectors_ptr, coefficients_ptr, packed_ptr,
    dgamma_ptr, dbeta_ptr, dbias_ptr, tiles, chunks, chunk, packing,
    weight_ptr, a_ptr, wt_ptr, stride_co, stride_ci, stride_r, stride_s,
    sum_p_ptr, sum_q_ptr, sum_z_ptr, sum_coefficients_ptr, sum_grad_ptr, sum_v_ptr, sum_act_ptr, dw_ptr,
    splits, idle, dw_stride_co, dw_stride_ci, dw_stride_r, dw_stride_s,
    C: tl.constexpr, BATCH: tl.constexpr, UPCAST: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
    CI: tl.constexpr, CO: tl.constexpr, GROUPS: tl.constexpr, OWN_CI: tl.constexpr, OWN_CO: tl.constexpr,
    R: tl.constexpr, S: tl.constexpr, UPCAST_W: tl.constexpr, TILE: tl.constexpr,
    P_CI: tl.constexpr, P_CO: tl.constexpr, P_GROUPS: tl.constexpr, P_OWN_CI: tl.constexpr, P_OWN_CO: tl.constexpr,
    P_R: tl.constexpr, P_S: tl.constexpr, P_BATCH: tl.constexpr, P_PROLOGUE: tl.constexpr, P_PACKED: tl.constexpr,
    P_PADDED: tl.constexpr, P_WINDOW: tl.constexpr, P_BLOCK_M: tl.constexpr, P_BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Run program ``pid`` of a norm's: its coefficients, ``packing`` programs, or those of a wgrad's sum.

    Further programs do nothing.
    """
    own = 0
    if partials_ptr is not None:
        own = (C + BLOCK_C - 1) // BLOCK_C * chunks
        if pid < own:
            coefficients_program(
                pid, partials_ptr, merged_ptr, counters_ptr, own_ptr, vectors_ptr, coefficients_ptr, packed_ptr,
                dgamma_ptr, dbeta_ptr, dbias_ptr, tiles, chunks, chunk, C, BATCH, UPCAST, BLOCK_T, BLOCK_C,
            )  # fmt: skip
    if weight_ptr is not None:  # noqa: SIM102 (the compiler decides the outer condition, the program the inner one)
        if (pid >= own) & (pid < own + packing):
            pack_dgrad_program(
                pid - own, weight_ptr, a_ptr, wt_ptr, stride_co, stride_ci, stride_r, stride_s,
                CI, CO, GROUPS, OWN_CI, OWN_CO, R, S, TILE, UPCAST_W,
            )  # fmt: skip
    if sum_p_ptr is not None:
        rows: tl.constexpr = (P_CO * P_GROUPS + P_BLOCK_M - 1) // P_BLOCK_M
        columns: tl.constexpr = (P_R * P_S * P_CI + P_BLOCK_N - 1) // P_BLOCK_N
        if (pid >= own + packing) & (pid < own + packing + rows * columns):
            reduce_splits_program(
                pid - own - packing, sum_p_ptr, sum_q_ptr, sum_z_ptr, sum_coefficients_ptr, sum_grad_ptr, sum_v_ptr,
                sum_act_ptr, dw_ptr, splits, idle, dw_stride_co, dw_stride_ci, dw_stride_r, dw_stride_s,
                P_CI, P_CO, P_GROUPS, P_OWN_CI, P_OWN_CO, P_R, P_S,
                P_BATCH, P_PROLOGUE, P_PACKED, P_PADDED, P_WINDOW, P_BLOCK_M, P_BLOCK_N,
            )  # fmt: skip


@triton.jit(do_not_specialize=["tiles", "chunks", "chunk", "packing", "splits", "idle"])
def _coefficients_kernel(
    partials_ptr, merged_ptr, counters_ptr, own_ptr, vectors_ptr, coefficients_ptr, packed_ptr,
    dgamma_ptr, dbeta_ptr, dbias_ptr, tiles, chunks, chunk, packing,
    weight_ptr, a_ptr, wt_ptr, stride_co, stride_ci, stride_r, stride_s,
    sum_p_ptr, sum_q_ptr, sum_z_ptr, sum_coefficients_ptr, sum_grad_ptr, sum_v_ptr, sum_act_ptr, dw_ptr,
    splits, idle, dw_stride_co, dw_stride_ci, dw_stride_r, dw_stride_s,
    C: tl.constexpr, BATCH: tl.constexpr, UPCAST: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
    CI: tl.constexpr, CO: tl.constexpr, GROUPS: tl.constexpr, OWN_CI: tl.constexpr, OWN_CO: tl.constexpr,
    R: tl.constexpr, S: tl.constexpr, UPCAST_W: tl.constexpr, TILE: tl.constexpr,
    P_CI: tl.constexpr, P_CO: tl.constexpr, P_GROUPS: tl.constexpr, P_OWN_CI: tl.constexpr, P_OWN_CO: tl.constexpr,
    P_R: tl.constexpr, P_S: tl.constexpr, P_BATCH: tl.constexpr, P_PROLOGUE: tl.constexpr, P_PACKED: tl.constexpr,
    P_PADDED: tl.constexpr, P_WINDOW: tl.constexpr, P_BLOCK_M: tl.constexpr, P_BLOCK_N: tl.constexpr,
):  # fmt: skip
    norm_program(
        tl.program_id(0), partials_ptr, merged_ptr, counters_ptr, own_ptr, vectors_ptr, coefficients_ptr, packed_ptr,
        dgamma_ptr, dbeta_ptr, dbias_ptr, tiles, chunks, chunk, packing,
        weight_ptr, a_ptr, wt_ptr, stride_co, stride_ci, stride_r, stride_s,
        sum_p_ptr, sum_q_ptr, sum_z_ptr, sum_coefficients_ptr, sum_grad_ptr, sum_v_ptr, sum_act_ptr, dw_ptr,
        splits, idle, dw_stride_co, dw_stride_ci, dw_stride_r, dw_stride_s,
        C, BATCH, UPCAST, BLOCK_T, BLOCK_C, CI, CO, GROUPS, OWN_CI, OWN_CO, R, S, UPCAST_W, TILE,
        P_CI, P_CO, P_GROUPS, P_OWN_CI, P_OWN_CO, P_R, P_S,
        P_BATCH, P_PROLOGUE, P_PACKED, P_PADDED, P_WINDOW, P_BLOCK_M, P_BLOCK_N,
    )  # fmt: skip


def _sum(partials: Tensor, chunk: int) -> Tensor:
    """Sum chunks of ``chunk`` tiles: (2, tiles, C) -> (2, chunks, C)."""
    tiles, c = partials.shape[1:]
    out = partials.new_empty((2, -(-tiles // chunk), c))
    submit(
        _sum_kernel, (out.shape[1], blocks_of(c)), partials, out, tiles, out.shape[1], chunk,
        C=c, BLOCK_T=BLOCK_T, BLOCK_C=BLOCK_C,
    )  # fmt: skip
    return out


Parameters = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Gamma and beta of a norm and the bias of the convolution before it, (C,) each; None where no gradient is wanted."""


def coefficients(
    grad: Grad,
    sums_partials: Tensor,
    vectors: Tensor,
    parameters: Parameters = (None, None, None),
    group: str = "",
    counters: Tensor | None = None,
    packing: Passenger = NO_DGRAD,
    reduction: Passenger = NO_REDUCTION,
) -> Parameters:
    """Compute the coefficients of a raw output's gradient, and the gradients of gamma, beta and a bias, in one launch.

    Args:
        grad: of :func:`gradient_of`: ``coefficients`` and ``packed`` are written.
        sums_partials: (2, tiles, C), sum g and sum g * (y - MEAN) of each tile.
        vectors: (10, C) of the norm.
        parameters: whose gradients are wanted.
        group: name of the process group that normalises together; empty for this process alone.
        counters: (2 + blocks,) int32, zeros that this launch uses up; None to make them.
        packing: of :func:`pack.dgrad_passenger`.
        reduction: of :func:`conv_wgrad.conv_wgrad`.

    Returns:
        dgamma, dbeta and the bias's gradient of this process, in the parameters' dtypes, or None. The coefficients are
        over all processes of the group.
    """
    partials, own = sums_partials, None
    if group and grad.batch:
        while partials.shape[1] > LAST_TILES:
            partials = _sum(partials, CHUNK)
        own = _sum(partials, LAST_TILES)
        partials = _reduced(own, group)
    found, programs = passenger(grad, partials, vectors, parameters, counters, packing, reduction, own)
    submit(_coefficients_kernel, (programs.programs,), *programs.arguments, **programs.constants)
    return found


def passenger(
    grad: Grad,
    partials: Tensor,
    vectors: Tensor,
    parameters: Parameters,
    counters: Tensor | None,
    packing: Passenger,
    reduction: Passenger,
    own: Tensor | None = None,
) -> tuple[Parameters, Passenger]:
    """Return (the gradients of the parameters, the programs that write them and ``grad``), for a launch to take along.

    Arguments as of :func:`coefficients`. ``own``: (2, 1, C), the sums of this process, if ``partials`` are those of all
    processes.
    """
    tiles, c = partials.shape[1:]
    chunks, chunk = chunks_of(tiles)
    merged = partials.new_empty((2, chunks, c)) if chunks > 1 else None
    if merged is not None and counters is None:
        counters = partials.new_zeros(2 + blocks_of(c), dtype=torch.int32)
    found = [None if p is None else torch.empty_like(p) for p in parameters]
    arguments = (
        partials, merged, counters, own, vectors, grad.coefficients, grad.packed, *found, tiles, chunks, chunk,
        packing.programs, *packing.arguments, *reduction.arguments,
    )  # fmt: skip
    constants = {"C": c, "BATCH": grad.batch, "UPCAST": upcasts(grad.g.dtype), "BLOCK_T": BLOCK_T, "BLOCK_C": BLOCK_C}
    programs = blocks_of(c) * chunks + packing.programs + reduction.programs
    return (found[0], found[1], found[2]), Passenger(
        programs, arguments, {**constants, **packing.constants, **reduction.constants}
    )


def without_norm(reduction: Passenger = NO_REDUCTION) -> Passenger:
    """Return the programs of :func:`passenger` with a wgrad's sum alone."""
    constants = {"C": 1, "BATCH": False, "UPCAST": False, "BLOCK_T": 1, "BLOCK_C": 1}
    return Passenger(
        reduction.programs,
        (*[None] * 10, 0, 0, 0, 0, *NO_DGRAD.arguments, *reduction.arguments),
        {**constants, **NO_DGRAD.constants, **reduction.constants},
    )


class Finish(NamedTuple):
    """What the end of a block stores of one norm, for :func:`finish_last`.

    Attributes:
        grad: the gradient whose coefficients are written.
        found: dgamma, dbeta and the bias's gradient, to be written; None where they are not wanted.
    """

    grad: Grad
    found: tuple[Tensor | None, Tensor | None, Tensor | None]


def finish_of(grad: Grad, parameters: tuple[Tensor | None, Tensor | None, Tensor | None]) -> Finish:
    """Return what a norm's end stores; arguments as of :func:`coefficients`."""
    gamma, beta, bias = (None if p is None else torch.empty_like(p) for p in parameters)
    return Finish(grad, (gamma, beta, bias))


def finish_arguments(
    finishes: Sequence[Finish], tiles: int, like: Tensor, norms: int
) -> tuple[tuple[Any, ...], dict[str, bool]]:
    """Return what :func:`finish_last` takes of up to ``norms`` norms over sums of ``tiles`` tiles like ``like``.

    Chunks and their length, then per norm the memory for merged sums, the coefficients twice and the gradients; and
    BATCH of each norm.
    """
    chunk = max(LEAST_CHUNK, -(-tiles // MOST_CHUNKS.value))
    chunks = -(-tiles // chunk)
    arguments: list[Any] = [chunks, chunk]
    for finish in finishes:
        merged = like.new_empty((2, chunks, like.shape[2])) if chunks > 1 else None
        arguments += [merged, finish.grad.coefficients, finish.grad.packed, *finish.found]
    arguments += [None] * (6 * (norms - len(finishes)))
    batch = [*(f.grad.batch for f in finishes), False, False]
    return tuple(arguments), {"BATCH": batch[0], "BATCH_D": batch[1]}


def arrivals_of(channels: int) -> int:
    """Return the counters that the end of a block of ``channels`` channels needs, and leaves 0."""
    return -(-channels // channel_block(channels)) * ARRIVALS.value


def gradient_of(g: Tensor, y: Tensor, batch: bool) -> Grad:
    """Return the gradient of raw output ``y`` (N, C, H, W) from that of its norm's output, without coefficients yet.

    ``batch``: whether the norm used the batch's statistics.
    """
    c = y.shape[1]
    packed = None if g.dtype == torch.float32 else g.new_empty((4, c))
    return Grad(g, y, g.new_empty((3, c), dtype=torch.float32), packed, batch)


def _reduced(own: Tensor, group: str) -> Tensor:
    """Return the sum of ``own`` over the processes of the group."""
    return torch.ops._c10d_functional.wait_tensor(torch.ops._c10d_functional.all_reduce(own, "sum", group))
