"""Launch one convolution with its epilogue: csrc/kernels/conv_bn_act_1x1.cu, or conv_bn_act.cu for other filters."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ... import native
from ...spec import YES, ConvSpec, Verdict
from ..refusals import inference_only

DTYPES = ("bfloat16", "float16")
_ROWS = 2**31 - 1024
_PIXELS = 2**30


class ConvWeights(NamedTuple):
    """A folded convolution in a kernel's layout: 16-bit ``weight``, fp32 ``bias`` (Co)."""

    weight: Tensor
    bias: Tensor


def kernel(spec: ConvSpec) -> str:
    """Return the op for ``spec``. A padded 1x1 has windows outside of the image, like larger filters."""
    pixels = (spec.r, spec.s) == (1, 1) and spec.padding == (0, 0)
    return "conv_bn_act_1x1" if pixels else "conv_bn_act"


def verdict(spec: ConvSpec) -> Verdict:
    """Return whether ``kernel(spec)`` can compute it, on any device."""
    inference = inference_only(spec, DTYPES)
    if not inference:
        return inference
    if spec.groups != 1:
        return Verdict.no("a convolution without groups", f"{spec.groups} groups", "use another backend")
    if spec.ci % 8 or spec.co % 8:
        return Verdict.no(
            "input and output channels that are multiples of 8", f"{spec.ci} and {spec.co}", "use another backend"
        )
    if spec.epilogue.pool is not None:
        return Verdict.no("a convolution without pooling", str(spec.epilogue), "use the stem's kernel")
    if min(spec.h, spec.w, spec.ho, spec.wo) < 1:
        return Verdict.no("an image that the filter fits into", f"{spec.h}x{spec.w}", "use a larger image")
    # what the kernels count in 32 bits, see csrc/ops/conv.h and conv_bn_act.cpp
    (ph, pw), tiles = spec.padding, -(-spec.co // 64)
    chunks = max(spec.n * spec.h * spec.w * spec.ci, spec.co * spec.gemm_k) // 8
    pixels = (spec.n + 1) * (spec.h + 2 * ph) * (spec.w + 2 * pw)
    fits = spec.gemm_m * tiles < _ROWS and chunks < _ROWS
    if not fits or (kernel(spec) == "conv_bn_act" and (pixels >= _PIXELS or spec.gemm_k >= _PIXELS)):
        return Verdict.no("a problem that 32 bits count", str(spec), "split the batch")
    return YES


def pack(spec: ConvSpec, weight: Tensor, bias: Tensor) -> ConvWeights:
    """Pack the fp32 weight (Co, Ci, R, S) and bias of :func:`resnet_fast.folding.fold` for ``kernel(spec)``."""
    rounded = weight.permute(0, 2, 3, 1).to(getattr(torch, spec.dtype)).contiguous()
    return ConvWeights(rounded.flatten(1) if kernel(spec) == "conv_bn_act_1x1" else rounded, bias.contiguous())


def launch(spec: ConvSpec, packed: ConvWeights, x: Tensor, residual: Tensor | None) -> Tensor:
    """Return ``act(conv(x) + bias + residual)`` in dense NHWC. ``residual``: of the output's shape, or None."""
    x, residual = ready(x), None if residual is None else ready(residual)
    ops, relu = native.require(), spec.epilogue.relu
    if kernel(spec) == "conv_bn_act_1x1":
        y: Tensor = ops.conv_bn_act_1x1(x, packed.weight, packed.bias, residual, *spec.stride, relu)
    else:
        steps = (*spec.stride, *spec.padding, *spec.dilation)
        y = ops.conv_bn_act(x, packed.weight, packed.bias, residual, *steps, relu)
    return y


def ready(x: Tensor) -> Tensor:
    """Return ``x`` in dense NHWC on a 16-byte boundary; ``x`` itself if it already is."""
    x = x.contiguous(memory_format=torch.channels_last)
    return x if x.data_ptr() % 16 == 0 else x.clone()
