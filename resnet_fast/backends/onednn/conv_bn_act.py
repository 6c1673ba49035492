"""``conv_bn_act`` as one oneDNN primitive, and the pieces that the other ops of this backend are made of.

    y = relu(conv(x, scale * w) + (shift + scale * b) + residual)

ATen's ``mkldnn::_convolution_pointwise`` takes the packed weight and applies ReLU to the accumulator; its ``.binary``
form adds a second tensor before it, and the in-place form writes the sum over that tensor. All arithmetic accumulates
in fp32; a 16-bit output is rounded once, after bias, add and ReLU.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from ... import folding
from ...calls import BlockCall, BnActCall, Conv, ConvBnActCall, Norm, StemCall
from ...spec import BlockSpec, ConvSpec, PointwiseSpec, Spec, Verdict
from . import bounds
from .bounds import Bounds

DTYPES = ("float32", "bfloat16", "float16")
_fused = torch.ops.mkldnn


class Packed(NamedTuple):
    """A folded convolution ready to run: ``weight`` in oneDNN's own layout, ``tail`` in ATen's argument order."""

    weight: Tensor
    bias: Tensor
    tail: tuple[list[int], list[int], list[int], int]  # padding, stride, dilation, groups
    bounds: Bounds


class Folded(NamedTuple):
    """The convolutions of a call, and how large its inputs may be (:mod:`.bounds`)."""

    convs: list[Packed]
    bounds: Bounds
    reach: float

    @staticmethod
    def of(convs: list[Packed], bounds: Bounds) -> Folded:
        return Folded(convs, bounds, bounds.peak.reach())


@cache
def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the primitives run in: ``dtype`` itself where this CPU's oneDNN has it, otherwise fp32."""
    native = {
        torch.bfloat16: _fused._is_mkldnn_bf16_supported,
        torch.float16: _fused._is_mkldnn_fp16_supported,
    }
    return dtype if dtype == torch.float32 or native[dtype]() else torch.float32


def nhwc(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` as a dense NHWC tensor of ``dtype``; itself if it is one."""
    return x.to(dtype=dtype, memory_format=torch.channels_last)


def pack_one(conv: Conv, norm: Norm, shape: tuple[int, ...], dtype: torch.dtype) -> Packed:
    """Fold and pack one convolution for an input of ``shape``.

    A derived tensor outlives the call that made it, so it is made outside inference mode.
    """
    with torch.inference_mode(False), torch.no_grad():
        weight, bias = (t.to(dtype) for t in folding.fold(conv, norm))
        tail = (list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups)
        packed = _fused._reorder_convolution_weight(weight.contiguous(), *tail, list(shape))
        return Packed(packed, bias, tail, bounds.of_conv(weight, bias, conv.weight, conv.bias))


def prepare(call: ConvBnActCall | StemCall | BlockCall, spec: Spec, earlier: list[Folded]) -> Folded:
    """Every convolution of the call folded and packed, each for the size that reaches it.

    oneDNN chooses the blocked layout by input size, and running in another layout means a reorder of the weight at
    every call (docs/notes/weight-layouts.md), so sizes are kept apart; sizes whose layouts agree share one copy.
    """
    blocks = isinstance(call, BlockCall)
    convs, norms = (call.convs, call.norms) if blocks else ((call.conv,), (call.norm,))  # type: ignore[union-attr]
    specs = spec.convs if isinstance(spec, BlockSpec) else (spec,)
    dtype = compute_dtype(call.x.dtype)
    packed = [
        pack_one(conv, norm, (s.n, s.ci, s.h, s.w), dtype)  # type: ignore[union-attr]
        for conv, norm, s in zip(convs, norms, specs, strict=True)
    ]
    convs = [_share(p, [state.convs[i] for state in earlier]) for i, p in enumerate(packed)]
    return Folded.of(convs, _bounds(call, convs))


def _bounds(call: ConvBnActCall | StemCall | BlockCall, convs: list[Packed]) -> Bounds:
    """The bounds of the call's main branch, one convolution behind the other, and of what is added to it."""
    projection = isinstance(call, BlockCall) and call.projection
    found = bounds.UNCHANGED
    for p in convs[:-1] if projection else convs:
        found = found.then(p.bounds)
    if isinstance(call, StemCall) or (isinstance(call, ConvBnActCall) and call.residual is None):
        return found
    return found.plus(bounds.UNCHANGED.then(convs[-1].bounds) if projection else bounds.UNCHANGED)


def _share(packed: Packed, kept: list[Packed]) -> Packed:
    """``packed``, or an earlier one of the same layout, so that many input sizes do not hold as many copies."""
    layout = _layout(packed.weight)
    return next((k for k in kept if _layout(k.weight) == layout), packed)


def _layout(weight: Tensor) -> bytes:
    """oneDNN's serialized memory descriptor: equal for equal layouts."""
    return torch.ops.mkldnn._get_mkldnn_serialized_md(weight).numpy().tobytes()


def conv(x: Tensor, p: Packed, relu: bool) -> Tensor:
    """relu(conv(x) + bias), a new NHWC tensor."""
    return _fused._convolution_pointwise(x, p.weight, p.bias, *p.tail, "relu" if relu else "none", [], "")


def conv_add(x: Tensor, p: Packed, other: Tensor, relu: bool, overwrite: bool) -> Tensor:
    """relu(conv(x) + bias + other). ``overwrite``: ``other`` is this backend's own, and becomes the result."""
    if p.tail[-1] > 1 and x.dtype.itemsize == 2:
        # ATen adds apart where there are groups, in an add_relu that knows no 16-bit type (torch 2.14)
        y = conv(x, p, relu=False).add_(other)
        return y.relu_() if relu else y
    after = "relu" if relu else None
    if 1 in (other.shape[1], other.shape[2] * other.shape[3]) and not overwrite:
        # NHWC and NCHW at once, for which torch 2.11 makes no separate output: "could not create a memory"
        other, overwrite = other.clone(), True
    if overwrite:
        return _fused._convolution_pointwise_.binary(other, x, p.weight, p.bias, *p.tail, "add", 1, after, [], None)
    return _fused._convolution_pointwise.binary(x, other, p.weight, p.bias, *p.tail, "add", 1, after, [], None)


def like_reference(y: Tensor, dtype: torch.dtype, layout: str) -> Tensor:
    """``y`` with the dtype and strides that the reference would return."""
    return y.to(dtype=dtype, memory_format=torch.channels_last if layout == "nhwc" else torch.contiguous_format)


def conv_bn_act(call: ConvBnActCall | BnActCall, spec: ConvSpec | PointwiseSpec, state: Folded) -> Tensor | Verdict:
    """act(bn(conv(x)) + residual)."""
    dtype = compute_dtype(call.x.dtype)
    x = nhwc(call.x, dtype)
    other = None if call.residual is None else nhwc(call.residual, dtype)
    refusal = bounds.verdict((x,) if other is None else (x, other), state.reach)
    if refusal is not None:
        return refusal
    (packed,) = state.convs
    if other is None:
        y = conv(x, packed, call.relu)
    else:
        y = conv_add(x, packed, other, call.relu, overwrite=other is not call.residual)
    return like_reference(y, call.x.dtype, spec.layout)
