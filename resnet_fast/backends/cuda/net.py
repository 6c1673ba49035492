"""Run the stem and every block of a net, one after another. The state of the net is the list of its parts' states."""

from __future__ import annotations

from torch import Tensor

from ...calls import NetCall
from ...spec import NetSpec
from . import plan
from .plan import CudaState


def prepare(call: NetCall, spec: NetSpec, earlier: list[list[CudaState]]) -> list[CudaState]:
    """Prepare every part."""
    return [
        plan.prepare(part._replace(x=call.x), part_spec, [states[i] for states in earlier])
        for i, (part, part_spec) in enumerate(zip(call.parts, spec.parts, strict=True))
    ]


def run(call: NetCall, spec: NetSpec, state: list[CudaState]) -> Tensor:
    """Return the last block's output."""
    x = call.x
    for part, part_spec, part_state in zip(call.parts, spec.parts, state, strict=True):
        x = plan.run(part._replace(x=x), part_spec, part_state)
    return x
