"""Decide when packing and compiling a net's weights pays, so that inference is never much slower than stock layers.

Packing a net's weights takes as long as a few of its calls, and compiling it as long as dozens. Both are lost when the
weights or the input size change, so both are paid for from a budget that calls fill. Work is counted in FLOPs that the
stock layers do in the same time. Clocks would make what runs depend on the load of the machine:

    a call on the stock layers        its FLOPs + LAYER per convolution           earns ALLOWED of it
    a call with packed weights        the same                                    earns ALLOWED + SAVED of it
    folding and packing               PACK per element of the weights             costs that
    compiling a net                   COMPILE per convolution                     costs that

A :class:`PackingBudget` starts with the cost of two packings of all weights, so a new net is fast from its first call
and at a second input size. After that it packs when the balance covers the cost; until then the stock layers run. At no
time has the net taken more than 1 + ALLOWED times the stock layers' time, not counting its first packings. Weights that
changed since the last call are packed when they are seen for the second time: weights that change before each call (a
teacher's moving average) are never packed.

The measurements for these constants are in docs/notes/derived-weights.md.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

LAYER = 6e6
"""FLOPs that take as long as the overhead of one convolution call."""

PACK = 600.0
"""FLOPs that take as long as packing one element of the weights."""

COMPILE = 1.2e9
"""FLOPs that take as long as compiling one convolution of a net."""

ALLOWED, SAVED = 0.1, 0.2
"""Parts of a call's work: what a net may take longer than the stock layers, and what packed weights save."""

FIRST = 2.0
"""Packings of all weights in a new net's balance."""

MOST = 8.0
"""Packings of all weights at which a balance stops growing."""

KEYS = 256
"""Kinds of call without packed weights that a budget remembers."""

_at_once: ContextVar[bool] = ContextVar("resnet_fast_pack_at_once", default=False)


@contextmanager
def at_once() -> Iterator[None]:
    """Inside the ``with``, pack weights at their first call, whether it pays or not.

    Validation uses this: its results must depend on weights and inputs only, not on earlier calls, to the last bit.
    """
    before = _at_once.set(True)
    try:
        yield
    finally:
        _at_once.reset(before)


def is_at_once() -> bool:
    """Return whether this thread is inside :func:`at_once`."""
    return _at_once.get()


def of_stock_call(flops: float, convolutions: int) -> float:
    """Return the work of one call on the stock layers, in FLOPs."""
    return flops + LAYER * convolutions


def earned_by(work: float, packed: bool) -> float:
    """Return the FLOPs that a call of this work earns."""
    return work * (ALLOWED + SAVED if packed else ALLOWED)


class PackingBudget:
    """The balance of one set of parameters, in FLOPs. Changing the parameters' values does not reset it.

    Args:
        whole: the cost of packing all of them.
    """

    __slots__ = ("_calls", "_seen", "balance", "latest", "whole")

    def __init__(self, whole: float):
        self.whole = whole
        self.balance = FIRST * whole
        self.latest: Hashable = None  # the weights' version in the last call that had nothing packed
        self._calls = 0
        self._seen: dict[Hashable, int] = {}

    def earn(self, work: float) -> int:
        """Add what a call earned, and return the number of the call."""
        self.balance = min(self.balance + work, MOST * self.whole)
        self._calls += 1
        return self._calls

    def seen(self, key: Hashable) -> int:
        """Return the number of the last call of kind ``key`` without packed weights; 0 if there was none."""
        before = self._seen.pop(key, 0)
        self._seen[key] = self._calls + 1
        if len(self._seen) > KEYS:
            del self._seen[next(iter(self._seen))]
        return before

    def pays(self, cost: float, version: Hashable) -> bool:
        """Subtract the cost of packing these weights, if the balance covers it and they are likely to stay.

        Args:
            cost: of packing, in FLOPs.
            version: identifies the weights' values; None if they did not change since the last packing.

        Returns:
            Whether to pack.
        """
        first, same = self.latest is None, version is None or version == self.latest
        if version is not None:
            self.latest = version
        if self.balance < cost or not (first or same):
            return False
        self.balance -= cost
        return True
