r"""Gradients of the parameters behind folded weights: the splits of each wgrad, added up and multiplied out.

With g the gradient of a folded convolution's output, folded_convolution.py leaves for every split of the pixels

    P[co, k] = sum_m g[m, co] * x[m, k]          k = (r, s, ci), the gradient of the folded weight
    Q[co]    = sum_m g[m, co]

and here, with the vectors of fold.py (SCALE = gamma * INVSTD, CENTRE = mean - bias),

    dW[co, k] = SCALE[co] * P[co, k]
    dbeta[co] = Q[co]
    dbias[co] = SCALE[co] * Q[co]
    dgamma[co] = sum_m g * xhat = INVSTD * ( sum_k P[co, k] * weight[co, k]  -  CENTRE * Q[co] )

The last line is BatchNorm's sum over pixels without the raw output y, because the sums may be exchanged:

    sum_m g[m] * conv[m] = sum_m g[m] * sum_k x[m, k] * weight[k] = sum_k weight[k] * sum_m g[m] * x[m, k]

So nothing of y's size is kept or read for gamma: P is there for dW, and a filter has far fewer elements than a channel
has pixels. It needs a wgrad also where gamma is trained and the weight is not; docs/notes/frozen-training.md counts the
other ways. Where neither is trained, there is no P.

      P, a split      k ->                   one program per filter: WIDTH elements of SPLITS splits at once, then the
      +-------------------------+            next splits, then the next WIDTH. So a filter's sum for gamma stays in the
      | co : program            |            program: no atomics, no second launch
      +-------------------------+

Saved launches. One launch serves all convolutions of a call, up to four, as in fold.py.

Numerics: fp32, in an order that only the shapes decide. gamma's sum uses the parameter, which the products saw rounded.
Alone: ``TRITON_INTERPRET=1 python -m pytest tests/backends/triton/training/test_frozen_chain.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ....spec import ConvSpec
from ..launch import submit
from ..tiles import store_rounded
from .fold import CENTRE, INVSTD, PARTS, SCALE
from .folded_convolution import Sums

_SCALE, _INVSTD, _CENTRE = tl.constexpr(SCALE), tl.constexpr(INVSTD), tl.constexpr(CENTRE)

WIDTH = 512
"""Most elements of a filter that a program takes at once."""

ELEMENTS = 2048
"""Elements of all splits that a program has in flight: 16 per thread."""


class Wanted(NamedTuple):
    """A convolution's partial sums, and what its gradients need.

    Attributes:
        conv: the convolution.
        weight: the parameter (Co, Ci/groups, R, S).
        vectors: (3, Co) of :func:`.fold.fold`.
        sums: P and Q of their splits, :class:`.folded_convolution.Sums`.
        dw, dgamma, dbeta, dbias: what to write, in the dtype of each parameter; None where it is not wanted.
    """

    conv: ConvSpec
    weight: Tensor
    vectors: Tensor
    sums: Sums
    dw: Tensor | None
    dgamma: Tensor | None
    dbeta: Tensor | None
    dbias: Tensor | None


@triton.jit
def _gradient_program(
    co, weight_ptr, vectors_ptr, p_ptr, q_ptr, dw_ptr, dgamma_ptr, dbeta_ptr, dbias_ptr, splits, sums,
    GEOMETRY: tl.constexpr,
):  # fmt: skip
    """Write the gradients of filter ``co``, from ``splits`` of P and ``sums`` of Q."""
    CI: tl.constexpr = GEOMETRY[0]
    CO: tl.constexpr = GEOMETRY[1]
    GEMM_N: tl.constexpr = GEOMETRY[1] // GEOMETRY[2]
    OWN_CI: tl.constexpr = GEOMETRY[3]
    OWN_CO: tl.constexpr = GEOMETRY[4]
    S: tl.constexpr = GEOMETRY[6]
    COLUMNS: tl.constexpr = GEOMETRY[0] * GEOMETRY[5] * GEOMETRY[6]
    WIDTH: tl.constexpr = GEOMETRY[7]
    SPLITS: tl.constexpr = GEOMETRY[8]
    scale = tl.load(vectors_ptr + _SCALE * CO + co)
    by_gamma = tl.zeros((WIDTH,), dtype=tl.float32)
    part = tl.arange(0, SPLITS)
    if p_ptr is not None:
        for start in range(0, COLUMNS, WIDTH):
            k = start + tl.arange(0, WIDTH)
            ci = k % CI
            own = k < COLUMNS
            if OWN_CI < CI:  # of other members of a merged group nothing is wanted
                own = own & (ci // OWN_CI == co % GEMM_N // OWN_CO)
            # dWf = sum of P over the splits
            p = tl.zeros((WIDTH,), dtype=tl.float32)
            for first in range(0, splits, SPLITS):
                rows = ((first + part).to(tl.int64) * CO + co) * COLUMNS
                mask = (first + part < splits)[:, None] & own[None, :]
                p += tl.sum(tl.load(p_ptr + (rows[:, None] + k[None, :]), mask=mask, other=0.0).to(tl.float32), 0)
            r, s = k // (S * CI), k // CI % S
            if dw_ptr is not None:
                at = co.to(tl.int64) * GEOMETRY[13] + (ci % OWN_CI * GEOMETRY[14] + r * GEOMETRY[15] + s * GEOMETRY[16])
                store_rounded(dw_ptr + at, p * scale, own)
            if dgamma_ptr is not None:
                at = co.to(tl.int64) * GEOMETRY[9] + (ci % OWN_CI * GEOMETRY[10] + r * GEOMETRY[11] + s * GEOMETRY[12])
                by_gamma += p * tl.load(weight_ptr + at, mask=own, other=0.0).to(tl.float32)
    if q_ptr is not None:
        SUMS: tl.constexpr = GEOMETRY[17]
        row = tl.arange(0, SUMS)
        total = tl.zeros((SUMS,), dtype=tl.float32)
        for first in range(0, sums, SUMS):
            total += tl.load(q_ptr + (first + row) * CO + co, mask=first + row < sums, other=0.0)
        q = tl.sum(total, 0)
        if dgamma_ptr is not None:
            invstd, centre = tl.load(vectors_ptr + _INVSTD * CO + co), tl.load(vectors_ptr + _CENTRE * CO + co)
            store_rounded(dgamma_ptr + co, invstd * (tl.sum(by_gamma, 0) - centre * q), None)
        if dbeta_ptr is not None:
            store_rounded(dbeta_ptr + co, q, None)
        if dbias_ptr is not None:
            store_rounded(dbias_ptr + co, scale * q, None)


@triton.jit(do_not_specialize=[
    "splits_0", "sums_0", "splits_1", "sums_1", "splits_2", "sums_2", "splits_3", "sums_3",
])  # fmt: skip
def _fold_gradient_kernel(
    weight_0, vectors_0, p_0, q_0, dw_0, dgamma_0, dbeta_0, dbias_0, splits_0, sums_0,
    weight_1, vectors_1, p_1, q_1, dw_1, dgamma_1, dbeta_1, dbias_1, splits_1, sums_1,
    weight_2, vectors_2, p_2, q_2, dw_2, dgamma_2, dbeta_2, dbias_2, splits_2, sums_2,
    weight_3, vectors_3, p_3, q_3, dw_3, dgamma_3, dbeta_3, dbias_3, splits_3, sums_3,
    PART_0: tl.constexpr, PART_1: tl.constexpr, PART_2: tl.constexpr, PART_3: tl.constexpr,
    END_0: tl.constexpr, END_1: tl.constexpr, END_2: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    if pid < END_0:
        _gradient_program(
            pid, weight_0, vectors_0, p_0, q_0, dw_0, dgamma_0, dbeta_0, dbias_0, splits_0, sums_0, PART_0
        )  # fmt: skip
    elif pid < END_1:
        if vectors_1 is not None:
            _gradient_program(
                pid - END_0, weight_1, vectors_1, p_1, q_1, dw_1, dgamma_1, dbeta_1, dbias_1, splits_1, sums_1,
                PART_1,
            )  # fmt: skip
    elif pid < END_2:
        if vectors_2 is not None:
            _gradient_program(
                pid - END_1, weight_2, vectors_2, p_2, q_2, dw_2, dgamma_2, dbeta_2, dbias_2, splits_2, sums_2,
                PART_2,
            )  # fmt: skip
    else:
        if vectors_3 is not None:
            _gradient_program(
                pid - END_2, weight_3, vectors_3, p_3, q_3, dw_3, dgamma_3, dbeta_3, dbias_3, splits_3, sums_3,
                PART_3,
            )  # fmt: skip


def fold_gradients(wanted: Sequence[Wanted]) -> None:
    """Write the gradients of up to four convolutions and their norms, in one launch."""
    if not wanted:
        return
    arguments: list[Any] = []
    parts: list[tuple[int, ...]] = []
    ends: list[int] = []
    for one in wanted:
        conv, (p, q) = one.conv, one.sums
        columns, splits = (0, 0) if p is None else (p.shape[2], p.shape[0])
        sums = 0 if q is None else q.shape[0]
        # of merged groups, or of the convolution's own
        ci = columns // (conv.r * conv.s) if columns else conv.ci // conv.groups
        groups = conv.ci // ci
        width = min(WIDTH, triton.next_power_of_2(max(1, columns)))
        at_once = min(ELEMENTS // width, triton.next_power_of_2(max(1, splits)))
        sums_at_once = min(ELEMENTS, triton.next_power_of_2(max(1, sums)))
        to = one.weight if one.dw is None else one.dw
        own = (ci, conv.co, groups, conv.ci // conv.groups, conv.co // conv.groups, conv.r, conv.s)
        parts.append((*own, width, at_once, *one.weight.stride(), *to.stride(), sums_at_once))
        gradients = (one.dw, one.dgamma, one.dbeta, one.dbias)
        arguments += [one.weight.detach(), one.vectors, p, q, *gradients, splits, sums]
        ends.append((ends[-1] if ends else 0) + conv.co)
    missing = PARTS - len(parts)
    arguments += [*[None] * 8, 0, 0] * missing
    parts += [(0,) * len(parts[0])] * missing
    ends += [ends[-1]] * missing
    submit(
        _fold_gradient_kernel, (ends[-1],), *arguments,
        **{f"PART_{i}": part for i, part in enumerate(parts)}, **{f"END_{i}": end for i, end in enumerate(ends[:-1])},
    )  # fmt: skip
