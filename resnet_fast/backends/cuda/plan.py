"""From a call to its launches: which kernels, their packed parameters, and the loop that runs them.

A bottleneck that fits the whole-block kernel is one launch. Any other block is a launch per convolution: the projection
first, whose output the last convolution adds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ... import folding, native
from ...calls import BlockCall, ConvBnActCall, NetCall, StemCall, convs_of, given_of, norms_of
from ...roofline.kernel_time import KernelCounts, kernel_time
from ...spec import BlockSpec, ConvSpec, NetSpec, Verdict
from . import bottleneck, conv_bn_act, stem
from .conv_bn_act import ready
from .device import EMULATED, shared_memory, stands_for

Launch = Callable[[Tensor, "Tensor | None"], Tensor]


@dataclass(frozen=True)
class Plan:
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


def verdict(spec: ConvSpec | BlockSpec | NetSpec) -> Verdict:
    """Can these kernels run the problem?"""
    if isinstance(spec, NetSpec):
        return next((v for v in map(verdict, spec.parts) if not v), Verdict.yes())
    if isinstance(spec, BlockSpec):
        if bottleneck.verdict(spec, shared_memory()):
            return Verdict.yes()
        return next((v for v in map(conv_bn_act.verdict, spec.convs) if not v), Verdict.yes())
    return stem.verdict(spec) if spec.epilogue.pool else conv_bn_act.verdict(spec)


def prepare(call: ConvBnActCall | StemCall | BlockCall, spec: ConvSpec | BlockSpec, earlier: list[Plan]) -> Plan:
    """Fold and pack. The kernels and their parameters depend on no size, so an earlier plan serves any."""
    if earlier:
        return earlier[0]
    with torch.inference_mode(False), torch.no_grad():
        folded = [folding.fold(conv, norm) for conv, norm in zip(convs_of(call), norms_of(call), strict=True)]
        if isinstance(spec, ConvSpec):
            if spec.epilogue.pool:
                kernel = stem.pack(spec, *folded[0])
                return Plan("tail", (lambda x, _: stem.launch(spec, kernel, x),), "stem_fwd")
            return Plan("conv", (_launch(spec, folded[0]),), conv_bn_act.kernel(spec))
        projects = spec.shortcut == "projection"
        whole = bottleneck.verdict(spec, shared_memory())
        if whole:
            packed = bottleneck.pack(folded, projects, call.x.dtype)
            return Plan("block", (lambda x, _: bottleneck.launch(x, packed),), "bottleneck_fwd, the whole block")
        launches = [_launch(c, f) for c, f in zip(spec.convs, folded, strict=True)]
        if projects:
            launches = [launches[-1], *launches[:-1]]
        return Plan("conv", tuple(launches), f"a launch per convolution; not bottleneck_fwd: {whole.reason}", projects)


def _launch(spec: ConvSpec, folded: tuple[Tensor, Tensor]) -> Launch:
    """A convolution for any size of image: of ``spec``, the kernel takes what no size changes."""
    packed = conv_bn_act.pack(spec, *folded)
    return lambda x, residual: conv_bn_act.launch(spec, packed, x, residual)


def run(call: ConvBnActCall | StemCall | BlockCall, spec: ConvSpec | BlockSpec, plan: Plan) -> Tensor:
    """The launches one after another; returns NHWC."""
    y = _run(call, spec, plan)
    if EMULATED:
        plan.counted[:] = map(KernelCounts.of, native.emulator().take_counters())
    return y


def _run(call: ConvBnActCall | StemCall | BlockCall, spec: ConvSpec | BlockSpec, plan: Plan) -> Tensor:
    x = ready(call.x)
    given = given_of(call)
    shortcut = None if given is None else ready(given)
    if isinstance(spec, ConvSpec):
        return plan.launches[0](x, shortcut)
    launches = plan.launches
    if plan.projects:
        shortcut, launches = launches[0](x, None), launches[1:]
    elif shortcut is None:
        shortcut = x
    *inner, last = launches
    y = x
    for launch in inner:
        y = launch(y, None)
    return last(y, shortcut)


def prepare_net(call: NetCall, spec: NetSpec, earlier: list[list[Plan]]) -> list[Plan]:
    """A plan per part."""
    return [
        prepare(part._replace(x=call.x), part_spec, [plans[i] for plans in earlier])
        for i, (part, part_spec) in enumerate(zip(call.parts, spec.parts, strict=True))
    ]


def run_net(call: NetCall, spec: NetSpec, state: list[Plan]) -> Tensor:
    """The last block's output, NHWC."""
    x = call.x
    for part, part_spec, part_plan in zip(call.parts, spec.parts, state, strict=True):
        x = run(part._replace(x=x), part_spec, part_plan)
    return x
