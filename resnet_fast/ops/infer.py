"""Run inference: check a call, choose a backend, prepare its state, and keep all three until something changes.

They are kept with the call's parameters (:mod:`resnet_fast.parameter_cache` sees every change of these). The key is
everything else that decides: the input's shape, strides, dtype and device, the numbers of the call, the requested
backend and the available backends. A call like an earlier one costs one look-up.

If preparing costs more than a call or two, it must pay off (:mod:`resnet_fast.packing_budget`); until it does, the
call runs the stock layers' operations. A state is prepared immediately if its backend was requested by name, for
``explain``, in strict mode, and if results must not depend on earlier calls
(:func:`resnet_fast.packing_budget.at_once`).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import invariance, packing_budget, parameter_cache
from ..calls import Call, NetCall
from ..dispatch import catalog, record, select
from ..impl import Choice, Impl
from ..spec import NetSpec, Spec
from .ready import ready
from .specs import key_of, spec_of

BLOCK_SIZES, NET_SIZES = 8, 3
"""Number of input sizes to keep for backends that do not count the memory of their states."""

COPIES = 3
"""Maximum memory of the states of one set of parameters, in fp32 copies of its weights."""

SIZES = 64
"""Maximum number of input sizes to keep, however little memory they take."""

NOT_YET = (
    "expected more calls with these weights and this input size, to make up for folding and packing them; until then "
    "the stock layers' operations run, use_backend({!r}) packs at once"
)


@dataclass(slots=True)
class Prepared:
    """Everything that is needed to run a call.

    Attributes:
        spec: the problem.
        choice: the backend.
        state: what the backend prepared; None if there is nothing to prepare.
        earns: what a call adds to the packing budget of its parameters.
        used: number of the last call, as the packing budget counts them.
    """

    spec: Spec | NetSpec
    choice: Choice
    state: Any
    earns: float = 0.0
    used: int = 0


class Numbers:
    """The numbers of a call as part of a key. They are many, so their hash is computed once."""

    __slots__ = ("_hash", "_values")

    def __init__(self, call: Call | NetCall):
        self._values = call.numbers()
        self._hash = hash(self._values)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Numbers) and self._values == other._values)


class Known:
    """What is the same in all calls of one net while its layers and tensors are the same."""

    __slots__ = ("_entry", "numbers", "parameters")

    def __init__(self, call: Call | NetCall):
        self.parameters = call.parameters()
        self.numbers = Numbers(call)
        self._entry = parameter_cache.entry(self.parameters)

    def entry(self) -> parameter_cache.CacheEntry:
        """Return the cache's entry of the parameters."""
        if not self._entry.alive:
            self._entry = parameter_cache.entry(self.parameters)
        return self._entry


def infer(call: Call, backend: str) -> Tensor:
    """Return the result of a call without autograd."""
    if invariance.is_on():
        return infer_alike(call, backend)
    found = prepared(call, backend)
    return select.execute(call, found.spec, found.choice, found.state)


def infer_tiles(
    call: NetCall, tile: int, backend: str, known: Known | None = None, frozen: bool = False
) -> Iterator[Tensor]:
    """Yield the results of ``call`` for ``tile`` images of its batch at a time.

    Parameters are looked up once per tile size. ``known`` and ``frozen``: as for :func:`prepared`.
    """
    found: Prepared | None = None
    for x in call.x.split(tile) if tile < call.x.shape[0] else (call.x,):
        part = call._replace(x=x)
        if found is None or found.spec.n != x.shape[0]:
            found = prepared(part, backend, max(1, call.x.shape[0] // tile), known, frozen)
        yield select.execute(part, found.spec, found.choice, found.state)


def infer_alike(call: Call | NetCall, backend: str, known: Known | None = None, frozen: bool = False) -> Tensor:
    """Return the result of ``call`` in batch-invariant mode: as a whole, or image by image.

    ``known`` and ``frozen``: as for :func:`prepared`.

    Raises:
        BackendError: the batch is too large for the backend that runs its images.
    """
    x = call.x
    # everything that decides is in the key, as in that of a spec
    key = key_of(call, False), select.requested(backend), catalog.fingerprint()
    way = _ways.get(key)
    if way is None:
        way = _decide_alike(call, backend)
        if len(_ways) >= KEEP:
            _ways.clear()
        _ways[key] = way
    if way.whole:
        return _execute(_alike(call), backend, 1, known, frozen)
    n = x.shape[0]
    y = torch.empty((n, *way.out), dtype=x.dtype, device=x.device, memory_format=way.layout)
    one = known  # of every image, which differ in their values alone
    for i in range(n):
        image = _alike(_image(call, i))
        if one is None and catalog.prepares(x.device) and not image.batch_stats:
            one = Known(image)
        y[i : i + 1] = _execute(image, backend, n, one, frozen)
    return y


class _Alike(NamedTuple):
    """How calls run in batch-invariant mode: as a ``whole``, or by images with outputs of this shape and layout."""

    whole: bool
    out: tuple[int, ...]
    layout: torch.memory_format


KEEP = 4096
_ways: dict[Any, _Alike] = {}


def _decide_alike(call: Call | NetCall, backend: str) -> _Alike:
    """Choose for one image, and for the whole batch where that backend may run it."""
    spec: Spec | NetSpec = spec_of(_image(call, 0), grad=False)
    choice = select.choose(spec, call.x.device, backend)
    whole = select.runs_batches_alike(call, spec_of(call, grad=False), choice, backend)
    layout = torch.channels_last if spec.layout == "nhwc" else torch.contiguous_format
    return _Alike(whole, tuple(spec.out_shape()[1:]), layout)


def _execute(call: Call | NetCall, backend: str, times: int, known: Known | None, frozen: bool) -> Tensor:
    found = prepared(call, backend, times, known, frozen)
    return select.execute(call, found.spec, found.choice, found.state)


def _image(call: Any, i: int) -> Any:
    """Return the call on one image of its batch; on an empty batch if it has none."""
    image = call._replace(x=call.x[i : i + 1])
    if call.op == "net" or call.added is None:
        return image
    return image._replace(added=call.added[i : i + 1])


def _alike(call: Any) -> Any:
    """Return the call with its activations as :func:`~resnet_fast.invariance.alike` returns them."""
    call = call._replace(x=invariance.alike(call.x))
    if call.op == "net" or call.added is None:
        return call
    return call._replace(added=invariance.alike(call.added))


def prepared(
    call: Call | NetCall,
    backend: str,
    times: int = 1,
    known: Known | None = None,
    frozen: bool = False,
    compiled: bool = False,
) -> Prepared:
    """Return what runs ``call``, from the cache if possible.

    Args:
        call: the call.
        backend: the requested backend.
        times: number of calls that will use the result.
        known: what the caller knows of such calls, none of which uses batch statistics.
        frozen: the user promised that the parameters' values did not change.
        compiled: whether its kernels are compiled. Otherwise a call that is not in the cache compiles them first,
            without the entry's lock, so that other calls with these parameters go on meanwhile.
    """
    x = call.x
    if not catalog.prepares(x.device) or (known is None and call.batch_stats):
        spec = spec_of(call, grad=False)
        choice = select.choose(spec, x.device, backend)
        return Prepared(spec, choice, select.prepare(call, spec, choice, []))
    known = known or Known(call)
    parameters, entry = known.parameters, known.entry()
    fixed = (known.numbers, x.dtype, x.device, select.requested(backend), catalog.fingerprint())
    key = (fixed, x.shape, x.stride())
    with entry.lock:
        found: Prepared | None = entry.find(parameters, key, frozen)
        if found is not None:
            if getattr(found.state, "grown", False):
                found.state.grown = False
                _shrink(entry, found)
        elif compiled or not catalog.compiles(x.device):
            found = _new(entry, call, parameters, key, backend)
        if found is not None:
            if entry.notes is not None:
                found.used = entry.notes.earn(times * found.earns)
            return found
    spec = spec_of(call, grad=False)
    ready(call, spec, select.choose(spec, x.device, backend).impl)
    return prepared(call, backend, times, known, frozen, compiled=True)


def _new(
    entry: parameter_cache.CacheEntry,
    call: Call | NetCall,
    parameters: parameter_cache.Sources,
    key: tuple[Any, ...],
    backend: str,
) -> Prepared:
    """Prepare a call that is not in the cache. It is added there, unless packing does not pay off yet."""
    spec = spec_of(call, grad=False)
    choice = select.choose(spec, call.x.device, backend)
    if not all(spec.out_shape()):
        return Prepared(spec, choice, None)
    impl = choice.impl
    upkeep = impl.upkeep
    same = [found for other, found in entry.values.items() if other[0] == key[0]]  # type: ignore[index]
    earlier = [found.state for found in same if found.choice.impl is impl]
    work = packing_budget.of_stock_call(spec.flops(), len(spec.convs)) if upkeep else 0.0
    named = select.requested(backend) != "auto"
    at_once = named or spec.invariant or packing_budget.is_at_once() or record.watched() or record.is_strict()
    if upkeep and not at_once:
        if entry.notes is None:
            entry.notes = packing_budget.PackingBudget(packing_budget.PACK * upkeep.elements(call, spec, []))
        version = None if entry.values else _version(parameters)
        elements = upkeep.elements(call, spec, earlier)
        room = _has_room(entry, impl, spec, elements, entry.notes.seen(key))
        if not room or not entry.notes.pays(packing_budget.PACK * elements, version):
            stock = select.stock(spec, choice, NOT_YET.format(impl.backend))
            return Prepared(spec, stock, None, packing_budget.earned_by(work, packed=False))

    def make(kept: dict[Any, Prepared]) -> Prepared:
        state = select.prepare(call, spec, choice, earlier)
        return Prepared(spec, choice, state, packing_budget.earned_by(work, packed=True))

    found = entry.make(parameters, key, make)
    _shrink(entry, found)
    return found


def _shrink(entry: parameter_cache.CacheEntry, found: Prepared) -> None:
    """Drop the least recently used entries until the others fit the limits above."""
    impl = found.choice.impl
    if impl.upkeep is None:
        keep = NET_SIZES if found.spec.op == "net" else BLOCK_SIZES
        entry.shrink(lambda values: len(values) <= keep)
    else:
        most = _most(found.spec)
        entry.shrink(lambda values: len(values) <= SIZES and _nbytes(impl, values) <= most)


def _has_room(entry: parameter_cache.CacheEntry, impl: Impl, spec: Spec | NetSpec, elements: int, seen: int) -> bool:
    """Return whether ``elements`` more may be packed.

    They may if they fit, or can replace an entry that was used before this call was last ``seen``. Without the second
    condition, input sizes that alternate would evict each other, and none would be in the cache when it is needed.
    """
    if not elements or not entry.values or _nbytes(impl, entry.values) + 4 * elements <= _most(spec):
        return True
    oldest: Prepared = next(iter(entry.values.values()))
    return oldest.used < seen


def _most(spec: Spec | NetSpec) -> int:
    """Return the maximum memory of the states of one set of parameters, in bytes."""
    return COPIES * 4 * spec.params()


def _nbytes(impl: Impl, kept: dict[Hashable, Prepared]) -> int:
    states = [found.state for found in kept.values() if found.choice.impl is impl]
    return impl.upkeep.nbytes(states) if impl.upkeep else 0


def _version(parameters: parameter_cache.Sources) -> Hashable:
    """Return a value that changes with most edits of the parameters, which is enough for the packing budget."""
    return tuple([0 if t is None or t.is_inference() else t._version for t in parameters])
