r"""Weights as the training kernels read them: rounded, reordered, and scaled by the factor of a packed prologue.

    forward   w[co, r, s, ci] = round(weight[co, ci, r, s] * FOLD[ci])          const[co] = -sum_rs,ci w * THR[ci]
    dgrad     wt[ci, r, s, co] = round(weight[co, ci, r, s] * A[co])

    weight (Co, Ci/groups, R, S), the parameter: any strides, fp32 or 16 bit
    w (Co, R, S, Ci/g)   wt (Ci, R, S, Co/g)   dense, in the activations' dtype; g: merged groups, tuning/routes.py

Packed, relu(SCALE*y + SHIFT) is FOLD * (clamp(y) - THR) (vectors.py). The factor goes into the weight before the
rounding that autocast would make anyway, so the rounding error of w is that of stock autocast. The constant is computed
from the rounded weight, so that it cancels padding and clamped values exactly. With an exact prologue both are casts.

Saved bytes. Autocast writes a 16-bit copy of each parameter, and cuDNN may reorder it again. Here each use reads the
parameter once and writes it once, folded.

Merged groups are block-diagonal: channels of another member of the merged group are masked as they are read, so no
expanded copy of the parameter exists. wt of group g has rows [g*Ci/g, (g+1)*Ci/g), and the group's output channels as
its last axis.

            forward: one program a row                     dgrad: one program a tile and tap
      weight[co]  r s ci ->                           weight[:, :, r, s]   ci ->         wt[:, r, s, :]   co ->
      +---------------------------+                               +-------+                        +-------+
      | block | block | block |   |  gathered,                 co |  tile | loaded              ci |  tile'| stored
      +---------------------------+  stored densely,            | |       | along ci             | |       | along co
        sum of w*THR by lane, then over lanes                   v +-------+                      v +-------+

Alone: ``TRITON_INTERPRET=1 python -m pytest tests/backends/triton/training/test_pack.py``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....spec import ConvSpec
from ....tuning.routes import merged_groups
from ..launch import submit, upcasts
from ..tiles import round_to
from . import vectors
from .vectors import Act

FOLD, THR = tl.constexpr(vectors.FOLD), tl.constexpr(vectors.THR)

ROW_BLOCK = 1024
"""Most elements of a filter that a program of the forward kernel holds at once."""

TILE = 32
"""Side of a dgrad program's tile of channels."""


@triton.jit
def _pack_forward_kernel(
    weight_ptr, vectors_ptr, w_ptr, const_ptr, stride_co, stride_ci, stride_r, stride_s,
    CI: tl.constexpr, C: tl.constexpr, GEMM_N: tl.constexpr, OWN_CI: tl.constexpr, OWN_CO: tl.constexpr,
    R: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    # row co of the packed weight, in merged group g; OWN_* count the channels of a group before merging
    co = tl.program_id(0)
    g, member = co // GEMM_N, co % GEMM_N // OWN_CO
    rows = weight_ptr + co.to(tl.int64) * stride_co
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, R * S * CI, BLOCK):
        # k -> (r, s, ci); channels of other members are zeros of the block-diagonal filter
        k = start + tl.arange(0, BLOCK)
        r, s, ci = k // (S * CI), k // CI % S, k % CI
        real = k < R * S * CI
        own = real & (ci // OWN_CI == member)
        at = (ci % OWN_CI) * stride_ci + r * stride_r + s * stride_s
        w = tl.load(rows + at, mask=own, other=0.0).to(tl.float32)
        # w = round(weight * FOLD); total += w * THR
        if vectors_ptr is not None:
            w *= tl.load(vectors_ptr + (FOLD * C + g * CI + ci), mask=own, other=0.0)
        w = round_to(w, w_ptr.dtype.element_ty, UPCAST)
        tl.store(w_ptr + (co.to(tl.int64) * (R * S * CI) + k), w, mask=real)
        if vectors_ptr is not None:
            total += w.to(tl.float32) * tl.load(vectors_ptr + (THR * C + g * CI + ci), mask=own, other=0.0)
    if vectors_ptr is not None:
        tl.store(const_ptr + co, 0.0 - tl.sum(total, 0))


@triton.jit
def _pack_dgrad_kernel(
    weight_ptr, a_ptr, wt_ptr, stride_co, stride_ci, stride_r, stride_s,
    CI: tl.constexpr, GEMM_N: tl.constexpr, OWN_CI: tl.constexpr, OWN_CO: tl.constexpr,
    R: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    # tile of (co, ci) of tap (r, s) of merged group g
    tap, g = tl.program_id(1), tl.program_id(2)
    r, s = tap // S, tap % S
    tiles: tl.constexpr = (GEMM_N + BLOCK - 1) // BLOCK
    co = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    ci = tl.program_id(0) // tiles * BLOCK + tl.arange(0, BLOCK)
    real = (co < GEMM_N)[:, None] & (ci < CI)[None, :]
    own = real & ((co // OWN_CO)[:, None] == (ci // OWN_CI)[None, :])
    rows = weight_ptr + (g * GEMM_N + co).to(tl.int64) * stride_co + (r * stride_r + s * stride_s)
    w = tl.load(rows[:, None] + (ci % OWN_CI * stride_ci)[None, :], mask=own, other=0.0).to(tl.float32)
    # wt[ci, r, s, co] = round(weight * A)
    if a_ptr is not None:
        w = tl.where(own, w * tl.load(a_ptr + (g * GEMM_N + co), mask=co < GEMM_N, other=0.0)[:, None], 0.0)
    w = round_to(w, wt_ptr.dtype.element_ty, UPCAST)
    at = ((g * CI + ci).to(tl.int64) * (R * S) + tap) * GEMM_N
    tl.store(wt_ptr + (at[None, :] + co[:, None]), w, mask=real)


def pack_forward(weight: Tensor, dtype: torch.dtype, conv: ConvSpec, act: Act | None) -> tuple[Tensor, Tensor | None]:
    """Pack a weight for the forward convolution.

    Args:
        weight: (Co, Ci/groups, R, S), any strides.
        dtype: of the result.
        conv: the convolution.
        act: the input that a packed prologue reads; its ``vectors`` give FOLD and THR. None, or an ``act`` without
            ``clamp``: the weight is only cast.

    Returns:
        The weight (Co, R, S, Ci/merged groups), dense in ``dtype`` (a view if nothing changes), and ``const`` (Co,)
        fp32, or None for a cast.
    """
    groups = merged_groups(conv)
    rows = act.vectors if act is not None and act.clamp is not None else None
    relaid = weight.detach().permute(0, 2, 3, 1)
    if rows is None and groups == conv.groups and weight.dtype == dtype and relaid.is_contiguous():
        return relaid, None
    ci, row = conv.ci // groups, conv.r * conv.s * (conv.ci // groups)
    w = weight.new_empty((conv.co, conv.r, conv.s, ci), dtype=dtype)
    const = weight.new_empty(conv.co, dtype=torch.float32) if rows is not None else None
    submit(
        _pack_forward_kernel, (conv.co,),
        weight.detach(), rows, w, const, *weight.stride(),
        CI=ci, C=conv.ci, GEMM_N=conv.co // groups, OWN_CI=conv.ci // conv.groups, OWN_CO=conv.co // conv.groups,
        R=conv.r, S=conv.s, BLOCK=min(ROW_BLOCK, triton.next_power_of_2(row)), UPCAST=upcasts(dtype),
    )  # fmt: skip
    return w, const


def pack_dgrad(weight: Tensor, dtype: torch.dtype, conv: ConvSpec, a: Tensor | None) -> Tensor:
    """Pack a weight for the input's gradient.

    Args:
        weight: (Co, Ci/groups, R, S), any strides.
        dtype: of the result.
        conv: the convolution.
        a: row A of ``coefficients``, (Co,) fp32, for a packed prologue; otherwise None.

    Returns:
        The weight (Ci, R, S, Co/merged groups), dense in ``dtype``.
    """
    groups = merged_groups(conv)
    ci, co = conv.ci // groups, conv.co // groups
    wt = weight.new_empty((conv.ci, conv.r, conv.s, co), dtype=dtype)
    tiles = -(-ci // TILE) * -(-co // TILE)
    submit(
        _pack_dgrad_kernel, (tiles, conv.r * conv.s, groups),
        weight.detach(), a, wt, *weight.stride(),
        CI=ci, GEMM_N=co, OWN_CI=conv.ci // conv.groups, OWN_CO=conv.co // conv.groups,
        R=conv.r, S=conv.s, BLOCK=TILE, UPCAST=upcasts(dtype),
    )  # fmt: skip
    return wt
