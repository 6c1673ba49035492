"""How large the values inside a call can become: the proof, before a call runs, that none of them is NaN or infinity.

    |conv(x)| <= gain * max|x| + offset         gain = max over filters of sum |w|         offset = max |b|

oneDNN's ReLU is the maximum with 0 as x86 defines it, which turns NaN into 0, and no post-op that ATen offers for a sum
keeps it (docs/notes/nan-through-relu.md). So nothing is left to be kept: from the weights alone follows how large an
input may be (``reach``) for every value that the call computes to stay below :data:`LIMIT`. One pass over the input
then shows that it is within reach, which NaN and infinity never are; an input that is not runs elsewhere.

The bounds hold for both forms of the computation, BatchNorm folded and apart: where oneDNN runs, the stock layers would
overflow nowhere either, so NaN and infinity come out exactly where they do in stock PyTorch.
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
COMFORT = 2.0**30  # what an input within reach should be allowed to hold; parts are measured again before it shrinks
BROKEN = -math.inf  # the reach of a call with NaN or infinity in its weights
_ROWS = 64

BROKEN_WEIGHTS = Verdict(False, "its weights or statistics hold NaN or infinity, which oneDNN's ReLU would hide")
BROKEN_INPUT = Verdict(False, "its input holds NaN or infinity, which oneDNN's ReLU would hide")
OVERFLOW = Verdict(False, "its values may overflow, and oneDNN's ReLU would hide the NaN that follows")


class Bound(NamedTuple):
    """|y| <= gain * max|x| + offset. Infinite where nothing can be said."""

    gain: float
    offset: float

    def after(self, first: Bound) -> Bound:
        """The bound of this step behind ``first``."""
        return Bound(_product(self.gain, first.gain), _product(self.gain, first.offset) + self.offset)

    def plus(self, other: Bound) -> Bound:
        """The bound of a sum."""
        return Bound(self.gain + other.gain, self.offset + other.offset)

    def or_larger(self, other: Bound) -> Bound:
        """A bound of both."""
        return Bound(max(self.gain, other.gain), max(self.offset, other.offset))

    def reach(self) -> float:
        """How large an input may be for this bound to stay below LIMIT; negative where no input is small enough."""
        if not math.isfinite(self.gain + self.offset):
            return BROKEN
        return min((LIMIT - self.offset) / max(self.gain, 1.0), LIMIT)


def _product(a: float, b: float) -> float:
    return 0.0 if a == 0 or b == 0 else a * b  # a filter of zeros bounds its output whatever came before it


class Bounds(NamedTuple):
    """``out``: of a step's output. ``peak``: of everything on the way to it, its input and the output included."""

    out: Bound
    peak: Bound

    def then(self, later: Bounds) -> Bounds:
        """The bounds of this step and ``later`` behind it."""
        return Bounds(later.out.after(self.out), self.peak.or_larger(later.peak.after(self.out)))

    def plus(self, other: Bounds) -> Bounds:
        """The bounds of the sum of two branches of one input."""
        out = self.out.plus(other.out)
        return Bounds(out, self.peak.or_larger(other.peak).or_larger(out))


UNCHANGED = Bounds(Bound(1.0, 0.0), Bound(1.0, 0.0))


def of_conv(
    weight: Tensor, bias: Tensor, stock_weight: Tensor | None = None, stock_bias: Tensor | None = None
) -> Bounds:
    """The bounds of a folded convolution, and on the way of the stock one that BatchNorm would follow."""
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
    """Where to measure in a chain of parts, and against what: each stretch's reach by the number of its first part.

    A stretch is as long as it leaves its input COMFORT, or one part.
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
    """Why oneDNN may not run a call that reaches as far as ``reach`` on these inputs; None if it may."""
    if all([within(x, reach) for x in inputs]):
        return None
    if reach == BROKEN:
        return BROKEN_WEIGHTS
    return OVERFLOW if all(bool(x.isfinite().all()) for x in inputs) else BROKEN_INPUT


def within(x: Tensor, reach: float) -> bool:
    """Is every |x| <= ``reach``? No for NaN. One read of ``x`` if all goes well."""
    if reach < 0:
        return False
    if x.numel() == 0 or reach == math.inf:
        return True
    if x.dtype.itemsize == 2:
        # As integers, numbers without a sign are in order, NaN the largest: twice as fast as comparing numbers.
        bits = x.view(torch.int16)
        if bits.amin().item() >= 0:
            return _number(int(bits.amax().item()), x.dtype) <= reach
    elif _norm(x) <= reach:  # which is never less than the largest element
        return True
    return -reach <= x.amin().item() and x.amax().item() <= reach


def _norm(x: Tensor) -> float:
    """The Euclidean norm: ATen's fastest reduction that sees both signs, on several threads if in several rows."""
    if torch.get_num_threads() == 1 or x.numel() % _ROWS or not x.is_contiguous(memory_format=torch.channels_last):
        return torch.linalg.vector_norm(x).item()
    row = x.numel() // _ROWS
    return torch.linalg.vector_norm(x.as_strided((_ROWS, row), (row, 1)), dim=1).amax().item()


def _number(bits: int, dtype: torch.dtype) -> float:
    """The number that 16 bits stand for."""
    code, word = ("<e", struct.pack("<H", bits)) if dtype == torch.float16 else ("<f", struct.pack("<I", bits << 16))
    return struct.unpack(code, word)[0]


def overflowed(y: Tensor) -> bool:
    """Did a value not fit the type that an inner tensor is stored in? Sums stay far below LIMIT, 65504 is soon reached.

    Only for fp16: the other types hold what the sums hold.
    """
    return y.dtype == torch.float16 and not within(y, torch.finfo(torch.float16).max)
