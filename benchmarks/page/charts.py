"""Draw the pictures of the report page as SVG: a scatter with logarithmic axes, and lines over dates.

A picture is drawn twice, wide and narrow, so that its text has the page's size on a phone too; the page's style shows
one of them. Colours come from the style, light or dark. A mark of something modelled is hollow and dashed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDE, NARROW = 1040.0, 343.0
HEIGHTS = {"roofline": (480.0, 360.0), "history": (300.0, 260.0)}
"""Wide and narrow; all in the page's pixels."""

COLOURS = 7
"""Classes s0 ... s6 of the style; s0 is for ours."""


@dataclass(frozen=True)
class Mark:
    """A point of a picture. ``text`` is shown by a pointer that rests on it."""

    x: float
    y: float
    text: str


@dataclass(frozen=True)
class Series:
    """Points with one colour and one shape; ``modelled`` ones are hollow."""

    name: str
    colour: int
    marks: tuple[Mark, ...]
    modelled: bool = False


@dataclass(frozen=True)
class Frame:
    """The area of a chart inside its margins, with logarithmic or plain axes."""

    width: float
    height: float
    x: tuple[float, float]
    y: tuple[float, float]
    log_x: bool
    log_y: bool
    left: float = 54.0
    right: float = 12.0
    top: float = 34.0
    bottom: float = 44.0

    def across(self, value: float) -> float:
        return self.left + _share(value, self.x, self.log_x) * (self.width - self.left - self.right)

    def down(self, value: float) -> float:
        return self.height - self.bottom - _share(value, self.y, self.log_y) * (self.height - self.top - self.bottom)


def _share(value: float, ends: tuple[float, float], logarithmic: bool) -> float:
    low, high = (math.log(end) for end in ends) if logarithmic else ends
    return ((math.log(value) if logarithmic else value) - low) / (high - low)


def shape(kind: int, x: float, y: float, size: float = 5.0) -> str:
    """Return the path of a mark; its shape tells series apart without their colours."""
    a = size
    if kind % COLOURS == 1:
        return f"M{x - a:.1f} {y - a:.1f}h{2 * a:.1f}v{2 * a:.1f}h{-2 * a:.1f}z"
    if kind % COLOURS == 2:
        return f"M{x:.1f} {y - 1.2 * a:.1f}l{1.2 * a:.1f} {2.2 * a:.1f}h{-2.4 * a:.1f}z"
    if kind % COLOURS == 3:
        b = 1.3 * a
        return f"M{x:.1f} {y - b:.1f}l{b:.1f} {b:.1f}l{-b:.1f} {b:.1f}l{-b:.1f} {-b:.1f}z"
    if kind % COLOURS == 4:
        return f"M{x:.1f} {y + 1.2 * a:.1f}l{1.2 * a:.1f} {-2.2 * a:.1f}h{-2.4 * a:.1f}z"
    if kind % COLOURS == 5:
        return f"M{x - a:.1f} {y - 2:.1f}h{2 * a:.1f}v4h{-2 * a:.1f}z"
    if kind % COLOURS == 6:
        return f"M{x - 2:.1f} {y - a:.1f}h4v{2 * a:.1f}h-4z"
    return f"M{x - a:.1f} {y:.1f}a{a:.1f} {a:.1f} 0 1 0 {2 * a:.1f} 0a{a:.1f} {a:.1f} 0 1 0 {-2 * a:.1f} 0z"


def legend(series: Sequence[Series]) -> str:
    """Return the names of the series with their marks."""
    items = []
    for one in series:
        kind = "mark modelled" if one.modelled else "mark"
        path = f'<path class="{kind} s{one.colour}" d="{shape(one.colour, 8, 8)}"/>'
        icon = f'<svg viewBox="0 0 16 16" aria-hidden="true">{path}</svg>'
        items.append(f"<li>{icon}{escape(one.name)}</li>")
    return f'<ul class="legend">{"".join(items)}</ul>'


def both(title: str, heights: tuple[float, float], draw: Callable[[float, float], str]) -> str:
    """Return the picture in both sizes; ``draw(width, height)`` returns its parts."""
    out = []
    for kind, width, height in zip(("wide", "narrow"), (WIDE, NARROW), heights, strict=True):
        out.append(
            f'<svg class="chart {kind}" viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(title)}">'
            f"{draw(width, height)}</svg>"
        )
    return "".join(out)


def number(value: float) -> str:
    """Return a short text of an axis: 0.5, 2,000, 30k, 1.5M."""
    for scale, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= max(scale, 1e4):
            return f"{value / scale:g}{unit}"
    return f"{value:,g}" if value < 1e3 else f"{value:,.0f}"


def decades(low: float, high: float) -> list[float]:
    """Return 1, 2 and 5 times powers of ten between two values; fewer where there are many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if high <= 1e3 * low else (1,)
    return [step * 10.0**power for power in powers for step in steps if low <= step * 10.0**power <= high]


def even(high: float, count: int = 5) -> list[float]:
    """Return about ``count`` round values from 0 to at least ``high``."""
    step = 10 ** math.floor(math.log10(high / count))
    step *= next(k for k in (1, 2, 5, 10) if k * step * count >= high)
    return [step * i for i in range(math.ceil(high / step) + 1)]


def _grid(frame: Frame, xs: Sequence[tuple[float, str]], ys: Sequence[float], x_title: str, y_title: str) -> list[str]:
    out = []
    low, right = frame.height - frame.bottom, frame.width - frame.right
    for value in ys:
        y = frame.down(value)
        out.append(f'<path class="grid" d="M{frame.left:.1f} {y:.1f}H{right:.1f}"/>')
        out.append(
            f'<text class="soft" x="{frame.left - 6:.1f}" y="{y + 4:.1f}" text-anchor="end">{number(value)}</text>'
        )
    for value, text in xs:
        x = frame.across(value)
        out.append(f'<path class="grid" d="M{x:.1f} {frame.top:.1f}V{low:.1f}"/>')
        out.append(f'<text class="soft" x="{x:.1f}" y="{low + 18:.1f}" text-anchor="middle">{escape(text)}</text>')
    middle = (frame.left + right) / 2
    if x_title:
        out.append(f'<text x="{middle:.1f}" y="{frame.height - 6:.1f}" text-anchor="middle">{escape(x_title)}</text>')
    out.append(f'<text x="4" y="14">{escape(y_title)}</text>')
    return out


def _marks(frame: Frame, series: Series) -> list[str]:
    kind = "mark modelled" if series.modelled else "mark"
    return [
        f'<path class="{kind} s{series.colour}" d="{shape(series.colour, frame.across(m.x), frame.down(m.y))}">'
        f"<title>{escape(m.text)}</title></path>"
        for m in series.marks
    ]


def _along(
    text: str, start: tuple[float, float], end: tuple[float, float], marks: Sequence[tuple[float, float]]
) -> str:
    """Return a text above a line, at the part of the line that is farthest from all marks; nothing where none is free.

    What the text says is in the caption of the picture too.
    """
    (ax, ay), (bx, by) = start, end
    angle = math.atan2(by - ay, bx - ax)
    half = 3.6 * len(text) / math.hypot(bx - ax, by - ay)  # of the line's length that half of the text takes
    tries = [(1 - t) * half + t * (1 - half) for t in (i / 20 for i in range(21))] if half < 0.5 else [0.5]

    def free(at: float) -> float:
        ends = (at - half, at, at + half)
        spots = [(ax + t * (bx - ax), ay + t * (by - ay) - 10) for t in ends]
        return min((math.dist(mark, spot) for mark in marks for spot in spots), default=0.0)

    at = max(tries, key=free)
    if free(at) < 8:
        return ""
    x, y = ax + at * (bx - ax) + 8 * math.sin(angle), ay + at * (by - ay) - 8 * math.cos(angle)
    turned = f"rotate({math.degrees(angle):.1f} {x:.1f} {y:.1f})"
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="middle" transform="{turned}">{escape(text)}</text>'


def roofline(title: str, bandwidth: float, rate: float, series: Sequence[Series]) -> str:
    """Draw operations per second over operations per byte, under the two ceilings.

    Args:
        title: what a screen reader says.
        bandwidth: bytes/s.
        rate: FLOP/s.
        series: marks with FLOP/B and FLOP/s.
    """
    marks = [mark for one in series for mark in one.marks]
    ridge = rate / bandwidth
    x = min([m.x for m in marks] + [ridge / 8]) / 1.3, max([m.x for m in marks] + [ridge * 4]) * 1.3
    y = min([m.y for m in marks] + [rate / 50]) / 1.5, rate * 2

    def draw(width: float, height: float) -> str:
        frame = Frame(width, height, x, (y[0] / 1e12, y[1] / 1e12), True, True)
        ticks_x = [(value, number(value)) for value in decades(*x)]
        ticks_y = decades(y[0] / 1e12, y[1] / 1e12)
        if width < WIDE:
            ticks_x = [tick for tick in ticks_x if f"{tick[0]:e}"[0] == "1"] or ticks_x
        parts = _grid(frame, ticks_x, ticks_y, "operations per byte (FLOP/B)", "TFLOP/s")
        start = max(x[0], y[0] / bandwidth)
        points = [(start, start * bandwidth), (ridge, rate), (x[1], rate)]
        line = "L".join(f"{frame.across(a):.1f} {frame.down(b / 1e12):.1f}" for a, b in points)
        parts.append(f'<path class="roof" d="M{line}"/>')
        right = frame.width - frame.right
        parts.append(
            f'<text x="{right:.1f}" y="{frame.down(rate / 1e12) - 8:.1f}" text-anchor="end">'
            f"products: {rate / 1e12:.0f} TFLOP/s</text>"
        )
        placed = [(frame.across(m.x), frame.down(m.y / 1e12)) for m in marks]
        placed += [(right - 14 * i, frame.down(rate / 1e12) - 12) for i in range(11)]  # the text above the flat line
        (ax, ay), (bx, by) = ((frame.across(a), frame.down(b / 1e12)) for a, b in points[:2])
        parts.append(_along(f"copy: {bandwidth / 1e12:.2f} TB/s", (ax, ay), (bx, by), placed))
        for one in series:
            scaled = Series(one.name, one.colour, tuple(Mark(m.x, m.y / 1e12, m.text) for m in one.marks), one.modelled)
            parts += _marks(frame, scaled)
        return "".join(parts)

    return both(title, HEIGHTS["roofline"], draw)


def history(title: str, dates: Sequence[str], series: Sequence[Series], y_title: str) -> str:
    """Draw a line per series over dates, which stand at even distances; a mark's x is a place in ``dates``."""
    ticks = even(max(mark.y for one in series for mark in one.marks))

    def draw(width: float, height: float) -> str:
        frame = Frame(width, height, (-0.3, len(dates) - 0.7), (0.0, ticks[-1]), False, False, right=18.0, bottom=26.0)
        most = 4 if width < WIDE else 10
        every = math.ceil(len(dates) / most)
        shown = [(float(i), dates[i][:10]) for i in range(0, len(dates), every)]
        if width < WIDE:
            shown = [(i, text[2:]) for i, text in shown]
        parts = _grid(frame, shown, ticks, "", y_title)
        for one in series:
            line = "L".join(f"{frame.across(m.x):.1f} {frame.down(m.y):.1f}" for m in one.marks)
            parts.append(f'<path class="path s{one.colour}" d="M{line}"/>')
            parts += _marks(frame, one)
        return "".join(parts)

    return both(title, HEIGHTS["history"], draw)
