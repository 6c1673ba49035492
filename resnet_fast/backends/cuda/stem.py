"""Launch convolution 7x7/2, ReLU and max-pool 3x3/2 as one kernel, csrc/kernels/stem_fwd.cu."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import native
from ...spec import YES, ConvSpec, Verdict
from ..refusals import inference_only
from .conv_bn_act import DTYPES, ConvWeights, ready

_POOL = (3, 2, 1)
_SIZES = 2**29


def verdict(spec: ConvSpec) -> Verdict:
    """Return whether the kernel can compute ``spec``, on any device."""
    inference = inference_only(spec, DTYPES)
    if not inference:
        return inference
    filter_ = (spec.ci, spec.co, spec.r, spec.s, spec.geometry())
    if filter_ != (3, 64, 7, 7, ((2, 2), (3, 3), (1, 1), 1)):
        return Verdict.no("a 7x7 stride 2 padding 3 convolution of 3 to 64 channels", str(spec), "use another backend")
    if spec.epilogue.pool != _POOL or not spec.epilogue.relu or spec.epilogue.add:
        return Verdict.no("ReLU and a 3x3 stride 2 padding 1 max-pool", str(spec.epilogue), "use another backend")
    if min(spec.h, spec.w) < 1:
        return Verdict.no("an image with pixels", f"{spec.h}x{spec.w}", "use a larger image")
    hp, wp = spec.out_hw()
    if max(spec.n, spec.h, spec.w, spec.n * hp * wp) >= _SIZES:
        return Verdict.no("a problem that 32 bits count", str(spec), "split the batch")
    return YES


def pack(spec: ConvSpec, weight: Tensor, bias: Tensor) -> ConvWeights:
    """Pack the fp32 weight (64, 3, 7, 7) of :func:`resnet_fast.folding.fold` in the order of the kernel's registers.

    A filter row of 7*3 numbers gets one zero before and two after it. All rows together are padded to 11 steps of 16. A
    lane's 16 bytes are operand b of one step and two column tiles: (half of the channels, step and pair of tiles, lane,
    8 numbers).
    """
    rows = F.pad(weight.permute(0, 2, 3, 1).flatten(2), (1, 2)).flatten(1)
    steps = F.pad(rows, (0, 8)).to(getattr(torch, spec.dtype))
    halves, pairs, tiles, group = 2, 2, 2, 8
    parts = steps.reshape(halves, pairs, tiles, group, -1, 2, 4, 2)  # ..., step, word, quad, number
    lanes = parts.permute(0, 4, 1, 3, 6, 2, 5, 7)  # half, step, pair, group, quad, tile, word, number
    return ConvWeights(lanes.reshape(halves, -1, 32, 8).contiguous(), bias.contiguous())


def launch(spec: ConvSpec, packed: ConvWeights, x: Tensor) -> Tensor:
    """Return ``maxpool(relu(conv(x) + bias))`` in dense NHWC."""
    y: Tensor = native.require().stem_fwd(ready(x), packed.weight, packed.bias)
    return y
