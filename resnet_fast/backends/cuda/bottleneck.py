"""Launch a whole bottleneck of stride 1 as one kernel, csrc/kernels/bottleneck_fwd.cu: limits and parameters."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ... import native
from ...spec import ConvSpec, Spec, Verdict

STEP = 64
"""Input channels per step of the weights."""

CHANNELS = {(64, 256), (128, 256), (128, 512)}
"""(inner, output) channels that the kernel is compiled for: ResNet-50's stages 1 and 2, stage 1 of the wide nets."""


RESIDENT = 64
"""Maximum inner channels with weights on chip. Wider blocks read their weights from L2 for every 64 pixels, and are
predicted to take longer than one launch per convolution (docs/tables/cuda-predictions.md)."""


class BottleneckWeights(NamedTuple):
    """The kernel's parameters. ``weights`` (steps, Cmid, 64), biases fp32, ``bias3`` with the projection's added."""

    weights: Tensor
    bias1: Tensor
    bias2: Tensor
    bias3: Tensor
    projection: bool


def verdict(spec: Spec, shared: int, streamed: bool = False) -> Verdict:
    """Return whether one launch should run the block.

    Args:
        spec: the block.
        shared: bytes of shared memory per thread block on the device.
        streamed: whether to accept blocks with weights that do not stay on chip.
    """
    todo = "its convolutions run one by one"
    if spec.op != "bottleneck":
        return Verdict.no("a bottleneck", spec.op, todo)
    conv1, conv2, conv3 = spec.main
    projection = spec.projection
    if spec.shortcut == "given":
        return Verdict.no("the identity or a projection as shortcut", "a tensor", todo)
    if (conv2.co, conv3.co) not in CHANNELS:
        known = ", ".join(f"{mid} and {out}" for mid, out in sorted(CHANNELS))
        return Verdict.no(f"{known} channels between and out", f"{conv2.co} and {conv3.co}", todo)
    plain = _plain(conv1, 1) and _plain(conv2, 3) and _plain(conv3, 1) and (projection is None or _plain(projection, 1))
    if not plain:
        return Verdict.no("convolutions 1x1, 3x3, 1x1 of stride 1 without dilation or groups", str(spec), todo)
    if conv1.ci % STEP or not all(spec.out_shape()[2:]):
        return Verdict.no(f"input channels in multiples of {STEP}, and pixels", str(spec), todo)
    if conv2.co > RESIDENT and not streamed:
        return Verdict.no(f"{RESIDENT} channels between, whose weights stay on chip", f"{conv2.co}", f"faster: {todo}")
    needed = native.require().bottleneck_fwd_shared(conv1.ci, conv2.co, conv3.co, projection is not None)
    if needed > shared:
        return Verdict.no(f"{needed:,} bytes of shared memory per block", f"a GPU with {shared:,}", todo)
    return Verdict.yes()


def _plain(conv: ConvSpec, size: int) -> bool:
    pad = size // 2
    return (conv.r, conv.s, *conv.geometry()) == (size, size, (1, 1), (pad, pad), (1, 1), 1)


def pack(folded: list[tuple[Tensor, Tensor]], projection: bool, dtype: torch.dtype) -> BottleneckWeights:
    """Pack the folded fp32 (weight (Co, Ci, R, S), bias (Co)) of conv1, conv2, conv3 and the projection, if any."""
    (w1, b1), (w2, b2), (w3, b3), *rest = folded
    cmid = w1.shape[0]
    if projection:
        w3, b3 = torch.cat([w3, rest[0][0]], 1), b3 + rest[0][1]
    first = w1.reshape(cmid, -1, STEP).permute(1, 0, 2)
    second = w2.permute(2, 3, 0, 1).reshape(9, cmid, cmid // STEP, STEP).permute(0, 2, 1, 3).reshape(-1, cmid, STEP)
    last = w3.reshape(w3.shape[0] // cmid, cmid, -1, STEP).permute(0, 2, 1, 3).reshape(-1, cmid, STEP)
    weights = torch.cat([first, second, last]).to(dtype).contiguous()
    return BottleneckWeights(weights, b1.contiguous(), b2.contiguous(), b3.contiguous(), projection)


def launch(x: Tensor, packed: BottleneckWeights) -> Tensor:
    """x (N, Ci, H, W) dense NHWC -> y (N, Co, H, W) dense NHWC."""
    return native.require().bottleneck_fwd(x, *packed)
