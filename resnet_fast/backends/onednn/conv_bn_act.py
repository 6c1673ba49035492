"""``conv_bn_act`` as one oneDNN primitive, and the pieces that the other ops of this backend are made of.

    y = relu(conv(x, scale * w) + (shift + scale * b) + residual)

ATen's ``mkldnn::_convolution_pointwise`` takes the packed weight and applies ReLU to the accumulator; its ``.binary``
form adds a second tensor before it, and the in-place form writes the sum over that tensor. All arithmetic accumulates
in fp32; a 16-bit output is rounded once, after bias, add and ReLU.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from ... import folding
from ...calls import Call, Conv, Norm
from ...spec import ConvSpec, Spec, Verdict
from . import bounds
from .bounds import Bounds

DTYPES = ("float32", "bfloat16", "float16")
_fused = torch.ops.mkldnn


class PackedConv(NamedTuple):
    """A folded convolution ready to run: ``weight`` in oneDNN's own layout, ``tail`` in ATen's argument order."""

    weight: Tensor
    bias: Tensor
    tail: tuple[list[int], list[int], list[int], int]  # padding, stride, dilation, groups
    bounds: Bounds
    layout: bytes  # :func:`_layout` of the weight


class PackedCall(NamedTuple):
    """The convolutions of a call, and how large its inputs may be (:mod:`.bounds`)."""

    convs: list[PackedConv]
    bounds: Bounds
    reach: float

    @staticmethod
    def of(convs: list[PackedConv], bounds: Bounds) -> PackedCall:
        return PackedCall(convs, bounds, bounds.peak.reach())


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


def pack_one(conv: Conv, norm: Norm, shape: tuple[int, ...], dtype: torch.dtype) -> PackedConv:
    """Fold and pack one convolution for an input of ``shape``.

    A derived tensor outlives the call that made it, so it is made outside inference mode.
    """
    with torch.inference_mode(False), torch.no_grad():
        weight, bias = (t.to(dtype) for t in folding.fold(conv, norm))
        tail = (list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups)
        packed = _fused._reorder_convolution_weight(weight.contiguous(), *tail, list(shape))
        return PackedConv(packed, bias, tail, bounds.of_conv(weight, bias, conv.weight, conv.bias), _layout(packed))


def prepare(call: Call, spec: Spec, earlier: list[PackedCall]) -> PackedCall:
    """Every convolution of the call folded and packed, each for the size that reaches it.

    oneDNN chooses the blocked layout by input size, and running in another layout means a reorder of the weight at
    every call (docs/notes/weight-layouts.md), so sizes are kept apart; sizes whose layouts agree share one copy.
    """
    convs = []
    for i, (conv, norm, shape) in enumerate(_problems(call, spec)):
        dtype = compute_dtype(call.x.dtype)
        kept = [state.convs[i] for state in earlier]
        packed = _shared(conv, shape, dtype, kept)
        if packed is None:
            packed = pack_one(conv, norm, shape, dtype)
            if len(_layouts) >= _KEEP:
                _layouts.clear()
            _layouts[_problem(conv, shape, dtype)] = packed.layout
            packed = next((k for k in kept if k.layout == packed.layout), packed)
        convs.append(packed)
    return PackedCall.of(convs, _bounds(spec, convs))


def elements(call: Call, spec: Spec, earlier: list[PackedCall], counted: set[Hashable] | None = None) -> int:
    """How many weights :func:`prepare` would have to fold and pack.

    ``counted``: problems whose layout will be known by then, and probably be that of an ``earlier`` state.
    """
    dtype = compute_dtype(call.x.dtype)
    found, counted = 0, set() if counted is None else counted
    for i, (conv, _, shape) in enumerate(_problems(call, spec)):
        if earlier:
            problem = _problem(conv, shape, dtype)
            if problem in counted or _shared(conv, shape, dtype, [state.convs[i] for state in earlier]) is not None:
                continue
            counted.add(problem)
        found += conv.weight.numel()
    return found


def _problems(call: Call, spec: Spec) -> Iterator[tuple[Conv, Norm, tuple[int, int, int, int]]]:
    """Each convolution, its norm and the shape of the input that reaches it."""
    for conv, norm, s in zip(call.convs, call.norms, spec.convs, strict=True):
        yield conv, norm, (s.n, s.ci, s.h, s.w)


def nbytes(states: list[PackedCall]) -> int:
    """Memory of the packed weights, those that several states share counted once."""
    weights = {id(p.weight): p.weight for state in states for p in state.convs}
    return sum(w.numel() * w.element_size() for w in weights.values())


_KEEP = 4096
_layouts: dict[Hashable, bytes] = {}  # problem -> the layout that oneDNN was seen to choose for it


def _problem(conv: Conv, shape: tuple[int, ...], dtype: torch.dtype) -> Hashable:
    """All that oneDNN's choice of a layout depends on."""
    return conv.weight.shape, conv.numbers(), shape, dtype, torch.get_num_threads()


def _shared(conv: Conv, shape: tuple[int, ...], dtype: torch.dtype, kept: list[PackedConv]) -> PackedConv | None:
    """One of ``kept`` that has the layout for this size, if that is known from an earlier packing of any weights."""
    layout = _layouts.get(_problem(conv, shape, dtype)) if kept else None
    return None if layout is None else next((k for k in kept if k.layout == layout), None)


def _bounds(spec: Spec, convs: list[PackedConv]) -> Bounds:
    """The bounds of the call's main branch, one convolution behind the other, and of what is added to it."""
    found = bounds.UNCHANGED
    for p in convs[: len(spec.main)]:
        found = found.then(p.bounds)
    if spec.shortcut == "none":
        return found
    return found.plus(bounds.UNCHANGED.then(convs[-1].bounds) if spec.projection else bounds.UNCHANGED)


def _layout(weight: Tensor) -> bytes:
    """oneDNN's serialized memory descriptor: equal for equal layouts."""
    return torch.ops.mkldnn._get_mkldnn_serialized_md(weight).numpy().tobytes()


def conv(x: Tensor, p: PackedConv, relu: bool) -> Tensor:
    """relu(conv(x) + bias), a new NHWC tensor."""
    return _fused._convolution_pointwise(x, p.weight, p.bias, *p.tail, "relu" if relu else "none", [], "")


def conv_add(x: Tensor, p: PackedConv, other: Tensor, relu: bool, overwrite: bool) -> Tensor:
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


def run(call: Call, spec: ConvSpec, state: PackedCall) -> Tensor | Verdict:
    """act(bn(conv(x)) + residual)."""
    dtype = compute_dtype(call.x.dtype)
    x = nhwc(call.x, dtype)
    other = None if call.added is None else nhwc(call.added, dtype)
    refusal = bounds.verdict((x,) if other is None else (x, other), state.reach)
    if refusal is not None:
        return refusal
    (packed,) = state.convs
    if other is None:
        y = conv(x, packed, call.relu)
    else:
        y = conv_add(x, packed, other, call.relu, overwrite=other is not call.added)
    return like_reference(y, call.x.dtype, spec.layout)
