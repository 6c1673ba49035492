"""``bn_act`` on the native CUDA kernels: inference in one pass, training in passes of csrc/kernels/bn_act.cu and
bn_act_bwd.cu.

    inference   y = act(x * scale + shift + residual), scale and shift from the running statistics (folding.py)
    forward     vectors = statistics of x; the same map with their first two rows
    backward    gradients = sums of g and g * xhat; dx = A*g + B*x + C, and g where the residual wants its gradient

Without a residual the backward reads no output: where the ReLU let pass is told from x, bit for bit as in the forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import folding
from ...calls import BnActCall, Leaves, Norm
from ...spec import PointwiseSpec, Verdict
from ..layouts import in_layout, nhwc
from ..refusals import dtype_among

DTYPES = ("float32", "float16", "bfloat16")

SCALE, SHIFT, MEAN, INVSTD, VAR, M2 = range(6)
"""Rows of ``vectors`` (6, C) fp32: ``NormRow`` in csrc/kernels/include/resnet_fast/bn_act.h."""

DGAMMA, DBETA, A, B, C = range(5)
"""Rows of ``gradients`` (1, 5, C) fp32: ``GradRow``."""

PLAN = "BatchNorm, add and ReLU in one pass each way, statistics and sums before it"

native: Any = torch.ops.resnet_fast_native


def _aligned(t: Tensor) -> Tensor:
    return t if t.data_ptr() % 16 == 0 else t.clone()


def _nhwc(t: Tensor) -> Tensor:
    """Dense in NHWC on a 16-byte boundary, as the kernels read it; ``t`` itself if it is."""
    return _aligned(nhwc(t.detach()))


def _maybe_nhwc(t: Tensor | None) -> Tensor | None:
    return None if t is None else _nhwc(t)


def _vector(t: Tensor | None) -> Tensor | None:
    return None if t is None else _aligned(t.detach().float().contiguous())


def verdict(spec: PointwiseSpec) -> Verdict:
    """Can the kernels run the problem?"""
    known = dtype_among(spec, DTYPES)
    if not known:
        return known
    if spec.sync:
        return Verdict.no("statistics of this process alone", "SyncBatchNorm", "use backend 'triton'")
    if (spec.grad or spec.batch_stats) and not all(spec.out_shape()):
        return Verdict.no("at least one element to train on", str(spec), "drop empty batches")
    if max(spec.n * spec.h * spec.w, spec.c) >= 2**31 - 1024:
        return Verdict.no("fewer than 2^31 pixels and channels", str(spec), "split the batch")
    return Verdict.yes()


def prepare(call: BnActCall, spec: PointwiseSpec, earlier: list[Tensor]) -> Tensor:
    """(2, C) fp32: scale and shift of the norm."""
    return earlier[0] if earlier else torch.stack(folding.scale_shift(call.norm, spec.c, call.x.device))


def bn_act(call: BnActCall, spec: PointwiseSpec, state: Tensor) -> Tensor:
    """act(bn(x) + residual), NHWC."""
    return native.bn_act_fwd(_nhwc(call.x), state, _maybe_nhwc(call.residual), None, call.relu)


def _constant(norm: Norm, channels: int, device: torch.device) -> Tensor:
    """``vectors`` of a norm on constant statistics, or of an absent one."""
    vectors = torch.zeros((6, channels), dtype=torch.float32, device=device)
    vectors[SCALE], vectors[SHIFT] = folding.scale_shift(norm, channels, device)
    vectors[INVSTD] = 1.0
    if norm.mean is not None and norm.var is not None:
        vectors[MEAN] = norm.mean.detach()
        vectors[INVSTD] = torch.rsqrt(norm.var.detach().double() + norm.eps)
    return vectors


def forward(call: BnActCall, spec: PointwiseSpec, save: str) -> tuple[Tensor, list[Tensor], str]:
    """(output, [vectors], plan)."""
    norm = call.norm
    x = _nhwc(call.x)
    if norm.batch_stats:
        vectors = native.bn_act_stats(x, _vector(norm.weight), _vector(norm.bias), norm.eps)
    else:
        vectors = _constant(norm, spec.c, x.device)
    y = native.bn_act_fwd(x, vectors[: SHIFT + 1], _maybe_nhwc(call.residual), None, call.relu)
    return in_layout(y, spec.layout), [vectors], PLAN


def statistics(call: BnActCall, saved: list[Tensor]) -> list[tuple[Tensor, Tensor] | None]:
    """The batch's (mean, unbiased variance), None with constant statistics."""
    (vectors,) = saved
    return [(vectors[MEAN], vectors[VAR]) if call.norm.batch_stats else None]


def shapes(call: BnActCall, spec: PointwiseSpec, save: str) -> list[tuple[tuple[int, ...], torch.dtype, str]]:
    """(shape, dtype, layout) of every tensor in ``saved``."""
    return [((6, spec.c), torch.float32, "")]


def backward(call: BnActCall, spec: PointwiseSpec, saved: list[Tensor], y: Tensor, dy: Tensor, needs: Leaves) -> Leaves:
    """The gradients that ``needs`` asks for."""
    (vectors,), norm, x, dy = saved, call.norm, _nhwc(call.x), _nhwc(dy)
    from_y = call.relu and call.residual is not None
    out = _nhwc(y) if from_y else None
    batch, gamma, beta = norm.batch_stats, bool(needs.gammas[0]), bool(needs.betas[0])
    if gamma or beta or (batch and needs.x):
        gradients = native.bn_act_bwd_sums(dy, out, x, vectors, None, None, call.relu, batch)
    else:  # dx = scale * g
        gradients = vectors.new_zeros((1, 5, spec.c))
        gradients[0, A] = vectors[SCALE]
    dx = given = None
    wants_g = bool(needs.given) and call.relu
    if needs.x or wants_g:
        reads_x = (batch and needs.x) or (call.relu and not from_y)
        dx, given = native.bn_act_bwd(
            dy, out, x if reads_x else None, vectors, gradients, None, call.relu, bool(needs.x), wants_g
        )
    if needs.given and not call.relu:
        given = dy.clone()  # an op's outputs are its own
    return Leaves(
        in_layout(dx, spec.layout) if dx is not None and needs.x else None,
        in_layout(given, spec.layout) if given is not None and needs.given else None,
        (),
        (),
        (gradients[0, DGAMMA].to(norm.weight.dtype) if gamma and norm.weight is not None else None,),
        (gradients[0, DBETA].to(norm.bias.dtype) if beta and norm.bias is not None else None,),
    )
