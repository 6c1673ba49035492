"""Derived tensors (folded, packed weights): computed once, kept until a parameter that they came from changes.

Nothing is stored on a module, so ``state_dict``, ``deepcopy`` and pickling never see a derived tensor; an entry dies
with the parameter it hangs on. Before each use the sources are compared with a *stamp* taken when the entry was made:

* identity, storage address and autograd version counter: every in-place operation that PyTorch tracks,
  ``load_state_dict``, optimizers, ``.to()``, ``p.data = …``;
* on the CPU also the memory itself, since writes through ``.data`` and BatchNorm's own update of its running statistics
  move no version counter: vectors in full, filters at 64 evenly spaced elements. A write
  through ``.data`` to single elements between those is not seen: bump the version (``p.add_(0)`` under ``no_grad``) or
  call :func:`clear`.

Tensors made under ``inference_mode`` have no version counter, and a view with gaps has no evenly spaced elements: of
these a copy is kept, and compared in full.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

T = TypeVar("T")

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_SAMPLES = 64  # each is a cache and a TLB miss at every call, after a net's worth of activations went by
_cache: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # first source -> number of sources -> entry
_counters: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # tensor -> version of the counter beside it
_lock = threading.RLock()  # a server calls one net from several threads


class _Stamp:
    """What one source looked like. Holds on to its memory, so that the address cannot be given to another tensor."""

    __slots__ = (
        "address", "copy", "data", "dtype", "identity", "seen", "shape", "storage", "stride", "version", "whole",
    )  # fmt: skip

    def __init__(self, t: Tensor):
        self.identity = id(t)
        self.address = t.data_ptr()
        self.storage = t.untyped_storage()
        # ``p.data = p.data[:32]`` or ``.permute(…)`` keep address and version
        self.shape, self.stride, self.dtype = t.shape, t.stride(), t.dtype
        self.version = None if t.is_inference() else t._version
        self.data: np.ndarray | None = None  # a vector, or every so many elements of a filter
        self.whole: Tensor | None = None  # compared in full with ``copy``
        if t.device.type == "cpu" and t.numel():
            dense = _is_dense(t)
            words = torch.as_strided(t.detach(), (t.numel(),), (1,)) if dense else t.detach()
            words = words.view(_BITS[t.element_size()])  # as integers: NaN equals itself, -0 is not 0
            if self.version is None or not dense:
                self.whole, self.copy = words, words.clone()
            elif t.dim() == 1:
                self.data = words.numpy()
            else:
                self.data = words[:: max(1, t.numel() // _SAMPLES)].numpy()
        self.seen = None if self.data is None else self.data.tobytes()

    def holds(self, t: Tensor) -> bool:
        """Is ``t`` still as it was when the stamp was taken? Runs for every parameter at every call: one expression."""
        return (
            id(t) == self.identity
            and t.data_ptr() == self.address
            and (t._version == self.version if self.version is not None else t.is_inference())
            and t.shape == self.shape
            and (self.data is None or self.data.tobytes() == self.seen)
            and t.stride() == self.stride
            and t.dtype == self.dtype
            and (self.whole is None or torch.equal(self.whole, self.copy))
        )


def _is_dense(t: Tensor) -> bool:
    """Does the tensor fill one run of memory, in whatever order of its dimensions?"""
    return t.is_contiguous() or (t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last))


class _Entry:
    """The stamps of one set of sources and everything derived from them, by key, least recently used first."""

    __slots__ = ("stamps", "values")

    def __init__(self, sources: tuple[Tensor | None, ...]):
        self.stamps = [None if t is None else _Stamp(t) for t in sources]
        self.values: dict[Hashable, Any] = {}

    def holds(self, sources: tuple[Tensor | None, ...]) -> bool:
        stamps = self.stamps
        if len(sources) != len(stamps):
            return False
        for t, stamp in zip(sources, stamps, strict=True):
            if stamp is None:
                if t is not None:
                    return False
            elif t is None or not stamp.holds(t):
                return False
        return True


def get(sources: tuple[Tensor | None, ...], key: Hashable, make: Callable[[dict[Any, Any]], T], keep: int = 8) -> T:
    """``make(values)``, computed when a source changed or ``key`` is new, otherwise the kept result.

    Args:
        sources: the parameters and buffers that the result is computed from, None where absent; at least one tensor.
        key: whatever else it depends on (input size, dtype).
        make: computes it; receives what is kept for the same sources under other keys, so that it can share parts.
        keep: how many keys to keep per set of sources; the least recently used goes first.
    """
    anchor = next((t for t in sources if t is not None), None)
    if anchor is None:
        raise ValueError("expected a tensor among the sources, got none; compute what depends on nothing directly")
    with _lock:
        # By number, since one parameter can lead several calls (a block, and the rest of a net from there on), which
        # must not push each other out.
        entries = _cache.setdefault(anchor, {})
        entry = entries.get(len(sources))
        if entry is None or not entry.holds(sources):
            entry = entries[len(sources)] = _Entry(sources)
        values: dict[Hashable, Any] = entry.values
        if key in values:
            if len(values) > 1 and next(reversed(values)) != key:
                values[key] = values.pop(key)
            return values[key]
        made = make(values)
        values[key] = made
        if len(values) > keep:
            del values[next(iter(values))]
        return made


def follow(t: Tensor, counter: Tensor | None) -> None:
    """Make values derived from ``t`` stale where ``counter`` was written since the last call with the two.

    BatchNorm's update of its running statistics moves no version counter, only that of ``num_batches_tracked`` beside
    them. On the CPU the statistics themselves are compared; elsewhere their version is moved here.
    """
    if counter is None or counter.is_inference() or t.is_inference():
        return
    seen = _counters.get(t)
    if seen != counter._version:
        _counters[t] = counter._version
        if seen is not None:
            torch.autograd.graph.increment_version(t)


def values_of(t: Tensor) -> list[Any]:
    """Every value that is kept for sources that begin with ``t``."""
    with _lock:
        return [value for entry in _cache.get(t, {}).values() for value in entry.values.values()]


def clear() -> None:
    """Forget every derived tensor; the next call computes them again."""
    with _lock:
        _cache.clear()
