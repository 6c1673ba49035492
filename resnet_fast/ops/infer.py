"""Inference: check, Spec, choice and derived weights of a call, computed once and kept until something changes.

What is kept hangs on the call's parameters (:mod:`resnet_fast.derived`, which sees every change of them) under all else
that decides: the input's shape, strides, dtype and device, the numbers of the call, the backend asked for and the
backends that work. A call like an earlier one costs one look-up.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor

from .. import derived
from ..calls import Call, NetCall
from ..dispatch import catalog, select
from ..spec import NetSpec, Spec
from .check import spec_of

BLOCK_SIZES, NET_SIZES = 8, 3
"""Input sizes kept at a time: a detector's blocks see many, a classifier's whole net a batch and a remainder."""


class Plan(NamedTuple):
    """All that is needed to run a call."""

    spec: Spec | NetSpec
    choice: select.Choice
    state: Any


def infer(call: Call, backend: str) -> Tensor:
    """The result of a call without autograd."""
    plan = _plan(call, backend)
    return select.execute(call, plan.spec, plan.choice, plan.state)


def infer_tiles(call: NetCall, tile: int, backend: str) -> Iterator[Tensor]:
    """The results of ``call`` for ``tile`` images of its batch at a time; parameters are looked at once per size."""
    plan: Plan | None = None
    for x in call.x.split(tile) if tile < call.x.shape[0] else (call.x,):
        part = call._replace(x=x)
        if plan is None or plan.spec.n != x.shape[0]:
            plan = _plan(part, backend)
        yield select.execute(part, plan.spec, plan.choice, plan.state)


def _plan(call: Call | NetCall, backend: str) -> Plan:
    x = call.x
    parameters = call.parameters()
    numbers = call.numbers()
    anchored = any(p is not None for p in parameters)
    if not anchored or not catalog.prepares(x.device.type) or call.batch_stats:
        spec = spec_of(call, grad=False)
        choice = select.choose(spec, x.device.type, backend)
        return Plan(spec, choice, select.prepare(call, spec, choice, []))
    fixed = (type(call), numbers, x.dtype, x.device, select.requested(backend), catalog.fingerprint())

    def make(kept: dict[Any, Plan]) -> Plan:
        spec = spec_of(call, grad=False)
        choice = select.choose(spec, x.device.type, backend)
        earlier = [plan.state for key, plan in kept.items() if key[0] == fixed]
        return Plan(spec, choice, select.prepare(call, spec, choice, earlier))

    keep = NET_SIZES if isinstance(call, NetCall) else BLOCK_SIZES
    return derived.get(parameters, (fixed, x.shape, x.stride()), make, keep)
