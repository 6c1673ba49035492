"""``conv_bn_act`` as one oneDNN primitive, and the functions that the other ops of this backend share.

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
    """A folded convolution: ``weight`` in oneDNN's own layout, ``tail`` in the order of ATen's arguments."""

    weight: Tensor
    bias: Tensor
    tail: tuple[list[int], list[int], list[int], int]  # padding, stride, dilation, groups
    bounds: Bounds
    layout: bytes  # :func:`_layout` of the weight


class PackedCall(NamedTuple):
    """The convolutions of a call, and the largest value that its inputs may hold (:mod:`.bounds`)."""

    convs: list[PackedConv]
    bounds: Bounds
    reach: float

    @staticmethod
    def of(convs: list[PackedConv], bounds: Bounds) -> PackedCall:
        return PackedCall(convs, bounds, bounds.peak.reach())


@cache
def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the primitives: ``dtype`` if oneDNN supports it on this CPU, otherwise fp32."""
    native = {
        torch.bfloat16: _fused._is_mkldnn_bf16_supported,
        torch.float16: _fused._is_mkldnn_fp16_supported,
    }
    return dtype if dtype == torch.float32 or native[dtype]() else torch.float32


def nhwc(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``x`` as a dense NHWC tensor of ``dtype``; ``x`` itself if it already is."""
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
    """Fold and pack every convolution of the call for the size of its input.

    oneDNN chooses the blocked layout by input size. Another layout would cost a reorder of the weight at every call
    (docs/notes/weight-layouts.md), so each size has its own weights, and sizes with the same layout share one copy.
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
    """Return how many weights :func:`prepare` would have to fold and pack.

    ``counted``: problems counted before. Their layout will be known then, and is probably that of an ``earlier`` state.
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
    """Yield each convolution, its norm and the shape of its input."""
    for conv, norm, s in zip(call.convs, call.norms, spec.convs, strict=True):
        yield conv, norm, (s.n, s.ci, s.h, s.w)


def nbytes(states: list[PackedCall]) -> int:
    """Return the bytes of the packed weights; weights that several states share count once."""
    weights = {id(p.weight): p.weight for state in states for p in state.convs}
    return sum(w.numel() * w.element_size() for w in weights.values())


_KEEP = 4096
_layouts: dict[Hashable, bytes] = {}  # problem -> the layout that oneDNN was seen to choose for it


def _problem(conv: Conv, shape: tuple[int, ...], dtype: torch.dtype) -> Hashable:
    """Return everything that oneDNN's choice of a layout depends on."""
    return conv.weight.shape, conv.numbers(), shape, dtype, torch.get_num_threads()


def _shared(conv: Conv, shape: tuple[int, ...], dtype: torch.dtype, kept: list[PackedConv]) -> PackedConv | None:
    """Return one of ``kept`` with the layout for this size, if an earlier packing of any weights has shown it."""
    layout = _layouts.get(_problem(conv, shape, dtype)) if kept else None
    return None if layout is None else next((k for k in kept if k.layout == layout), None)


def _bounds(spec: Spec, convs: list[PackedConv]) -> Bounds:
    """Return the bounds of the call's main branch, and of the sum with the shortcut."""
    found = bounds.UNCHANGED
    for p in convs[: len(spec.main)]:
        found = found.then(p.bounds)
    if spec.shortcut == "none":
        return found
    return found.plus(bounds.UNCHANGED.then(convs[-1].bounds) if spec.projection else bounds.UNCHANGED)


def _layout(weight: Tensor) -> bytes:
    """Return oneDNN's serialized memory descriptor, which is equal for equal layouts."""
    return torch.ops.mkldnn._get_mkldnn_serialized_md(weight).numpy().tobytes()


def conv(x: Tensor, p: PackedConv, relu: bool) -> Tensor:
    """Return relu(conv(x) + bias), a new NHWC tensor."""
    return _fused._convolution_pointwise(x, p.weight, p.bias, *p.tail, "relu" if relu else "none", [], "")


def conv_add(x: Tensor, p: PackedConv, other: Tensor, relu: bool, overwrite: bool) -> Tensor:
    """Return relu(conv(x) + bias + other). ``overwrite``: write the result over ``other``."""
    if p.tail[-1] > 1 and x.dtype.itemsize == 2:
        # with groups, ATen adds in a separate add_relu without 16-bit types (torch 2.14)
        y = conv(x, p, relu=False).add_(other)
        return y.relu_() if relu else y
    after = "relu" if relu else None
    if 1 in (other.shape[1], other.shape[2] * other.shape[3]) and not overwrite:
        # both NHWC and NCHW, for which torch 2.11 cannot make a new output: "could not create a memory"
        other, overwrite = other.clone(), True
    if overwrite:
        return _fused._convolution_pointwise_.binary(other, x, p.weight, p.bias, *p.tail, "add", 1, after, [], None)
    return _fused._convolution_pointwise.binary(x, other, p.weight, p.bias, *p.tail, "add", 1, after, [], None)


def like_reference(y: Tensor, dtype: torch.dtype, layout: str) -> Tensor:
    """Return ``y`` with the dtype and strides that the reference would return."""
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
