"""Bound the values inside a call, to prove before it runs that none of them can be NaN or infinity.

    |conv(x)| <= gain * max|x| + offset         gain = max over filters of sum |w|         offset = max |b|

oneDNN's ReLU is x86's maximum with 0, which turns NaN into 0, and no post-op that ATen offers for a sum keeps NaN
(docs/notes/nan-through-relu.md). So a call only runs if no NaN can occur. The weights determine how large an input may
be (its ``reach``) so that every value stays below :data:`LIMIT`. One pass over the input checks that it is within
reach, which NaN and infinity never are. An input that is not within reach runs on the reference.

The bounds hold for BatchNorm folded and for BatchNorm as a separate step. If oneDNN runs, the stock layers would not
overflow either, so results hold NaN and infinity exactly where stock PyTorch's do.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...spec import Verdict

LIMIT = 2.0**120  # of 2**128: room for rounding, to 16 bit as well, and for any order of the sums
COMFORT = 2.0**30  # least reach of an input; a chain of parts is cut, and measured again, before its reach gets smaller
BROKEN = -math.inf  # the reach of a call with NaN or infinity in its weights
_ROWS = 64

BROKEN_WEIGHTS = Verdict(False, "its weights or statistics hold NaN or infinity, which oneDNN's ReLU would hide")
BROKEN_INPUT = Verdict(False, "its input holds NaN or infinity, which oneDNN's ReLU would hide")
OVERFLOW = Verdict(False, "its values may overflow, and oneDNN's ReLU would hide the NaN that follows")


class Bound(NamedTuple):
    """|y| <= gain * max|x| + offset; infinite if unknown."""

    gain: float
    offset: float

    def after(self, first: Bound) -> Bound:
        """Return the bound of this step after ``first``."""
        return Bound(_product(self.gain, first.gain), _product(self.gain, first.offset) + self.offset)

    def plus(self, other: Bound) -> Bound:
        """Return the bound of a sum."""
        return Bound(self.gain + other.gain, self.offset + other.offset)

    def or_larger(self, other: Bound) -> Bound:
        """Return a bound of both."""
        return Bound(max(self.gain, other.gain), max(self.offset, other.offset))

    def reach(self) -> float:
        """Return the largest input for which this bound stays below LIMIT; negative if no input is small enough."""
        if not math.isfinite(self.gain + self.offset):
            return BROKEN
        return min((LIMIT - self.offset) / max(self.gain, 1.0), LIMIT)


def _product(a: float, b: float) -> float:
    return 0.0 if a == 0 or b == 0 else a * b  # a filter of zeros bounds its output whatever came before it


class Bounds(NamedTuple):
    """``out``: bound of a step's output. ``peak``: of every value in the step, from its input to its output."""

    out: Bound
    peak: Bound

    def then(self, later: Bounds) -> Bounds:
        """Return the bounds of this step followed by ``later``."""
        return Bounds(later.out.after(self.out), self.peak.or_larger(later.peak.after(self.out)))

    def plus(self, other: Bounds) -> Bounds:
        """Return the bounds of the sum of two branches of one input."""
        out = self.out.plus(other.out)
        return Bounds(out, self.peak.or_larger(other.peak).or_larger(out))


UNCHANGED = Bounds(Bound(1.0, 0.0), Bound(1.0, 0.0))


def of_conv(
    weight: Tensor, bias: Tensor, stock_weight: Tensor | None = None, stock_bias: Tensor | None = None
) -> Bounds:
    """Return the bounds of a folded convolution; ``peak`` includes the stock convolution before BatchNorm."""
    out = Bound(_gain(weight), _largest(bias))
    if stock_weight is None:
        return Bounds(out, out)
    return Bounds(out, out.or_larger(Bound(_gain(stock_weight), _largest(stock_bias))))


def _gain(weight: Tensor) -> float:
    filters = weight.detach().flatten(1)
    gain = _largest(torch.linalg.vector_norm(filters, 1, dim=1, dtype=torch.float32))
    if gain < math.inf:
        return gain
    return _largest(torch.linalg.vector_norm(filters, 1, dim=1, dtype=torch.float64))


def _largest(t: Tensor | None) -> float:
    if t is None or t.numel() == 0:
        return 0.0
    value = t.detach().abs().amax().item()
    return math.inf if math.isnan(value) else value


def stretches(parts: Sequence[Bounds]) -> dict[int, float]:
    """Cut a chain of parts into stretches, and return each stretch's reach by the number of its first part.

    A stretch is as long as its reach stays above COMFORT, and has at least one part.
    """
    found: dict[int, float] = {}
    start, chain = 0, UNCHANGED
    for i, part in enumerate(parts):
        longer = chain.then(part)
        if i > start and longer.peak.reach() < COMFORT:
            start, longer = i, UNCHANGED.then(part)
        chain = longer
        found[start] = chain.peak.reach()
    return found


def verdict(inputs: Sequence[Tensor], reach: float) -> Verdict | None:
    """Return why oneDNN may not run a call of this ``reach`` on these inputs; None if it may."""
    if all([within(x, reach) for x in inputs]):
        return None
    if reach == BROKEN:
        return BROKEN_WEIGHTS
    return OVERFLOW if all(bool(x.isfinite().all()) for x in inputs) else BROKEN_INPUT


def within(x: Tensor, reach: float) -> bool:
    """Return whether every |x| <= ``reach``, which is false for NaN. Usually reads ``x`` once."""
    if reach < 0:
        return False
    if x.numel() == 0 or reach == math.inf:
        return True
    if x.dtype.itemsize == 2:
        # As integers, non-negative floats keep their order, with NaN the largest: twice as fast as comparing floats.
        bits = x.view(torch.int16)
        if bits.amin().item() >= 0:
            return _number(int(bits.amax().item()), x.dtype) <= reach
    elif _norm(x) <= reach:  # which is never less than the largest element
        return True
    return -reach <= x.amin().item() and x.amax().item() <= reach


def _norm(x: Tensor) -> float:
    """Return the Euclidean norm: ATen's fastest reduction of both signs, on several threads if in several rows."""
    if torch.get_num_threads() == 1 or x.numel() % _ROWS or not x.is_contiguous(memory_format=torch.channels_last):
        return torch.linalg.vector_norm(x).item()
    row = x.numel() // _ROWS
    return torch.linalg.vector_norm(x.as_strided((_ROWS, row), (row, 1)), dim=1).amax().item()


def _number(bits: int, dtype: torch.dtype) -> float:
    """Return the number with this 16-bit pattern."""
    code, word = ("<e", struct.pack("<H", bits)) if dtype == torch.float16 else ("<f", struct.pack("<I", bits << 16))
    return struct.unpack(code, word)[0]


def overflowed(y: Tensor) -> bool:
    """Return whether a value of an inner tensor overflowed. Only fp16 can: sums stay far below LIMIT, but not 65504."""
    return y.dtype == torch.float16 and not within(y, torch.finfo(torch.float16).max)
