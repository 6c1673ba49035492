r"""Add the splits of a wgrad, apply factors and corrections, and write dW as the parameter is.

    dW = A * FOLD * (sum_split P - THR * sum_split Q)      and its variants: conv_wgrad.py, which computes P and Q

    P (splits, Co, columns) fp32     Q (splits, Co)     mean of z (splits, groups, columns)     dW as the parameter

          column ->                      a program: REDUCE_M filters x REDUCE_N columns, the splits from the first to
    co  [ P of split 0 ] [ split 1 ]     the last, then factors and corrections once
        [              ] [         ] --> dW of the filter's own group, rounded, in the parameter's strides

Saved bytes. dW is written once, as the parameter is: no other pass converts it or changes its layout.

Saved launches. These programs need their wgrad, whose launch is older, and wait for nothing in the launch that they
travel in. So they go behind those of the next wgrad or, of a call's last wgrad, behind the dgrad after it. An image has
no dgrad, so the stem's have a launch of their own.

Numerics: fp32, splits in order, so the same bits every time.
Alone: ``TRITON_INTERPRET=1 python -m pytest tests/backends/triton/training/test_conv_wgrad.py``.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..launch import submit
from ..tiles import row_offset, store_rounded
from . import vectors
from .pack import Passenger

FOLD, THR = tl.constexpr(vectors.FOLD), tl.constexpr(vectors.THR)
LO, HI, THRESHOLD = tl.constexpr(vectors.LO), tl.constexpr(vectors.HI), tl.constexpr(vectors.THRESHOLD)
A, GAMMA = tl.constexpr(vectors.A), tl.constexpr(vectors.GAMMA)


@triton.jit
def channel_vector(ptr, c, mask, ROW: tl.constexpr, C_ALL: tl.constexpr):
    """Load channels ``c`` of row ROW of the vectors."""
    return tl.load(ptr + ROW * C_ALL + c, mask=mask, other=0.0)


@triton.jit
def reduce_splits_program(
    pid, p_ptr, q_ptr, z_ptr, coefficients_ptr, grad_ptr, v_ptr, act_ptr, dw_ptr, splits, idle,
    stride_co, stride_ci, stride_r, stride_s,
    CI: tl.constexpr, CO: tl.constexpr, GROUPS: tl.constexpr, OWN_CI: tl.constexpr, OWN_CO: tl.constexpr,
    R: tl.constexpr, S: tl.constexpr, BATCH: tl.constexpr, PROLOGUE: tl.constexpr, PACKED: tl.constexpr,
    PADDED: tl.constexpr, WINDOW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add the splits of a tile of dW, apply factors and corrections, and store what belongs to the filters' own group.

    CI and CO count channels of a merged group, OWN_* those of a group before merging.
    """
    C_IN: tl.constexpr = CI * GROUPS
    C_OUT: tl.constexpr = CO * GROUPS
    COLUMNS: tl.constexpr = R * S * CI
    tiles_m: tl.constexpr = (C_OUT + BLOCK_M - 1) // BLOCK_M
    co = pid % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = pid // tiles_m * BLOCK_N + tl.arange(0, BLOCK_N)
    g, within = co // CO, column % CI
    ci = g[:, None] * CI + within[None, :]
    own = (co % CO // OWN_CO)[:, None] == (within // OWN_CI)[None, :]
    co_mask = co < C_OUT
    mask = co_mask[:, None] & (column < COLUMNS)[None, :] & own
    # P, Q and the mean of z: splits in order
    p = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    q = tl.zeros((BLOCK_M,), dtype=tl.float32)
    z = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for split in range(0, splits):
        at = row_offset(split * C_OUT + co, COLUMNS)[:, None] + column[None, :]
        p += tl.load(p_ptr + at, mask=mask, other=0.0)
        if PACKED and (BATCH or PROLOGUE):
            q += tl.load(q_ptr + split * C_OUT + co, mask=co_mask, other=0.0)
        if PACKED and BATCH:
            z += tl.load(z_ptr + (split * GROUPS + g)[:, None] * COLUMNS + column[None, :], mask=mask, other=0.0)
    if PACKED:
        if BATCH:
            # without the ``idle`` rows: q = GAMMA, z = clamp(THRESHOLD) or clamp(0)
            gamma = idle * channel_vector(grad_ptr, co, co_mask, GAMMA, C_OUT).to(tl.float32)
            q -= gamma
            if PROLOGUE:
                still = (
                    channel_vector(act_ptr, ci, mask, THRESHOLD, C_IN).to(tl.float32) if PADDED else tl.zeros_like(z)
                )
                lo = channel_vector(act_ptr, ci, mask, LO, C_IN).to(tl.float32)
                hi = channel_vector(act_ptr, ci, mask, HI, C_IN).to(tl.float32)
                p -= gamma[:, None] * (still if WINDOW and PADDED else tl.minimum(tl.maximum(still, lo), hi))
            p -= q[:, None] * (z / splits)
        elif PROLOGUE:
            p -= q[:, None] * channel_vector(v_ptr, ci, mask, THR, C_IN)
        p *= channel_vector(coefficients_ptr, co, co_mask, A, C_OUT)[:, None]
        if PROLOGUE:
            p *= channel_vector(v_ptr, ci, mask, FOLD, C_IN)
    tap = column // CI
    at = within % OWN_CI * stride_ci + tap // S * stride_r + tap % S * stride_s
    store_rounded(dw_ptr + (row_offset(co, stride_co)[:, None] + at[None, :]), p, mask)


@triton.jit(do_not_specialize=["splits", "idle"])
def _reduce_splits_kernel(
    p_ptr, q_ptr, z_ptr, coefficients_ptr, grad_ptr, v_ptr, act_ptr, dw_ptr, splits, idle,
    stride_co, stride_ci, stride_r, stride_s,
    P_CI: tl.constexpr, P_CO: tl.constexpr, P_GROUPS: tl.constexpr, P_OWN_CI: tl.constexpr, P_OWN_CO: tl.constexpr,
    P_R: tl.constexpr, P_S: tl.constexpr, P_BATCH: tl.constexpr, P_PROLOGUE: tl.constexpr, P_PACKED: tl.constexpr,
    P_PADDED: tl.constexpr, P_WINDOW: tl.constexpr, P_BLOCK_M: tl.constexpr, P_BLOCK_N: tl.constexpr,
):  # fmt: skip
    reduce_splits_program(
        tl.program_id(0), p_ptr, q_ptr, z_ptr, coefficients_ptr, grad_ptr, v_ptr, act_ptr, dw_ptr, splits, idle,
        stride_co, stride_ci, stride_r, stride_s, P_CI, P_CO, P_GROUPS, P_OWN_CI, P_OWN_CO, P_R, P_S,
        P_BATCH, P_PROLOGUE, P_PACKED, P_PADDED, P_WINDOW, P_BLOCK_M, P_BLOCK_N,
    )  # fmt: skip


REDUCE_M, REDUCE_N = 16, 128
"""Filters and columns of a program that adds splits."""

_GEOMETRY = ("CI", "CO", "GROUPS", "OWN_CI", "OWN_CO", "R", "S")
_KIND = ("BATCH", "PROLOGUE", "PACKED", "PADDED", "WINDOW")

NO_REDUCTION = Passenger(
    0,
    (*[None] * 8, 0, 0, 1, 1, 1, 1),
    {f"P_{name}": 1 for name in (*_GEOMETRY, "BLOCK_M", "BLOCK_N")} | {f"P_{name}": False for name in _KIND},
)
"""No wgrad to finish."""


def reduction(co: int, columns: int, arguments: tuple[Any, ...], values: tuple[Any, ...]) -> Passenger:
    """Return the programs that write dW of ``co`` filters with ``columns`` columns.

    ``arguments``, ``values``: of :func:`reduce_splits_program` from ``p_ptr``; from ``CI`` to ``WINDOW``.
    """
    constants = {f"P_{name}": value for name, value in zip((*_GEOMETRY, *_KIND), values, strict=True)}
    programs = -(-co // REDUCE_M) * -(-columns // REDUCE_N)
    return Passenger(programs, arguments, {**constants, "P_BLOCK_M": REDUCE_M, "P_BLOCK_N": REDUCE_N})


def reduce_splits(reduction: Passenger) -> None:
    """Launch what a wgrad left to do, where no other launch takes it along; nothing if it left nothing."""
    if reduction.programs:
        submit(_reduce_splits_kernel, (reduction.programs,), *reduction.arguments, **reduction.constants)
