"""Prepare and run a call: plan its launches, pack the parameters of each, launch them one after another.

``prepare`` runs once per set of parameters and input size. ``run`` is the only step between dispatch and a kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import folding
from ...calls import Call
from ...spec import LaunchSpec, Spec
from ...tuning.configs import Config
from ...tuning.launch_plan import LaunchPlan, plan_launches
from ...tuning.routes import merged_groups
from ..layouts import in_layout
from . import proofs
from .device import device_of, place_of, table_of
from .launch import FoldedWeights, arrivals, nhwc
from .launchers import LAUNCHERS, Launcher, pack, parameters
from .problem import problem


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
    chosen = _plan(spec, call.x.device)
    folded = dict(earlier[0].folded) if earlier else {}
    with torch.inference_mode(False), torch.no_grad():
        for i, (conv, norm, conv_spec) in enumerate(zip(call.convs, call.norms, spec.convs, strict=True)):
            if i not in folded:
                folded[i] = pack(conv, *folding.fold(conv, norm), merged_groups(conv_spec), call.x.dtype)
        launches = _launches(spec, chosen, folded)
    pooled = chosen.route.launches[0].last.pool is not None
    return TritonState(chosen, launches, folded, None if pooled else spec.pool)


def _plan(spec: Spec, device: torch.device) -> LaunchPlan:
    """Return the fastest plan whose configs are proved on ``device`` or need no proof."""
    gpu, table = device_of(device), table_of(device)
    chosen, note, _ = proofs.settled(
        lambda hopeful: plan_launches(spec, gpu, table, hopeful),
        lambda plan: plan.chosen,
        problem,
        place_of(device),
        table,
    )
    return replace(chosen, note=note)


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
