r"""Weights of a training call whose norms all have constant statistics: a norm is a factor and a constant per channel.

    bn(conv(x, w) + bias) = conv(x, SCALE*w) + const            const = beta - CENTRE * SCALE
    SCALE = gamma * INVSTD     INVSTD = 1 / sqrt(var + eps)     CENTRE = mean - bias

    forward   w[co, r, s, ci]  = round(weight[co, ci, r, s] * SCALE[co])      read by the kernels of inference
    backward  wt[ci, r, s, co] = round(weight[co, ci, r, s] * SCALE[co])      read by conv_dgrad.py, without a prologue

    weight (Co, Ci/groups, R, S), the parameter: any strides, fp32 or 16 bit     const (Co) fp32
    w (Co, R, S, Ci/g)   wt (Ci, R, S, Co/g)   dense, in the activations' dtype; g: merged groups, tuning/routes.py

The weights change at every step, and gamma and beta may, so they are folded at every step. The factors of the forward
pass are kept for the backward pass (3 vectors), because running statistics may change in between.

Saved bytes. A stock norm with constant statistics is a kernel of its own, which reads and writes the convolution's
output, forward and backward (BatchNorm2d), or two of them (FrozenBatchNorm2d). Here none of that size moves.

Saved launches. One launch folds all convolutions of a call, up to four. A program takes one of them; which one, the
compiler knows from its number. Where the last convolution's kernel also multiplies the projection, its constant is the
sum of both norms' (conv_bn_act_1x1.py).

      programs   [ last convolution | projection | first | second ]      forward: a few filters a program
                 [ last convolution | projection | first | second | g ]  backward: a tile of a tap a program, pack.py

In the backward pass the launch also applies the mask of the call's last ReLU, which needs no weight:

    g[i] = dz[i] where z[i] > 0, else 0          any order of elements, the same in all three; NaN in z passes

Numerics: as batch_norm.py computes a scale; one rounding of a weight, which autocast would make too.
Alone: ``TRITON_INTERPRET=1 python -m pytest tests/backends/triton/training/test_frozen_chain.py``.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....calls import Conv, Norm
from ....spec import ConvSpec
from ....tuning.routes import merged_groups
from ..launch import submit, upcasts
from ..tiles import load_optional, round_to, store_rounded
from .pack import BLOCK, PROGRAMS, TILE, filter_elements, load_filters, pack_dgrad_program
from .passes import THREADS, empty_image

SCALE, INVSTD, CENTRE = range(3)
"""Rows of a fold's ``vectors`` (3, C) fp32."""

_SCALE, _INVSTD, _CENTRE = tl.constexpr(SCALE), tl.constexpr(INVSTD), tl.constexpr(CENTRE)

PARTS = 4
"""Most convolutions of a call: three of a bottleneck and its projection."""

NOTHING = (0,) * 13
"""The geometry of a part that a call does not have."""


class Folded(NamedTuple):
    """A folded convolution: ``w`` for the forward kernels, ``const`` (Co), and ``vectors`` (3, Co) fp32.

    ``const`` is fp32 for our kernels. PyTorch's take it in the dtype of ``w``.
    """

    w: Tensor
    const: Tensor
    vectors: Tensor


@triton.jit
def _norm_of_filters(gamma_ptr, beta_ptr, mean_ptr, var_ptr, bias_ptr, eps, co, mask):
    """Return (scale, invstd, centre, const) of filters ``co``."""
    invstd = tl.div_rn(1.0, tl.sqrt_rn(load_optional(var_ptr, co, mask, 1.0) + eps))
    scale = load_optional(gamma_ptr, co, mask, 1.0) * invstd
    centre = load_optional(mean_ptr, co, mask, 0.0) - load_optional(bias_ptr, co, mask, 0.0)
    return scale, invstd, centre, load_optional(beta_ptr, co, mask, 0.0) - centre * scale


@triton.jit
def _fold_program(
    pid, weight_ptr, gamma_ptr, beta_ptr, mean_ptr, var_ptr, bias_ptr, eps, w_ptr, const_ptr, vectors_ptr,
    gamma_2, beta_2, mean_2, var_2, bias_2, eps_2,
    GEOMETRY: tl.constexpr, JOINED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Fold ROWS filters. JOINED: add the constant of the second norm."""
    CI: tl.constexpr = GEOMETRY[0]
    CO: tl.constexpr = GEOMETRY[1]
    GROUPS: tl.constexpr = GEOMETRY[2]
    OWN_CI: tl.constexpr = GEOMETRY[3]
    OWN_CO: tl.constexpr = GEOMETRY[4]
    R: tl.constexpr = GEOMETRY[5]
    S: tl.constexpr = GEOMETRY[6]
    ROWS: tl.constexpr = GEOMETRY[7]
    WIDTH: tl.constexpr = GEOMETRY[8]
    GEMM_N: tl.constexpr = CO // GROUPS
    rows = pid * ROWS + tl.arange(0, ROWS)
    scale, invstd, centre, const = _norm_of_filters(
        gamma_ptr, beta_ptr, mean_ptr, var_ptr, bias_ptr, eps, rows, rows < CO
    )
    if JOINED:
        # no name twice in a program: the compiler takes what a later loop assigns too for a variable of that loop
        other = _norm_of_filters(gamma_2, beta_2, mean_2, var_2, bias_2, eps_2, rows, rows < CO)
        const += other[3]
    store_rounded(const_ptr + rows, const, rows < CO)
    tl.store(vectors_ptr + _SCALE * CO + rows, scale, mask=rows < CO)
    tl.store(vectors_ptr + _INVSTD * CO + rows, invstd, mask=rows < CO)
    tl.store(vectors_ptr + _CENTRE * CO + rows, centre, mask=rows < CO)
    co = rows[:, None]
    member = co % GEMM_N // OWN_CO
    for start in range(0, R * S * CI, WIDTH):
        w = load_filters(
            weight_ptr, start, co, member, GEOMETRY[9], GEOMETRY[10], GEOMETRY[11], GEOMETRY[12],
            CI, CO, OWN_CI, R, S, WIDTH,
        )  # fmt: skip
        k, _, _, ci = filter_elements(start, CI, S, WIDTH)
        # zeros between the members of a group stay zeros, whatever the scale is
        w = tl.where(ci // OWN_CI == member, w * scale[:, None], 0.0)
        at = co.to(tl.int64) * (R * S * CI) + k
        tl.store(w_ptr + at, round_to(w, w_ptr.dtype.element_ty, UPCAST), mask=(k < R * S * CI) & (co < CO))


@triton.jit(do_not_specialize=["eps_0", "eps_1", "eps_2", "eps_3"])
def _fold_kernel(
    weight_0, gamma_0, beta_0, mean_0, var_0, bias_0, eps_0, w_0, const_0, vectors_0,
    weight_1, gamma_1, beta_1, mean_1, var_1, bias_1, eps_1, w_1, const_1, vectors_1,
    weight_2, gamma_2, beta_2, mean_2, var_2, bias_2, eps_2, w_2, const_2, vectors_2,
    weight_3, gamma_3, beta_3, mean_3, var_3, bias_3, eps_3, w_3, const_3, vectors_3,
    PART_0: tl.constexpr, PART_1: tl.constexpr, PART_2: tl.constexpr, PART_3: tl.constexpr,
    END_0: tl.constexpr, END_1: tl.constexpr, END_2: tl.constexpr, JOINED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    if pid < END_0:
        _fold_program(
            pid, weight_0, gamma_0, beta_0, mean_0, var_0, bias_0, eps_0, w_0, const_0, vectors_0,
            gamma_1, beta_1, mean_1, var_1, bias_1, eps_1, PART_0, JOINED, UPCAST,
        )  # fmt: skip
    elif pid < END_1:
        if weight_1 is not None:
            _fold_program(
                pid - END_0, weight_1, gamma_1, beta_1, mean_1, var_1, bias_1, eps_1, w_1, const_1, vectors_1,
                None, None, None, None, None, 0.0, PART_1, False, UPCAST,
            )  # fmt: skip
    elif pid < END_2:
        if weight_2 is not None:
            _fold_program(
                pid - END_1, weight_2, gamma_2, beta_2, mean_2, var_2, bias_2, eps_2, w_2, const_2, vectors_2,
                None, None, None, None, None, 0.0, PART_2, False, UPCAST,
            )  # fmt: skip
    else:
        if weight_3 is not None:
            _fold_program(
                pid - END_2, weight_3, gamma_3, beta_3, mean_3, var_3, bias_3, eps_3, w_3, const_3, vectors_3,
                None, None, None, None, None, 0.0, PART_3, False, UPCAST,
            )  # fmt: skip


def _channels(conv: ConvSpec) -> tuple[int, ...]:
    """Return CI, CO, GROUPS, OWN_CI, OWN_CO, R and S of a convolution: of merged groups, and of its own."""
    groups = merged_groups(conv)
    return conv.ci // groups, conv.co, groups, conv.ci // conv.groups, conv.co // conv.groups, conv.r, conv.s


def _ends(programs: Sequence[int]) -> list[int]:
    """Return the number of the first program after each part."""
    return [sum(programs[: i + 1]) for i in range(len(programs))]


def _order(count: int, projection: bool) -> list[int]:
    """Return the places of a call's convolutions in the order of the parts: the last, the projection, the others.

    -1 for a part that the call does not have.
    """
    last = count - 1 - projection
    found = [last, count - 1 if projection else -1, *range(last)]
    return found + [-1] * (PARTS - len(found))


def fold(
    convs: Sequence[Conv], norms: Sequence[Norm], specs: Sequence[ConvSpec], projection: bool, joined: bool,
    dtype: torch.dtype, stock: Collection[int] = (),
) -> list[Folded]:  # fmt: skip
    """Fold the norms of a call into its weights, in one launch.

    Args:
        convs, norms, specs: of the call, at most four; a norm has constant statistics, or is absent.
        projection: whether the last of them is on the shortcut.
        joined: whether its constant is added to that of the residual branch's last convolution.
        dtype: of the activations.
        stock: the places of those that PyTorch's kernels run.

    Returns:
        A folded convolution for each.
    """
    found = []
    arguments: list[Any] = []
    parts, programs = [], []
    for i, (conv, spec) in enumerate(zip(convs, specs, strict=True)):
        new = conv.weight.new_empty
        shape = (spec.co, spec.r, spec.s, spec.ci // merged_groups(spec))
        vectors = new((3, spec.co), dtype=torch.float32)
        const = new(spec.co, dtype=dtype if i in stock else torch.float32)
        found.append(Folded(new(shape, dtype=dtype), const, vectors))
    for i in _order(len(convs), projection):
        if i < 0:
            arguments += [*[None] * 6, 0.0, None, None, None]
            parts.append(NOTHING)
            programs.append(0)
            continue
        conv, norm, spec = convs[i], norms[i], specs[i]
        given = norm.mean is not None and norm.var is not None
        width = min(BLOCK, triton.next_power_of_2(spec.r * spec.s * spec.ci // merged_groups(spec)))
        rows = max(1, min(BLOCK // width, triton.next_power_of_2(spec.co // PROGRAMS)))
        statistics = (norm.mean, norm.var) if given else (None, None)
        arguments += _dense(conv.weight, norm.weight, norm.bias, *statistics, conv.bias)
        arguments += [norm.eps if given else 0.0, *found[i]]
        parts.append((*_channels(spec), rows, width, *conv.weight.stride()))
        programs.append(-(-spec.co // rows))
    ends = _ends(programs)
    submit(
        _fold_kernel, (ends[-1],), *arguments,
        **{f"PART_{i}": part for i, part in enumerate(parts)}, **{f"END_{i}": end for i, end in enumerate(ends[:-1])},
        JOINED=joined, UPCAST=upcasts(dtype),
    )  # fmt: skip
    return found


def _dense(weight: Tensor, *vectors: Tensor | None) -> list[Tensor | None]:
    return [weight.detach(), *[None if v is None else v.detach().contiguous() for v in vectors]]


@triton.jit
def _transpose_program(
    pid, weight_ptr, vectors_ptr, wt_ptr, GEOMETRY: tl.constexpr, BLOCK: tl.constexpr, UPCAST: tl.constexpr
):
    pack_dgrad_program(
        pid, weight_ptr, vectors_ptr + _SCALE * GEOMETRY[1], wt_ptr,
        GEOMETRY[7], GEOMETRY[8], GEOMETRY[9], GEOMETRY[10],
        GEOMETRY[0], GEOMETRY[1], GEOMETRY[2], GEOMETRY[3], GEOMETRY[4], GEOMETRY[5], GEOMETRY[6], BLOCK, UPCAST,
    )  # fmt: skip


@triton.jit  # specialized for ``elements``: 16-byte accesses need to know that 16 divides it
def _transpose_kernel(
    weight_0, vectors_0, wt_0, weight_1, vectors_1, wt_1, weight_2, vectors_2, wt_2, weight_3, vectors_3, wt_3,
    dz_ptr, z_ptr, g_ptr, elements,
    PART_0: tl.constexpr, PART_1: tl.constexpr, PART_2: tl.constexpr, PART_3: tl.constexpr,
    END_0: tl.constexpr, END_1: tl.constexpr, END_2: tl.constexpr, END_3: tl.constexpr,
    TILE: tl.constexpr, RUN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    if pid < END_0:
        if weight_0 is not None:
            _transpose_program(pid, weight_0, vectors_0, wt_0, PART_0, TILE, UPCAST)
    elif pid < END_1:
        if weight_1 is not None:
            _transpose_program(pid - END_0, weight_1, vectors_1, wt_1, PART_1, TILE, UPCAST)
    elif pid < END_2:
        if weight_2 is not None:
            _transpose_program(pid - END_1, weight_2, vectors_2, wt_2, PART_2, TILE, UPCAST)
    elif pid < END_3:
        if weight_3 is not None:
            _transpose_program(pid - END_2, weight_3, vectors_3, wt_3, PART_3, TILE, UPCAST)
    else:
        if z_ptr is not None:
            # g = dz where z passes
            first = (pid - END_3).to(tl.int64) * RUN
            at = tl.arange(0, RUN)
            mask = at < elements - first
            dz = tl.load(dz_ptr + first + at, mask=mask, other=0.0)
            z = tl.load(z_ptr + first + at, mask=mask, other=0.0).to(tl.float32)
            tl.store(g_ptr + first + at, tl.where(z <= 0.0, 0.0, dz), mask=mask)


def begin_backward(
    convs: Sequence[Conv], specs: Sequence[ConvSpec], vectors: Sequence[Tensor], wanted: Sequence[bool],
    dz: Tensor, z: Tensor | None,
) -> tuple[list[Tensor | None], Tensor]:  # fmt: skip
    """Fold the weights of a call's dgrads, and apply the mask of its last ReLU, in one launch.

    Args:
        convs, specs: of the call.
        vectors: (3, Co) of :func:`fold` for each convolution.
        wanted: whether a dgrad of it runs.
        dz: gradient of the call's output (N, C, H, W), dense NHWC.
        z: the output, dense NHWC; None where no ReLU follows.

    Returns:
        For each convolution the weight (Ci, R, S, Co/merged groups), dense in the dtype of ``dz``, or None; and the
        gradient in front of the ReLU, ``dz`` itself without one.
    """
    wts: list[Tensor | None] = []
    arguments: list[Any] = []
    parts, programs = [], []
    for conv, spec, own, needed in zip(convs, specs, vectors, wanted, strict=True):
        if not needed:
            wts.append(None)
            continue
        geometry = _channels(spec)
        ci, gemm_n, taps = geometry[0], spec.co // geometry[2], spec.r * spec.s
        wt = conv.weight.new_empty((spec.ci, spec.r, spec.s, gemm_n), dtype=dz.dtype)
        wts.append(wt)
        arguments += [conv.weight.detach(), own, wt]
        parts.append((*geometry, *conv.weight.stride()))
        programs.append(-(-ci // TILE) * -(-gemm_n // TILE) * taps * geometry[2])
    missing = PARTS - len(parts)
    ends = _ends([*programs, *[0] * missing])
    g = dz if z is None else empty_image(dz)
    run = THREADS * 4 * 16 // dz.element_size()
    masks = 0 if z is None else -(-dz.numel() // run)
    if ends[-1] + masks:
        submit(
            _transpose_kernel, (ends[-1] + masks,), *arguments, *[None] * (3 * missing),
            None if z is None else dz, z, None if z is None else g, dz.numel(),
            **{f"PART_{i}": part for i, part in enumerate([*parts, *[NOTHING] * missing])},
            **{f"END_{i}": end for i, end in enumerate(ends)}, TILE=TILE, RUN=run, UPCAST=upcasts(dz.dtype),
        )  # fmt: skip
    return wts, g
