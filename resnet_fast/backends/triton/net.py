"""Run the stem and every block of a net, one after another, without calling their Python modules.

    x -> stem -> block -> … -> block        NHWC throughout; the state of the net is the list of its parts' states

At batch 1 a ResNet-50 is predicted to take 0.3 to 0.4 ms on an H100, and 50 launches from Python take longer. So the
launches are planned once and submitted in one native call (:mod:`.submission`); ``accelerate(model, cuda_graph=True)``
records them once and replays them.
"""

from __future__ import annotations

from itertools import groupby
from operator import attrgetter
from typing import Any

from torch import Tensor

from ...calls import Call, NetCall
from ...spec import NetSpec, Spec
from ..layouts import in_layout
from . import plan
from .launch import arrivals, nhwc
from .plan import TritonState


def prepare(call: NetCall, spec: NetSpec, earlier: list[list[TritonState]]) -> list[TritonState]:
    """Prepare every part."""
    return [
        plan.prepare(part._replace(x=call.x), part_spec, [states[i] for states in earlier])
        for i, (part, part_spec) in enumerate(zip(call.parts, spec.parts, strict=True))
    ]


def run(call: NetCall, spec: NetSpec, state: list[TritonState]) -> Tensor:
    """Return the last block's output. Parts that run none of PyTorch's kernels are submitted together."""
    x, first = call.x, 0
    for together, group in groupby(state, attrgetter("of_kernels")):
        states = list(group)
        parts = slice(first, first + len(states))
        first += len(states)
        run_parts = _run_together if together else _run_singly
        x = run_parts(x, call.parts[parts], spec.parts[parts], states)
    return x


def _run_singly(x: Tensor, parts: tuple[Call, ...], specs: tuple[Spec, ...], states: list[TritonState]) -> Tensor:
    for part, spec, state in zip(parts, specs, states, strict=True):
        x = plan.run(part._replace(x=x), spec, state)
    return x


def _run_together(x: Tensor, parts: tuple[Call, ...], specs: tuple[Spec, ...], states: list[TritonState]) -> Tensor:
    """Run parts as one pass."""
    given = [None if part.added is None else nhwc(part.added) for part in parts]

    def launchers(tensors: list[Any]) -> list[Tensor]:
        x, *rest = tensors
        weights = iter(rest[len(states) :])
        counters = arrivals((step for state in states for step in state.steps()), x)
        for added, spec, state in zip(rest, specs, states, strict=False):
            x = plan.launch_all(plan.entering(x, spec, state), added, state.with_tensors(weights), counters)
        return [x]

    def weights() -> list[Tensor]:
        return [t for state in states for t in state.tensors]

    leaves = [plan.entering(x, specs[0], states[0]), *given]
    return in_layout(states[0].passes.run("net", launchers, leaves, weights)[0], specs[-1].layout)
