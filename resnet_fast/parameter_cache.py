"""Cache of values derived from parameters (folded, packed weights), dropped as soon as a parameter changes.

Nothing is stored on a module, so ``state_dict``, ``deepcopy`` and pickling never see a derived tensor. An entry is
identified by its source tensors and is dropped when the first of them is deleted. Before each use the sources are
compared with their state when the entry was made:

* storage address, shape, strides, dtype and autograd version counter. This covers every in-place operation that PyTorch
  tracks, ``load_state_dict``, optimizers, ``.to()`` and ``p.data = ...``;
* on the CPU also the values, because writes through ``.data`` and BatchNorm's update of its running statistics change
  no version counter. Vectors are compared in full. Of a filter tensor, one element of each filter and each input
  channel is compared at every use (:class:`Samples`), and the sums of another 1/64 of all filters
  (:class:`FilterSums`).

A write through ``.data`` to a vector, a whole filter or a whole input channel is therefore detected at the next use,
and one to any other elements within 64 uses. Until then results use the old weights. Where that matters, bump the
version (``p.add_(0)`` under ``no_grad``) or call :func:`clear`. A write that preserves all samples and all sums is
never detected; it would have to be constructed for that purpose.

Tensors made under ``inference_mode`` have no version counter, and a view with gaps is not one run of memory. For these
a copy is kept and compared in full.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterable
from operator import attrgetter
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .locks import ForkSafeLock

T = TypeVar("T")
Sources = tuple[Tensor | None, ...]

USES_PER_ROUND = 64
"""Uses of an entry within which every element of its filters is compared."""

# C functions, mapped over hundreds of tensors at each call
_version, _shape, _dtype = attrgetter("_version"), attrgetter("shape"), attrgetter("dtype")
_data_ptr, _stride = Tensor.data_ptr, Tensor.stride

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_COLUMNS = 509  # 8-byte words per row; prime, so that permuting filters or channels changes the sums
_ROWS = 64
_cache: dict[tuple[int, ...], CacheEntry] = {}  # identities of the sources -> entry
_counters: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # running mean -> version of its batch counter


class Samples:
    """Runs of memory, each with the places of its samples (None: all of it), and their values at first.

    The loops are C functions and comprehensions: this reads hundreds of runs at each call.
    """

    __slots__ = ("_runs", "_sampled", "_sampled_seen", "_seen")

    def __init__(self, watched: list[tuple[np.ndarray, np.ndarray | None]]):
        self._runs = [run for run, places in watched if places is None]
        self._sampled = [(run, places) for run, places in watched if places is not None]
        self._seen = self._read()
        self._sampled_seen = self._read_sampled()

    def _read(self) -> list[bytes]:
        return list(map(np.ndarray.tobytes, self._runs))

    def _read_sampled(self) -> list[bytes]:
        # All places are inside: "wrap" has less to do than "raise".
        return [run.take(places, mode="wrap").tobytes() for run, places in self._sampled]

    def hold(self) -> bool:
        """Return whether no sample changed."""
        return self._read() == self._seen and self._read_sampled() == self._sampled_seen


def places_of_samples(t: Tensor) -> np.ndarray:
    """Return offsets of one element of each filter and each input channel of ``t`` (Co, Ci, ...)."""
    co, ci = t.shape[:2]
    window = t[0, 0].numel()
    i = np.arange(max(co, ci))
    # Channels beyond the number of filters are sampled in the first filter: its elements share cache lines.
    place = np.where(i < co, i, 0) * t.stride(0) + i % ci * t.stride(1)
    if t.dim() == 4:
        at = (7 * i + window // 2) % window  # vary the tap: a flipped filter keeps its centre
        place += at // t.shape[3] * t.stride(2) + at % t.shape[3] * t.stride(3)
    return np.sort(place)


class FilterSums:
    """Sums over chunks of many runs of memory. Each use compares some of them, a round of uses all of them.

    A chunk is summed as rows of 64-bit words, one sum per column, so that the position of a value matters.
    """

    __slots__ = ("chunks", "next", "per_use", "seen")

    def __init__(self, runs: list[np.ndarray]):
        self.chunks: list[tuple[np.ndarray, np.ndarray]] = []
        for run in runs:
            octets = run.view(np.uint8)
            rows = octets.size // (8 * _COLUMNS)
            body = octets[: rows * 8 * _COLUMNS].view(np.int64).reshape(rows, _COLUMNS)
            none = octets[:0]
            self.chunks += [(body[at : at + _ROWS], none) for at in range(0, rows, _ROWS)]
            if octets.size > body.nbytes:
                self.chunks.append((body[:0], octets[body.nbytes :]))
        self.seen = [self._read(i) for i in range(len(self.chunks))]
        self.per_use = -(-len(self.chunks) // USES_PER_ROUND)
        self.next = 0

    def _read(self, i: int) -> int:
        body, rest = self.chunks[i]
        return hash((body.sum(0).tobytes() if body.size else b"", rest.tobytes()))

    def hold(self) -> bool:
        """Return whether the next chunks are unchanged."""
        for _ in range(self.per_use):
            i = self.next
            self.next = (i + 1) % len(self.chunks)
            if self._read(i) != self.seen[i]:
                return False
        return True


class Places:
    """Where tensors are in memory and how they lie there, whatever their values."""

    __slots__ = ("_addresses", "_dtypes", "_shapes", "_strides")

    def __init__(self, tensors: list[Tensor]):
        self._addresses = list(map(_data_ptr, tensors))
        # ``p.data = p.data[:32]`` or ``.permute(…)`` keep address and version
        self._shapes, self._strides = list(map(_shape, tensors)), list(map(_stride, tensors))
        self._dtypes = list(map(_dtype, tensors))

    def hold(self, tensors: list[Tensor]) -> bool:
        """Return whether these tensors are there. Compare lists: this runs for every parameter at every call."""
        return (
            list(map(_data_ptr, tensors)) == self._addresses
            and list(map(_shape, tensors)) == self._shapes
            and list(map(_stride, tensors)) == self._strides
            and list(map(_dtype, tensors)) == self._dtypes
        )


class Stamps:
    """The state of the sources when an entry was made. Keeps their memory alive, so that no address is reused."""

    def __init__(self, sources: Sources):
        tensors = [t for t in sources if t is not None]
        self.counted = [i for i, t in enumerate(tensors) if not t.is_inference()]
        self.all_counted = len(self.counted) == len(tensors)
        self.storages = [t.untyped_storage() for t in tensors]
        self.versions = [tensors[i]._version for i in self.counted]
        self.places = Places(tensors)
        watched: list[tuple[np.ndarray, np.ndarray | None]] = []
        self.copies: list[tuple[Tensor, Tensor]] = []
        runs = [run for t in tensors if t.device.type == "cpu" and t.numel() for run in self._watch(t, watched)]
        self.samples = Samples(watched)
        self.sums = FilterSums(runs) if runs else None

    def _watch(self, t: Tensor, watched: list[tuple[np.ndarray, np.ndarray | None]]) -> list[np.ndarray]:
        """Add what is sampled of ``t`` to ``watched``, and return the runs of memory that are to be summed."""
        bits = _BITS[t.element_size()]  # as integers: NaN equals itself, -0 is not 0
        if t.is_inference() or not _is_dense(t):
            words = t.detach().view(bits)
            self.copies.append((words, words.clone()))
            return []
        run: np.ndarray = torch.as_strided(t.detach(), (t.numel(),), (1,)).view(bits).numpy()
        if t.dim() < 2:
            watched.append((run, None))
            return []
        watched.append((run, places_of_samples(t)))
        return [run]

    def hold(self, sources: Sources) -> bool:
        """Return whether the sources are unchanged."""
        tensors = [t for t in sources if t is not None]
        return (
            self.places.hold(tensors)
            and self._same_versions(tensors)
            and self.samples.hold()
            and (self.sums is None or self.sums.hold())
            and all([torch.equal(words, copy) for words, copy in self.copies])
        )

    def hold_every_sum(self) -> bool:
        """Return whether no element of a filter changed, as a round of :meth:`hold` would find out."""
        return self.sums is None or all(self.sums.hold() for _ in range(USES_PER_ROUND))

    def _same_versions(self, tensors: list[Tensor]) -> bool:
        counted = tensors if self.all_counted else [tensors[i] for i in self.counted]
        try:
            return list(map(_version, counted)) == self.versions
        except RuntimeError:  # it became an inference tensor
            return False


def _is_dense(t: Tensor) -> bool:
    """Return whether the tensor fills one run of memory, in any order of its dimensions."""
    return t.is_contiguous() or (t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last))


class CacheEntry:
    """Everything derived from one set of sources, by key, least recently used first. Hold ``lock`` to use it.

    Attributes:
        alive: False once the entry was forgotten. Whoever keeps it then has to ask for another.
        notes: state of the caller that survives a change of the sources' values.
    """

    __slots__ = ("__weakref__", "_refs", "_stamps", "alive", "lock", "notes", "values")

    def __init__(self, sources: Sources, identity: tuple[int, ...]):
        def forget(_: object) -> None:
            _drop(identity)

        # A callback may run at any time, also inside a locked section. Removing a key needs no lock.
        self._refs = [weakref.ref(t, forget) for t in sources if t is not None]
        self._stamps: Stamps | None = None
        self.alive = True
        self.lock = ForkSafeLock()  # per entry: one net's packing or compiling blocks no other net
        self.values: dict[Hashable, Any] = {}
        self.notes: Any = None

    def find(self, sources: Sources, key: Hashable, trusted: bool = False) -> Any:
        """Return the value of ``key``; None if there is none. If a source changed, drop all values first.

        Args:
            trusted: the caller's user promised that no source changed (:func:`resnet_fast.freeze`); compare none.
        """
        if self._stamps is None:
            return None
        if not trusted and not self._stamps.hold(sources):
            self._stamps = None
            self.values = {}
            return None
        values = self.values
        if key not in values:
            return None
        if len(values) > 1 and next(reversed(values)) != key:
            values[key] = values.pop(key)
        return values[key]

    def make(self, sources: Sources, key: Hashable, make: Callable[[dict[Any, Any]], T]) -> T:
        """Compute and keep a value. ``make`` receives the values of other keys, so that it can share parts."""
        if self._stamps is None:  # before reading the sources, so that a concurrent write counts as a change
            self._stamps = Stamps(sources)
        made = make(self.values)
        self.values[key] = made
        return made

    def shrink(self, fits: Callable[[dict[Any, Any]], bool]) -> None:
        """Drop the least recently used values until ``fits(values)`` or one is left."""
        while len(self.values) > 1 and not fits(self.values):
            del self.values[next(iter(self.values))]

    def leads(self, t: Tensor) -> bool:
        """Return whether ``t`` is the first of the sources."""
        return bool(self._refs) and self._refs[0]() is t


def entry(sources: Sources) -> CacheEntry:
    """Return the entry of exactly these tensors, None for an absent one. At least one must be a tensor."""
    identity = tuple([0 if t is None else id(t) for t in sources])
    found = _cache.get(identity)
    if found is None:
        if not any(identity):
            raise ValueError("expected a tensor among the sources, got none; compute what depends on nothing directly")
        found = _cache.setdefault(identity, CacheEntry(sources, identity))
    return found


def _drop(identity: tuple[int, ...]) -> None:
    dropped = _cache.pop(identity, None)
    if dropped is not None:  # whoever keeps the entry keeps neither its values nor weak references to the sources
        dropped.alive = False
        dropped._stamps, dropped._refs, dropped.values = None, [], {}


def get(
    sources: Sources,
    key: Hashable,
    make: Callable[[dict[Any, Any]], T],
    keep: int = 8,
    known: CacheEntry | None = None,
    trusted: bool = False,
) -> T:
    """Return ``make(values)``, computed if a source changed or ``key`` is new, otherwise the cached result.

    Args:
        sources: the parameters and buffers that the result is computed from, None where absent; at least one tensor.
        key: what else it depends on (input size, dtype).
        make: computes it, never None. Its argument holds the values of other keys for the same sources.
        keep: number of keys to keep per set of sources; the least recently used is dropped first.
        known: the living entry of exactly these sources, if the caller kept it.
        trusted: as for :meth:`CacheEntry.find`.
    """
    found = known or entry(sources)
    with found.lock:
        value = found.find(sources, key, trusted)
        if value is None:
            value = found.make(sources, key, make)
            found.shrink(lambda values: len(values) <= keep)
        return value


def follow(t: Tensor, counter: Tensor | None) -> None:
    """Mark values derived from ``t`` as stale if ``counter`` was written since the last call with these two.

    BatchNorm's update of its running statistics changes the version counter of ``num_batches_tracked`` only. On the CPU
    the statistics themselves are compared; elsewhere this function increments their version.
    """
    if counter is None or counter.is_inference() or t.is_inference():
        return
    seen = _counters.get(t)
    if seen != counter._version:
        _counters[t] = counter._version
        if seen is not None:
            torch.autograd.graph.increment_version(t)


def values_of(t: Tensor) -> list[Any]:
    """Return every cached value of sources that begin with ``t``."""
    return [value for found in list(_cache.values()) if found.leads(t) for value in list(found.values.values())]


def release(tensors: Iterable[Tensor]) -> None:
    """Forget everything derived from any of ``tensors``, and with it every weak reference to them.

    ``torch.utils.swap_tensors`` refuses a tensor that has weak references.
    """
    found = {id(t) for t in tensors}
    for identity in list(_cache):
        if not found.isdisjoint(identity):
            _drop(identity)


def drop_changed(tensors: Iterable[Tensor]) -> None:
    """Compare every element, and forget what was derived from any of ``tensors`` if one of its sources changed."""
    found = {id(t) for t in tensors}
    for identity, kept in list(_cache.items()):
        if not found.isdisjoint(identity):
            with kept.lock:
                sources = tuple([ref() for ref in kept._refs])
                stamps = kept._stamps
                if stamps is not None and not (stamps.hold(sources) and stamps.hold_every_sum()):
                    _drop(identity)


def clear() -> None:
    """Forget every derived tensor; the next call computes them again."""
    for identity in list(_cache):
        _drop(identity)
