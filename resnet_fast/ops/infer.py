"""Inference: check, Spec, choice and derived weights of a call, computed once and kept until something changes.

What is kept hangs on the call's parameters (:mod:`resnet_fast.parameter_cache`, which sees every change of them)
under all else that decides: the input's shape, strides, dtype and device, the numbers of the call, the backend asked
for and the backends that work. A call like an earlier one costs one look-up.

Where preparing costs more than a call or two, it has to pay (:mod:`resnet_fast.packing_budget`); until it does, the
call runs on the stock layers' operations. What was asked for by name is prepared at once, and so is what ``explain``
wants to see, what runs in strict mode, and what must not depend on earlier calls
(:func:`resnet_fast.packing_budget.at_once`).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .. import packing_budget, parameter_cache
from ..calls import Call, NetCall
from ..dispatch import catalog, record, select
from ..impl import Choice, Impl
from ..spec import NetSpec, Spec
from .specs import spec_of

BLOCK_SIZES, NET_SIZES = 8, 3
"""Input sizes kept at a time by backends that do not count the memory of their states."""

COPIES = 3
"""Memory that the states of one set of parameters may take, in fp32 copies of its weights."""

SIZES = 64
"""Input sizes kept at a time at most, however little memory they take."""

NOT_YET = (
    "expected more calls with these weights and this input size, to make up for folding and packing them; until then "
    "the stock layers' operations run, use_backend({!r}) packs at once"
)


@dataclass(slots=True)
class Prepared:
    """All that is needed to run a call. ``earns``: what a call adds to the account of its parameters; ``used``: when it
    last did."""

    spec: Spec | NetSpec
    choice: Choice
    state: Any
    earns: float = 0.0
    used: int = 0


def infer(call: Call, backend: str) -> Tensor:
    """The result of a call without autograd."""
    plan = prepared(call, backend)
    return select.execute(call, plan.spec, plan.choice, plan.state)


def infer_tiles(call: NetCall, tile: int, backend: str) -> Iterator[Tensor]:
    """The results of ``call`` for ``tile`` images of its batch at a time; parameters are looked at once per size."""
    plan: Prepared | None = None
    for x in call.x.split(tile) if tile < call.x.shape[0] else (call.x,):
        part = call._replace(x=x)
        if plan is None or plan.spec.n != x.shape[0]:
            plan = prepared(part, backend, max(1, call.x.shape[0] // tile))
        yield select.execute(part, plan.spec, plan.choice, plan.state)


def prepared(call: Call | NetCall, backend: str, times: int = 1) -> Prepared:
    """What runs ``call`` and, with other numbers in ``x``, ``times`` calls in all."""
    x = call.x
    parameters = call.parameters()
    if not catalog.prepares(x.device.type) or call.batch_stats:
        spec = spec_of(call, grad=False)
        choice = select.choose(spec, x.device.type, backend)
        return Prepared(spec, choice, select.prepare(call, spec, choice, []))
    fixed = (call.numbers(), x.dtype, x.device, select.requested(backend), catalog.fingerprint())
    key = (fixed, x.shape, x.stride())
    entry = parameter_cache.entry(parameters)
    with entry.lock:
        plan: Prepared | None = entry.find(parameters, key)
        if plan is None:
            plan = _new(entry, call, parameters, key, backend)
        elif getattr(plan.state, "grown", False):
            plan.state.grown = False
            _shrink(entry, plan)
        if entry.notes is not None:
            plan.used = entry.notes.earn(times * plan.earns)
    return plan


def _new(
    entry: parameter_cache.CacheEntry,
    call: Call | NetCall,
    parameters: parameter_cache.Sources,
    key: tuple[Any, ...],
    backend: str,
) -> Prepared:
    """A plan for a call that none is kept for: kept from now on, or for this call alone where that does not pay."""
    spec = spec_of(call, grad=False)
    choice = select.choose(spec, call.x.device.type, backend)
    if not all(spec.out_shape()):
        return Prepared(spec, choice, None)
    upkeep = choice.impl.upkeep
    earlier = [plan.state for other, plan in entry.values.items() if other[0] == key[0]]  # type: ignore[index]
    work = packing_budget.of_stock_call(spec.flops(), len(spec.convs)) if upkeep else 0.0
    named = select.requested(backend) != "auto"
    at_once = named or packing_budget.is_at_once() or record.watched() or record.is_strict()
    if upkeep and not at_once:
        if entry.notes is None:
            entry.notes = packing_budget.PackingBudget(packing_budget.PACK * upkeep.elements(call, spec, []))
        version = None if entry.values else _version(parameters)
        elements = upkeep.elements(call, spec, earlier)
        room = _has_room(entry, choice.impl, spec, elements, entry.notes.seen(key))
        if not room or not entry.notes.pays(packing_budget.PACK * elements, version):
            stock = select.stock(spec, choice, NOT_YET.format(choice.impl.backend))
            return Prepared(spec, stock, None, packing_budget.earned_by(work, packed=False))

    def make(kept: dict[Any, Prepared]) -> Prepared:
        state = select.prepare(call, spec, choice, earlier)
        return Prepared(spec, choice, state, packing_budget.earned_by(work, packed=True))

    plan = entry.make(parameters, key, make)
    _shrink(entry, plan)
    return plan


def _shrink(entry: parameter_cache.CacheEntry, plan: Prepared) -> None:
    """Drop the plans used least recently until the rest keeps to its share of memory."""
    impl = plan.choice.impl
    if impl.upkeep is None:
        keep = NET_SIZES if plan.spec.op == "net" else BLOCK_SIZES
        entry.shrink(lambda values: len(values) <= keep)
    else:
        most = _most(plan.spec)
        entry.shrink(lambda values: len(values) <= SIZES and _nbytes(impl, values) <= most)


def _has_room(entry: parameter_cache.CacheEntry, impl: Impl, spec: Spec | NetSpec, elements: int, seen: int) -> bool:
    """May so many elements be packed besides what is kept, or in place of a plan that was used less recently than this
    call was ``seen``? Otherwise sizes that come in turn would push each other out, and none would be there in time."""
    if not elements or not entry.values or _nbytes(impl, entry.values) + 4 * elements <= _most(spec):
        return True
    oldest: Prepared = next(iter(entry.values.values()))
    return oldest.used < seen


def _most(spec: Spec | NetSpec) -> int:
    return COPIES * 4 * spec.params()


def _nbytes(impl: Impl, plans: dict[Hashable, Prepared]) -> int:
    states = [plan.state for plan in plans.values() if plan.choice.impl is impl]
    return impl.upkeep.nbytes(states) if impl.upkeep else 0


def _version(parameters: parameter_cache.Sources) -> Hashable:
    """Changes with most edits of the parameters: enough to tell weights that stay from weights that do not."""
    return tuple([0 if t is None or t.is_inference() else t._version for t in parameters])
