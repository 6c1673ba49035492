"""Prepare and run a call: plan its launches, pack the parameters of each, launch them one after another.

``prepare`` runs once per set of parameters and input size. ``run`` is the only step between dispatch and a kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import folding
from ...calls import Call, Conv
from ...spec import LaunchSpec, Spec
from ...tuning.configs import Config
from ...tuning.launch_plan import LaunchPlan, plan_launches
from ...tuning.routes import merged_groups, stem_step
from ..layouts import in_layout
from . import bottleneck, conv_bn_act, conv_bn_act_1x1, conv_bn_act_3x3, stem, stock
from .device import device_of, table_of
from .launch import FoldedWeights, arrivals, nhwc

Launcher = Callable[..., Tensor]
"""``launcher(launch, config, packed, x, res, xp)``; one with ``config.splits`` also takes ``arrivals``."""

LAUNCHERS: dict[str, Launcher] = {
    "conv_bn_act_1x1": conv_bn_act_1x1.conv_bn_act_1x1,
    "conv_bn_act_3x3": conv_bn_act_3x3.conv_bn_act_3x3,
    "conv_bn_act": conv_bn_act.conv_bn_act,
    "stem": stem.stem,
    "bottleneck": bottleneck.bottleneck,
    "cudnn": stock.stock,
    "cudnn_fused": stock.stock,
}


class PackedLaunch(NamedTuple):
    """One launch. ``makes_shortcut``: it computes the block's shortcut, not the next step of its main branch."""

    launch: LaunchSpec
    config: Config
    packed: FoldedWeights
    launcher: Launcher
    makes_shortcut: bool


@dataclass(frozen=True)
class TritonState:
    """The launches of a call, their plan, and the folded convolutions that they are packed from.

    ``pool``: the max-pooling that PyTorch runs after them; None if a launch includes it.
    """

    chosen: LaunchPlan
    launches: tuple[PackedLaunch, ...]
    folded: dict[int, tuple[Tensor, Tensor]]
    pool: tuple[int, int, int] | None = None

    @property
    def fusion(self) -> str:
        """The fusion plan of :mod:`resnet_fast.roofline.byte_model` that the launches follow."""
        plan = self.chosen.route.fusion
        return "tail" if plan == "stem" else plan

    def steps(self) -> Iterator[tuple[LaunchSpec, Config]]:
        """Yield each launch with its config."""
        return ((step.launch, step.config) for step in self.launches)

    def __str__(self) -> str:
        return str(self.chosen)


def prepare(call: Call, spec: Spec, earlier: list[TritonState]) -> TritonState:
    """Plan, fold and pack. States of the same parameters for other sizes (``earlier``) share the packed weights.

    A derived tensor outlives the call that made it, so it is made outside inference mode.
    """
    chosen = plan_launches(spec, device_of(call.x.device), table_of(call.x.device))
    folded = dict(earlier[0].folded) if earlier else {}
    with torch.inference_mode(False), torch.no_grad():
        for i, (conv, norm, conv_spec) in enumerate(zip(call.convs, call.norms, spec.convs, strict=True)):
            if i not in folded:
                folded[i] = pack(conv, *folding.fold(conv, norm), merged_groups(conv_spec), call.x.dtype)
        launches = _launches(spec, chosen, folded)
    pooled = chosen.route.launches[0].last.pool is not None
    return TritonState(chosen, launches, folded, None if pooled else spec.pool)


def _launches(spec: Spec, chosen: LaunchPlan, folded: dict[int, Any]) -> tuple[PackedLaunch, ...]:
    """Return each launch with its parameters, by its convolutions' places in the call."""
    projection = None if spec.projection is None else folded[len(spec.main)]
    first, found = 0, []
    for at, (launch, config) in enumerate(zip(chosen.route.launches, chosen.configs, strict=True)):
        makes_shortcut = projection is not None and chosen.route.fusion == "conv" and at == 0
        if projection is not None and makes_shortcut:
            members = [projection]
        else:
            members = [folded[first + k] for k in range(len(launch.convs))]
            first += len(launch.convs)
        packed = parameters(launch, config, members, None if launch.projection is None else projection)
        found.append(PackedLaunch(launch, config, packed, LAUNCHERS[config.kernel], makes_shortcut))
    return tuple(found)


def parameters(
    launch: LaunchSpec, config: Config, members: list[tuple[Tensor, Tensor]], projection: tuple[Tensor, Tensor] | None
) -> FoldedWeights:
    """Return a launch's parameters from the packed (weight, bias) of its convolutions and of its projection."""
    weight, bias = members[-1]
    if config.stock:
        return FoldedWeights(weight, bias.to(weight.dtype))
    if launch.kernel == "stem":
        weight = _padded_rows(weight, stem_step(launch.last))
    inner, inner_bias = members[0] if len(members) > 1 else (None, None)
    if projection is None:
        return FoldedWeights(weight, bias, inner, inner_bias)
    return FoldedWeights(weight, bias + projection[1], inner, inner_bias, projection[0])


def pack(conv: Conv, weight: Tensor, bias: Tensor, groups: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the weight (Co, R, S, Ci/groups), dense in ``dtype``, and the fp32 bias.

    ``groups``: number of groups after merging; the weights between members of a merged group are zero.
    """
    merge = conv.groups // groups
    if merge > 1:
        co, cig, r, s = weight.shape
        wide = weight.new_zeros(groups, merge, co // conv.groups, merge, cig, r, s)
        parts = weight.reshape(groups, merge, co // conv.groups, cig, r, s)
        for member in range(merge):
            wide[:, member, :, member] = parts[:, member]
        weight = wide.reshape(co, merge * cig, r, s)
    return weight.permute(0, 2, 3, 1).to(dtype).contiguous(), bias.contiguous()


def _padded_rows(weight: Tensor, step: int) -> Tensor:
    """Pad filter rows with zeros: (Co, R, S, Ci) -> (Co, R, step)."""
    rows = weight.flatten(2)
    return F.pad(rows, (0, step - rows.shape[2])).contiguous()


def dense_images(x: Tensor) -> Tensor:
    """Return ``x`` with each image in dense NHWC, with any gap between images; ``x`` itself if it already is."""
    return x if x[:1].is_contiguous(memory_format=torch.channels_last) else nhwc(x)


def run(call: Call, spec: Spec, state: TritonState, counters: Tensor | None = None) -> Tensor:
    """Run the launches one after another.

    Args:
        counters: zeros of :func:`~.launch.arrivals` for split-K launches; None to make them here.
    """
    x = call.x
    if counters is None:
        counters = arrivals(state.steps(), x)
    if spec.pool is None or state.pool is not None or state.launches[0].config.stock:  # all but the stem's own kernel
        x = dense_images(x)
    shortcut = None if call.added is None else nhwc(call.added)
    y = x
    for launch, config, packed, launcher, makes_shortcut in state.launches:
        split = {} if config.splits == 1 else {"arrivals": counters}
        if makes_shortcut:
            shortcut = launcher(launch, config, packed, x, None, None, **split)
            continue
        res = None
        if launch.residual:
            res = nhwc(x) if shortcut is None else shortcut
        y = launcher(launch, config, packed, y, res, x if launch.projection is not None else None, **split)
    if state.pool is not None:
        y = F.max_pool2d(y, *state.pool)
    return in_layout(y, spec.layout)
