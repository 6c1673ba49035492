"""Prepare and run a call: select its kernels, pack their parameters, launch them one after another.

A bottleneck that fits the whole-block kernel is one launch. Any other block is one launch per convolution. A projection
comes first, and the last convolution adds its output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ... import folding, native
from ...calls import Call
from ...roofline.kernel_time import KernelCounts, kernel_time
from ...spec import YES, ConvSpec, NetSpec, Spec, Verdict
from ..layouts import in_layout
from . import bottleneck, conv_bn_act, stem
from .conv_bn_act import ready
from .device import EMULATED, least_shared_memory, shared_memory, stands_for

Launch = Callable[[Tensor, "Tensor | None"], Tensor]


@dataclass(frozen=True)
class CudaState:
    """The launches of a call. ``fusion``: the fusion plan of :mod:`resnet_fast.roofline.byte_model` that they follow;
    ``counted``: what the emulator counted of the last run."""

    fusion: str
    launches: tuple[Launch, ...]
    text: str
    projects: bool = False  # the first launch makes the shortcut
    counted: list[KernelCounts] = field(default_factory=list)

    def __str__(self) -> str:
        gpu = stands_for()
        return "\n  ".join([self.text, *(f"{c}; on {gpu.name}: {kernel_time(c, gpu)}" for c in self.counted)])


def verdict(spec: Spec | NetSpec) -> Verdict:
    """Return whether these kernels can run the problem."""
    return next((v for v in map(_verdict, spec.parts) if not v), YES)


def _verdict(spec: Spec) -> Verdict:
    if spec.pool:
        return stem.verdict(spec.main[0])
    if bottleneck.verdict(spec, least_shared_memory()):
        return YES
    return next((v for v in map(conv_bn_act.verdict, spec.convs) if not v), YES)


def prepare(call: Call, spec: Spec, earlier: list[CudaState]) -> CudaState:
    """Fold and pack. Kernels and parameters do not depend on the image size, so an earlier state is returned as is."""
    if earlier:
        return earlier[0]
    with torch.inference_mode(False), torch.no_grad():
        folded = [folding.fold(conv, norm) for conv, norm in zip(call.convs, call.norms, strict=True)]
        first = spec.main[0]
        if spec.pool:
            weights = stem.pack(first, *folded[0])
            return CudaState("tail", (lambda x, _: stem.launch(first, weights, x),), "stem_fwd")
        if len(spec.convs) == 1:
            return CudaState("conv", (_launch(first, folded[0]),), conv_bn_act.kernel(first))
        projects = spec.projection is not None
        whole = bottleneck.verdict(spec, shared_memory(call.x.device))
        if whole:
            packed = bottleneck.pack(folded, projects, call.x.dtype)
            return CudaState("block", (lambda x, _: bottleneck.launch(x, packed),), "bottleneck_fwd, the whole block")
        launches = [_launch(c, f) for c, f in zip(spec.convs, folded, strict=True)]
        if projects:
            launches = [launches[-1], *launches[:-1]]
        return CudaState(
            "conv", tuple(launches), f"a launch per convolution; not bottleneck_fwd: {whole.reason}", projects
        )


def _launch(spec: ConvSpec, folded: tuple[Tensor, Tensor]) -> Launch:
    """Return the launch of a convolution, for images of any size."""
    packed = conv_bn_act.pack(spec, *folded)
    return lambda x, residual: conv_bn_act.launch(spec, packed, x, residual)


def run(call: Call, spec: Spec, state: CudaState) -> Tensor:
    """Run the launches one after another."""
    x, launches = ready(call.x), state.launches
    shortcut = None if call.added is None else ready(call.added)
    if state.projects:
        shortcut, launches = launches[0](x, None), launches[1:]
    elif spec.shortcut == "identity":
        shortcut = x
    *inner, last = launches
    y = x
    for launch in inner:
        y = launch(y, None)
    y = last(y, shortcut)
    if EMULATED:
        state.counted[:] = map(KernelCounts.of, native.emulator().take_counters())
    return in_layout(y, spec.layout)
