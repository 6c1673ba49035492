"""Prepare and run a call: plan its launches, pack the parameters of each, launch them one after another.

``prepare`` runs once per set of parameters and input size. ``run`` is the only step between dispatch and a kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import folding
from ...calls import Call
from ...locks import ForkSafeLock
from ...spec import LaunchSpec, Spec
from ...tuning.configs import Config
from ...tuning.launch_plan import LaunchPlan, plan_launches
from ...tuning.routes import merged_groups, planned
from ..layouts import in_layout
from . import proofs
from .device import device_of, place_of, table_of, table_version
from .launch import FoldedWeights, arrivals, nhwc
from .launchers import LAUNCHERS, Launcher, pack, parameters
from .problem import problem
from .submission import Passes


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

    ``pool``: the max-pooling that PyTorch runs after them; None if a launch includes it. ``passes``: how the launches
    run, once they have.
    """

    chosen: LaunchPlan
    launches: tuple[PackedLaunch, ...]
    folded: dict[int, tuple[Tensor, Tensor]]
    pool: tuple[int, int, int] | None = None
    passes: Passes = field(default_factory=Passes, init=False, compare=False)

    @cached_property
    def of_kernels(self) -> bool:
        """Whether the call runs kernels of this backend only, and none of PyTorch's."""
        return self.pool is None and not any(step.config.stock for step in self.launches)

    @cached_property
    def tensors(self) -> tuple[Tensor, ...]:
        """The packed weights and biases of all launches, one after another."""
        return tuple(t for step in self.launches for t in step.packed if t is not None)

    def with_tensors(self, tensors: Iterator[Tensor]) -> TritonState:
        """Return the state with the next of ``tensors`` in place of its own."""

        def packed(own: FoldedWeights) -> FoldedWeights:
            found: list[Any] = [None if t is None else next(tensors) for t in own]
            return FoldedWeights(*found)

        return replace(self, launches=tuple([step._replace(packed=packed(step.packed)) for step in self.launches]))

    @property
    def fusion(self) -> str:
        """The fusion plan of :mod:`resnet_fast.roofline.byte_model` that the launches follow."""
        plan = self.chosen.route.fusion
        return "tail" if plan == "stem" else plan

    def steps(self) -> Iterator[tuple[LaunchSpec, Config]]:
        """Yield each launch with its config."""
        return ((step.launch, step.config) for step in self.launches)

    def __str__(self) -> str:
        return "; ".join(text for text in (str(self.chosen), str(self.passes)) if text)


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
    """Return the fastest plan whose configs are proved on ``device`` or need no proof.

    An ``invariant`` problem keeps its plan until a table is written: a proof that becomes possible between two batch
    sizes must not give them different configs.
    """
    if not spec.invariant:
        return _settled(spec, device)
    with _planning:
        return _kept_plan(planned(spec), device, table_version(device)).of(spec)


_planning = ForkSafeLock()  # two threads might settle on different plans


@lru_cache(maxsize=4096)
def _kept_plan(spec: Spec, device: torch.device, version: object) -> LaunchPlan:
    return _settled(spec, device)


def _settled(spec: Spec, device: torch.device) -> LaunchPlan:
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


def run(call: Call, spec: Spec, state: TritonState) -> Tensor:
    """Run a call: in one native submission, or launch by launch."""
    leaves = [entering(call.x, spec, state), None if call.added is None else nhwc(call.added)]

    def launchers(given: list[Any]) -> list[Tensor]:
        x, added, *weights = given
        return [launch_all(x, added, state.with_tensors(iter(weights)))]

    def singly(given: list[Any]) -> list[Tensor]:
        return [launch_all(given[0], given[1], state)]

    return in_layout(state.passes.run("call", launchers, leaves, lambda: state.tensors, singly)[0], spec.layout)


def entering(x: Tensor, spec: Spec, state: TritonState) -> Tensor:
    """Return ``x`` as the launches read it: dense images, except that the stem's own kernel takes any strides."""
    if spec.pool is None or state.pool is not None or state.launches[0].config.stock:
        return dense_images(x)
    return x


def launch_all(x: Tensor, added: Tensor | None, state: TritonState, counters: Tensor | None = None) -> Tensor:
    """Run the launches of a call one after another, and return the output in NHWC.

    Args:
        x: the input, of :func:`entering`.
        added: the tensor that the call adds, dense NHWC, or None.
        state: the launches.
        counters: zeros of :func:`~.launch.arrivals` for split-K launches; None to make them here.
    """
    if counters is None:
        counters = arrivals(state.steps(), x)
    y, shortcut = x, added
    for launch, config, packed, launcher, makes_shortcut in state.launches:
        split = {} if config.splits == 1 else {"arrivals": counters}
        if makes_shortcut:
            shortcut = launcher(launch, config, packed, x, None, None, **split)
            continue
        res = None
        if launch.residual:
            res = nhwc(x) if shortcut is None else shortcut
        y = launcher(launch, config, packed, y, res, x if launch.projection is not None else None, **split)
    return y if state.pool is None else F.max_pool2d(y, *state.pool)
