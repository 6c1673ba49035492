"""The picture of a run: error over epochs, thin for training and bold for validation, as in the paper's Figure 4."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import missing_package
from . import runlog
from .checkpoint import write_whole

COLOURS = ("#d1495b", "#30638e", "#00798c", "#edae49", "#6a4c93", "#5c5c5c")


def require_matplotlib() -> None:
    """UserError where matplotlib is absent, before a run rather than after its first epoch."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise missing_package("matplotlib", "which draws the curves", error, "train") from error


def draw(axis: Any, runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Both errors of each run into ``axis``: ``runs`` maps a label to the ``epoch`` lines of its log."""
    for (label, lines), colour in zip(runs.items(), COLOURS * len(runs), strict=False):
        epochs = [line["epoch"] for line in lines]
        style = {"color": colour, "marker": "o" if len(lines) == 1 else ""}  # one epoch is a point, which has no line
        axis.plot(epochs, [100 * line["train_error"] for line in lines], linewidth=0.8, markersize=3, **style)
        axis.plot(epochs, [100 * line["val_error"] for line in lines], linewidth=2.4, label=label, **style)
    axis.set_xlabel("epoch")
    axis.set_ylabel("error (%)")
    axis.grid(alpha=0.3)
    axis.legend(title="thin: training, bold: validation", fontsize=8, title_fontsize=8)


def figure(panels: int, width: float = 6.0) -> tuple[Any, list[Any]]:
    """A figure of ``panels`` axes side by side, on the Agg canvas."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * panels, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])


def write_png(figure: Any, path: Path) -> None:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    write_whole(path, content.getvalue())


def write(out: Path, title: str) -> Path:
    """``out/curves.png`` from ``out``'s log."""
    picture, (axis,) = figure(1)
    draw(axis, {title: runlog.of_kind(out, "epoch")})
    write_png(picture, out / "curves.png")
    return out / "curves.png"
