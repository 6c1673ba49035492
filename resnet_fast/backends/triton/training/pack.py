r"""Weights as the training kernels read them: rounded, reordered, and scaled by the factor of a packed prologue.

    forward   w[co, r, s, ci] = round(weight[co, ci, r, s] * FOLD[ci])          const[co] = -sum_rs,ci w * THR[ci]
    dgrad     wt[ci, r, s, co] = round(weight[co, ci, r, s] * A[co])            A = SCALE

    weight (Co, Ci/groups, R, S), the parameter: any strides, fp32 or 16 bit
    w (Co, R, S, Ci/g)   wt (Ci, R, S, Co/g)   dense, in the activations' dtype; g: merged groups, tuning/routes.py

Packed, relu(SCALE*y + SHIFT) is FOLD * (clamp(y) - THR) (vectors.py). The factor goes into the weight before the
rounding that autocast would make anyway, so the rounding error of w is that of stock autocast. The constant is computed
from the rounded weight, so that it cancels padding and clamped values exactly. With an exact prologue both are casts.

Saved bytes. Autocast writes a 16-bit copy of each parameter, and cuDNN may reorder it again. Here each use reads the
parameter once and writes it once, folded.

Saved launches. Packing has few programs, so most weights travel as passengers of another launch, whose programs come
first: a weight that needs FOLD with the finalize kernel of that norm (batch_norm.py), which it waits for while its
first block of the parameter is on the way; a dgrad weight with the coefficients of the norm behind it
(norm_gradient.py), often behind a wgrad (conv_wgrad.py). Only the weights that read the call's input, the first and
the projection's, have a launch of their own, which also clears the counters of the pass (arrival.py).

Merged groups are block-diagonal: channels of another member of the merged group are masked as they are read, so no
expanded copy of the parameter exists. wt of group g has rows [g*Ci/g, (g+1)*Ci/g), and the group's output channels as
its last axis.

            forward: one program a few rows                dgrad: one program a tile and tap
      weight[co]  r s ci ->                           weight[:, :, r, s]   ci ->         wt[:, r, s, :]   co ->
      +---------------------------+                               +-------+                        +-------+
      | block | block | block |   |  gathered,                 co |  tile | loaded              ci |  tile'| stored
      +---------------------------+  stored densely,            | |       | along ci             | |       | along co
        sum of w*THR by lane, then over lanes                   v +-------+                      v +-------+

Alone: ``TRITON_INTERPRET=1 python -m pytest tests/backends/triton/training/test_pack.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....spec import ConvSpec
from ....tuning.configs import Config
from ....tuning.routes import merged_groups
from ....tuning.training_configs import CUDNN
from ..launch import submit, upcasts
from ..tiles import round_to
from . import vectors
from .arrival import clear_in_first_program, wait
from .vectors import Act

FOLD, THR = tl.constexpr(vectors.FOLD), tl.constexpr(vectors.THR)

BLOCK = 1024
"""Most elements of filters that a program of the forward kernel holds at once."""

PROGRAMS = 128
"""Programs to have, if there are as many filters, before a program takes several rows."""

TILE = 32
"""Side of a dgrad program's tile of channels, for programs of four warps."""


def tile_behind(warps: int) -> int:
    """Return the side of a dgrad program's tile that gives each thread of ``warps`` warps 8 elements or more.

    A multiprocessor holds one block of eight warps with a whole tile of products, and two or more of four. So with
    half the blocks a block has twice the bytes in flight: 16 KB, which memory delivers in its latency.
    """
    return TILE if warps <= 4 else 2 * TILE


class Passenger(NamedTuple):
    """Programs of a kernel that another kernel's launch takes along, behind its own.

    Attributes:
        programs: their number.
        arguments: what their part of the kernel takes, in order; a first argument of None compiles it out.
        constants: its compile-time arguments.
    """

    programs: int
    arguments: tuple[Any, ...]
    constants: dict[str, Any]

    def named(self, prefix: str) -> dict[str, Any]:
        """Return the compile-time arguments with ``prefix``, for a kernel that has arguments of the same names."""
        return {prefix + name: value for name, value in self.constants.items()}


def takes_passengers(config: Config) -> bool:
    """Return whether a launch of conv_dgrad or conv_wgrad takes passengers without losing blocks per multiprocessor.

    With small tiles, or with an exact prologue and four warps, the compiler gives all its programs more registers.
    """
    whole = config.num_warps == 8 or (config.packed and config.block_m * config.block_n >= 64 * 64)
    return config != CUDNN and whole


@triton.jit
def filter_elements(start, CI: tl.constexpr, S: tl.constexpr, WIDTH: tl.constexpr):
    """Return (k, r, s, ci) of WIDTH elements of a filter from ``start``, each (1, WIDTH)."""
    k = (start + tl.arange(0, WIDTH))[None, :]
    return k, k // (S * CI), k // CI % S, k % CI


@triton.jit
def load_filters(
    weight_ptr, start, co, member, stride_co, stride_ci, stride_r, stride_s,
    CI: tl.constexpr, CO: tl.constexpr, OWN_CI: tl.constexpr, R: tl.constexpr, S: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Return the parameter's elements of filters ``co`` (rows, 1) from ``start``; 0 between members of a group."""
    k, r, s, ci = filter_elements(start, CI, S, WIDTH)
    own = (k < R * S * CI) & (co < CO) & (ci // OWN_CI == member)
    at = co.to(tl.int64) * stride_co + ((ci % OWN_CI) * stride_ci + r * stride_r + s * stride_s)
    return tl.load(weight_ptr + at, mask=own, other=0.0).to(tl.float32)


@triton.jit
def pack_forward_program(
    pid, counter_ptr, expected, weight_ptr, vectors_ptr, w_ptr, const_ptr, stride_co, stride_ci, stride_r, stride_s,
    CI: tl.constexpr, CO: tl.constexpr, GROUPS: tl.constexpr, OWN_CI: tl.constexpr, OWN_CO: tl.constexpr,
    R: tl.constexpr, S: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Pack ROWS filters. CI counts channels of a merged group, OWN_* those of a group before merging.

    ``counter_ptr``: where ``expected`` programs of this launch arrive once ``vectors`` are stored; None if they are
    older than the launch.
    """
    C: tl.constexpr = CI * GROUPS
    GEMM_N: tl.constexpr = CO // GROUPS
    co = (pid * ROWS + tl.arange(0, ROWS))[:, None]
    g, member = co // GEMM_N, co % GEMM_N // OWN_CO
    total = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
    w = load_filters(
        weight_ptr, 0, co, member, stride_co, stride_ci, stride_r, stride_s, CI, CO, OWN_CI, R, S, WIDTH
    )  # fmt: skip
    if counter_ptr is not None:
        wait(counter_ptr, expected)
    for start in range(0, R * S * CI, WIDTH):
        following = load_filters(
            weight_ptr, start + WIDTH, co, member, stride_co, stride_ci, stride_r, stride_s,
            CI, CO, OWN_CI, R, S, WIDTH,
        )  # fmt: skip
        k, _, _, ci = filter_elements(start, CI, S, WIDTH)
        real = (k < R * S * CI) & (co < CO)
        own = real & (ci // OWN_CI == member)
        # w = round(weight * FOLD); total += w * THR
        if vectors_ptr is not None:
            w *= tl.load(vectors_ptr + (FOLD * C + g * CI + ci), mask=own, other=0.0, cache_modifier=".cg")
        w = round_to(w, w_ptr.dtype.element_ty, UPCAST)
        tl.store(w_ptr + (co.to(tl.int64) * (R * S * CI) + k), w, mask=real)
        if vectors_ptr is not None:
            threshold = tl.load(vectors_ptr + (THR * C + g * CI + ci), mask=own, other=0.0, cache_modifier=".cg")
            total += w.to(tl.float32) * threshold
        w = following
    if vectors_ptr is not None:
        rows = pid * ROWS + tl.arange(0, ROWS)
        tl.store(const_ptr + rows, 0.0 - tl.sum(total, 1), mask=rows < CO)


@triton.jit(do_not_specialize=["counters", "programs"])
def _pack_forward_kernel(
    counters_ptr, counters, programs,
    weight_ptr, vectors_ptr, w_ptr, const_ptr, stride_co, stride_ci, stride_r, stride_s,
    weight_d_ptr, vectors_d_ptr, w_d_ptr, const_d_ptr, stride_co_d, stride_ci_d, stride_r_d, stride_s_d,
    CI: tl.constexpr, CO: tl.constexpr, GROUPS: tl.constexpr, OWN_CI: tl.constexpr, OWN_CO: tl.constexpr,
    R: tl.constexpr, S: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, UPCAST_W: tl.constexpr,
    CI_D: tl.constexpr, CO_D: tl.constexpr, GROUPS_D: tl.constexpr, OWN_CI_D: tl.constexpr, OWN_CO_D: tl.constexpr,
    R_D: tl.constexpr, S_D: tl.constexpr, ROWS_D: tl.constexpr, WIDTH_D: tl.constexpr, UPCAST_W_D: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    clear_in_first_program(counters_ptr, counters)
    if weight_ptr is not None:
        if pid < programs:
            pack_forward_program(
                pid, None, 0, weight_ptr, vectors_ptr, w_ptr, const_ptr, stride_co, stride_ci, stride_r, stride_s,
                CI, CO, GROUPS, OWN_CI, OWN_CO, R, S, ROWS, WIDTH, UPCAST_W,
            )  # fmt: skip
        else:
            if weight_d_ptr is not None:
                pack_forward_program(
                    pid - programs, None, 0, weight_d_ptr, vectors_d_ptr, w_d_ptr, const_d_ptr,
                    stride_co_d, stride_ci_d, stride_r_d, stride_s_d,
                    CI_D, CO_D, GROUPS_D, OWN_CI_D, OWN_CO_D, R_D, S_D, ROWS_D, WIDTH_D, UPCAST_W_D,
                )  # fmt: skip


@triton.jit
def pack_dgrad_program(
    pid, weight_ptr, a_ptr, wt_ptr, stride_co, stride_ci, stride_r, stride_s,
    CI: tl.constexpr, CO: tl.constexpr, GROUPS: tl.constexpr, OWN_CI: tl.constexpr, OWN_CO: tl.constexpr,
    R: tl.constexpr, S: tl.constexpr, TILE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Pack a tile of (co, ci) of a tap (r, s) of a merged group g, the slowest of the three."""
    GEMM_N: tl.constexpr = CO // GROUPS
    tiles_co: tl.constexpr = (GEMM_N + TILE - 1) // TILE
    tiles: tl.constexpr = tiles_co * ((CI + TILE - 1) // TILE)
    tile, tap, g = pid % tiles, pid // tiles % (R * S), pid // (tiles * R * S)
    r, s = tap // S, tap % S
    co = tile % tiles_co * TILE + tl.arange(0, TILE)
    ci = tile // tiles_co * TILE + tl.arange(0, TILE)
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


@triton.jit
def _pack_dgrad_kernel(
    weight_ptr, a_ptr, wt_ptr, stride_co, stride_ci, stride_r, stride_s,
    CI: tl.constexpr, CO: tl.constexpr, GROUPS: tl.constexpr, OWN_CI: tl.constexpr, OWN_CO: tl.constexpr,
    R: tl.constexpr, S: tl.constexpr, UPCAST_W: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    pack_dgrad_program(
        tl.program_id(0), weight_ptr, a_ptr, wt_ptr, stride_co, stride_ci, stride_r, stride_s,
        CI, CO, GROUPS, OWN_CI, OWN_CO, R, S, TILE, UPCAST_W,
    )  # fmt: skip


_GEOMETRY = dict.fromkeys(("CI", "CO", "GROUPS", "OWN_CI", "OWN_CO", "R", "S"), 1) | {"UPCAST_W": False}

NO_FORWARD = Passenger(0, (None, None, None, None, 1, 1, 1, 1), {**_GEOMETRY, "ROWS": 1, "WIDTH": 1})
NO_DGRAD = Passenger(0, (None, None, None, 1, 1, 1, 1), {**_GEOMETRY, "TILE": 1})
"""Passengers of a launch that takes none along."""


def _geometry(conv: ConvSpec, dtype: torch.dtype) -> dict[str, Any]:
    groups = merged_groups(conv)
    return {
        "CI": conv.ci // groups, "CO": conv.co, "GROUPS": groups,
        "OWN_CI": conv.ci // conv.groups, "OWN_CO": conv.co // conv.groups,
        "R": conv.r, "S": conv.s, "UPCAST_W": upcasts(dtype),
    }  # fmt: skip


def is_packed(weight: Tensor, dtype: torch.dtype, conv: ConvSpec) -> bool:
    """Return whether a weight that needs no factor is as the kernels read it."""
    same = merged_groups(conv) == conv.groups and weight.dtype == dtype
    return same and weight.permute(0, 2, 3, 1).is_contiguous()


def forward_passenger(
    weight: Tensor, dtype: torch.dtype, conv: ConvSpec, rows: Tensor | None
) -> tuple[Tensor, Tensor | None, Passenger]:
    """Return (w, const, the programs that write them); arguments and results as of :func:`pack_forward`.

    ``rows``: ``vectors`` (10, C) of the norm before the convolution if the prologue is packed, otherwise None.
    """
    weight = weight.detach()
    if rows is None and is_packed(weight, dtype, conv):
        return weight.permute(0, 2, 3, 1), None, NO_FORWARD
    ci = conv.ci // merged_groups(conv)
    w = weight.new_empty((conv.co, conv.r, conv.s, ci), dtype=dtype)
    const = weight.new_empty(conv.co, dtype=torch.float32) if rows is not None else None
    width = min(BLOCK, triton.next_power_of_2(conv.r * conv.s * ci))
    per_program = max(1, min(BLOCK // width, triton.next_power_of_2(conv.co // PROGRAMS)))
    constants = {**_geometry(conv, dtype), "ROWS": per_program, "WIDTH": width}
    return w, const, Passenger(-(-conv.co // per_program), (weight, rows, w, const, *weight.stride()), constants)


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
    rows = act.vectors if act is not None and act.clamp is not None else None
    w, const, own = forward_passenger(weight, dtype, conv, rows)
    launch([own])
    return w, const


def launch(passengers: Sequence[Passenger], counters: Tensor | None = None) -> None:
    """Launch up to two of :func:`forward_passenger` that no other launch takes along, and clear ``counters``."""
    wanted = [p for p in passengers if p.programs]
    if not wanted and counters is None:
        return
    first, second = [*wanted, NO_FORWARD, NO_FORWARD][:2]
    submit(
        _pack_forward_kernel, (max(1, first.programs + second.programs),),
        counters, 0 if counters is None else counters.numel(), first.programs, *first.arguments, *second.arguments,
        **first.constants, **{f"{name}_D": value for name, value in second.constants.items()},
    )  # fmt: skip


def dgrad_passenger(
    weight: Tensor, dtype: torch.dtype, conv: ConvSpec, a: Tensor | None, tile: int = TILE
) -> tuple[Tensor, Passenger]:
    """Return (wt, the programs that write it); arguments and results as of :func:`pack_dgrad`.

    ``tile``: side of a program's tile of channels; :func:`tile_behind` for a launch of other programs.
    """
    weight, groups = weight.detach(), merged_groups(conv)
    ci, co = conv.ci // groups, conv.co // groups
    wt = weight.new_empty((conv.ci, conv.r, conv.s, co), dtype=dtype)
    programs = -(-ci // tile) * -(-co // tile) * conv.r * conv.s * groups
    return wt, Passenger(programs, (weight, a, wt, *weight.stride()), {**_geometry(conv, dtype), "TILE": tile})


def pack_dgrad(weight: Tensor, dtype: torch.dtype, conv: ConvSpec, a: Tensor | None) -> Tensor:
    """Pack a weight for the input's gradient.

    Args:
        weight: (Co, Ci/groups, R, S), any strides.
        dtype: of the result.
        conv: the convolution.
        a: row SCALE of ``vectors`` of the norm behind it, (Co,) fp32, for a packed prologue; otherwise None.

    Returns:
        The weight (Ci, R, S, Co/merged groups), dense in ``dtype``.
    """
    wt, own = dgrad_passenger(weight, dtype, conv, a)
    submit(_pack_dgrad_kernel, (own.programs,), *own.arguments, **own.constants)
    return wt
