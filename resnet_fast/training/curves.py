"""Draw the error of a run over its epochs, thin for training and bold for validation, as in the paper's Figure 4."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..io import plots
from ..io.plots import COLOURS, MARKERS
from . import runlog
from .disk import write_file

TICKS = (0, 0.2, 0.5, 1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100)
LINEAR_BELOW = 1.0
"""Per cent. Above it the axis is logarithmic, so that both the first and the last epochs can be told apart."""


def require_matplotlib() -> None:
    """Raise UserError if matplotlib is missing: before a run instead of after its first epoch."""
    plots.require_matplotlib("which draws the curves", "train")


def draw(axis: Any, runs: Mapping[str, Sequence[Mapping[str, Any]]], title: str = "") -> None:
    """Draw both errors of each run into ``axis``; ``runs`` maps a label to the ``epoch`` lines of its log."""
    looks = zip(runs.items(), COLOURS * len(runs), MARKERS * len(runs), strict=False)
    for (label, lines), colour, marker in looks:
        epochs = [line["epoch"] for line in lines]
        # A single epoch is a point without a line, so it needs a marker. For many epochs a few markers are enough.
        style = {"color": colour, "marker": marker, "markevery": max(1, len(lines) // 12), "clip_on": False}
        train, val = ([100 * line[f"{part}_error"] for line in lines] for part in ("train", "val"))
        axis.plot(epochs, train, linewidth=0.8, markersize=3, fillstyle="none", **style)
        axis.plot(epochs, val, linewidth=2.0, markersize=5, label=label, **style)
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("epoch")
    axis.set_ylabel("error (%)")
    axis.grid(alpha=0.3)
    axis.legend(title="thin: training, bold: validation", fontsize=8, title_fontsize=8)


def show_whole(axes: Sequence[Any]) -> None:
    """Give all panels the same error axis: logarithmic above 1 %, from below the lowest to above the highest point."""
    points = [float(y) for axis in axes for line in axis.get_lines() for y in line.get_ydata()]
    points = [y for y in points if y == y] or [0.0, 100.0]
    low, high = min(points) / 1.15, min(100.0, max(points) * 1.15)
    shown = [t for t in TICKS if low <= t <= high]
    for axis in axes:
        axis.set_yscale("symlog", linthresh=LINEAR_BELOW)
        axis.set_yticks(shown, [f"{t:g}" for t in shown])
        axis.minorticks_off()
        axis.set_ylim(low, high)


def headline(picture: Any, text: str) -> None:
    """Put a title over all panels, in as many lines as it needs."""
    picture.suptitle(textwrap.fill(text, int(12 * picture.get_figwidth())), fontsize=11)


def figure(panels: int, width: float = 6.0) -> tuple[Any, list[Any]]:
    """Return a figure and its ``panels`` axes side by side."""
    picture, (axes,) = plots.figure(1, panels, (width * panels, 4.4))
    return picture, axes


def write_png(figure: Any, path: Path) -> None:
    """Write a figure as PNG. Raises UserError if the file cannot be written."""
    write_file(path, plots.encode(figure))


def write_curves(out: Path, title: str) -> Path:
    """Draw ``out/curves.png`` from the log of ``out`` and return its path."""
    picture, (axis,) = figure(1)
    draw(axis, {title: runlog.of_kind(out, "epoch")}, title)
    show_whole([axis])
    write_png(picture, out / "curves.png")
    return out / "curves.png"
