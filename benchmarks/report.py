"""Write a report as files (CSV, Markdown, PNG, JSON) and as tables for the terminal.

All files are complete in memory before the first is written, and each is renamed into place. A run that is cut leaves
the files of the previous one or none, never half of one.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resnet_fast.errors import UserError
from resnet_fast.io import plots, safe_files
from resnet_fast.io.safe_files import json_text

from . import markdown, train
from .compare import BenchReport, BenchRow, InferenceRow
from .providers import OURS

if TYPE_CHECKING:
    from rich.table import Table

TIMES = ("provider", "precision", "ms", "quartiles", "img/s", "x best stock")
HEADINGS = (*TIMES, "error L2", "error max", "note")
READING = (
    "Time per batch: median and quartiles of the raw samples. 'x best stock': speed relative to the fastest path that "
    "PyTorch alone offers, in the same cell. Errors against fp64 on the same rounded weights and photographs: "
    "norm of the difference over the norm, and the largest difference over the largest output."
)

TITLE = "# resnet_fast compared with its peers"

TRAIN_HEADINGS = (*TIMES, "peak MiB", "loss, step 1", "last loss", "minus stock", "steps", "note")
TRAIN_READING = (
    "Time per training step: median and quartiles of the raw samples; batches are on the device already. "
    "'x best stock': speed relative to the fastest stock path of the same cell. bfloat16 and float16 are autocast over "
    f"float32 parameters, float16 with GradScaler. {train.PEAK} Measured by {{memory}}. 'last loss': after as many "
    "steps as 'steps' says, of the same weights on the same batches. 'minus stock': less the last loss of eager-nhwc, "
    "or of the first stock path of the table where that did not run."
)


@dataclass(frozen=True)
class Layout:
    """How rows of one type are printed: ``values(row)`` has a cell for each of ``headings``.

    ``reading`` says what the columns mean; ``{memory}`` is replaced by that entry of the provenance.
    """

    headings: tuple[str, ...]
    values: Callable[[Any], tuple[str, ...]]
    reading: str


def layout(report: BenchReport) -> Layout:
    """Return the layout of the report's rows."""
    return LAYOUTS[report.row_type]


def reading(report: BenchReport) -> str:
    """Return what the columns of the report mean."""
    return layout(report).reading.format_map(report.provenance)


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _times(row: BenchRow) -> tuple[str, ...]:
    """The cells below ``TIMES``."""
    quartiles = "-" if row.q1_ms is None else f"{row.q1_ms:.2f} - {row.q3_ms:.2f}"
    name, precision = row.provider, row.precision or "-"
    speed = _cell(row.images_per_s, ".1f"), _cell(row.ratio, ".2f")
    return name, precision, _cell(row.median_ms, ".2f"), quartiles, *speed


def values(row: InferenceRow) -> tuple[str, ...]:
    """Return the cells of one row of an inference suite, in the order of ``HEADINGS``."""
    return *_times(row), _cell(row.error_l2, ".1e"), _cell(row.error_max, ".1e"), row.note


def train_values(row: train.TrainingRow) -> tuple[str, ...]:
    """Return the cells of one row of the suite ``train``, in the order of ``TRAIN_HEADINGS``."""
    losses = _cell(row.loss_first, ".6f"), _cell(row.loss_last, ".6f"), _cell(row.loss_difference, ".1e")
    return *_times(row), _cell(row.peak_mib, ".1f"), *losses, str(row.steps or "-"), row.note


LAYOUTS = {
    InferenceRow: Layout(HEADINGS, values, READING),
    train.TrainingRow: Layout(TRAIN_HEADINGS, train_values, TRAIN_READING),
}


def title(cell: tuple[str, str, int], rows: list[BenchRow]) -> str:
    """Return the heading of a cell's table."""
    case, dtype, batch = cell
    return f"{case}, {dtype}, batch {batch}, {rows[0].device}"


def tables(report: BenchReport) -> list[Table]:
    """Return one rich table per cell."""
    from rich.table import Table
    from rich.text import Text

    printed = layout(report)
    out = []
    for cell, rows in report.cells().items():
        table = Table(title=title(cell, rows), title_justify="left")
        for heading in printed.headings:
            number = heading not in ("provider", "precision", "note")
            table.add_column(heading, justify="right" if number else "left", no_wrap=heading != "note")
        for row in rows:
            table.add_row(*(Text(v, "bold" if row.provider == OURS else "") for v in printed.values(row)))
        out.append(table)
    return out


def to_csv(report: BenchReport) -> str:
    """Return all fields of all rows."""
    out = io.StringIO()
    writer = csv.DictWriter(out, [f.name for f in fields(report.row_type)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in report.rows)
    return out.getvalue()


def to_markdown(report: BenchReport) -> str:
    """Return a page: a table per cell, what its columns mean, and the provenance."""
    printed = layout(report)
    parts = [TITLE, reading(report)]
    for cell, rows in report.cells().items():
        parts += [f"## {title(cell, rows)}", markdown.table(printed.headings, map(printed.values, rows))]
    parts += ["## Provenance", "\n".join(f"- {key}: {value}" for key, value in report.provenance.items())]
    return "\n\n".join(parts) + "\n"


def to_json(report: BenchReport) -> str:
    """Return rows, raw samples and provenance as JSON."""
    return json_text(report.to_dict(), indent=2) + "\n"


def to_png(report: BenchReport) -> bytes:
    """Draw images per second as bars, one panel per cell, each bar with its ratio to the best stock path."""
    require_matplotlib()
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    cells = report.cells()
    heights = [len(rows) + 1.2 for rows in cells.values()]
    size = (9, 0.34 * sum(heights) + 1.4)
    figure, panels = plots.figure(len(cells), 1, size, height_ratios=heights)
    fastest: dict[str, float] = {}
    for (case, _, _), rows in cells.items():
        fastest[case] = max(fastest.get(case, 0), *(_quartiles(row)[1] for row in rows))
    for (axis,), (cell, rows) in zip(panels, cells.items(), strict=True):
        _panel(axis, title(cell, rows), rows, fastest[cell[0]])  # panels of one net have one axis: bars compare
    panels[-1][0].set_xlabel("images per second, from the median time per batch (more is better)")
    what = report.provenance
    place = f"{what.get('gpu', what.get('cpu'))}, threads: {what.get('threads')}, {what.get('date')}"
    figure.suptitle(f"Images per second by provider\n{place}", fontsize=9)
    legend: list[Any] = [Patch(color=colour, label=label) for label, colour in BARS.items()]
    legend += [Line2D([], [], color="black", linewidth=1, marker="|", label="quartiles")]
    legend += [Line2D([], [], linestyle="none", label="(x): of the best stock path's speed")]
    figure.legend(handles=legend, loc="outside lower center", ncols=len(legend), fontsize=8, frameon=False)
    return plots.encode(figure, dpi=130)


BARS = {"resnet_fast": "#d1495b", "stock PyTorch": "#30638e", "other programs": "#9aa5b1"}
"""Whose a bar is, by its colour."""


def _quartiles(row: BenchRow) -> tuple[float, float]:
    """Images per second of the slower and of the faster quartile; zeros where the provider did not run."""
    if row.images_per_s is None or not row.q1_ms or not row.q3_ms:
        return (row.images_per_s or 0.0,) * 2
    return 1e3 * row.batch / row.q3_ms, 1e3 * row.batch / row.q1_ms


def _panel(axis: Any, heading: str, rows: list[BenchRow], most: float = 0.0) -> None:
    """One cell's bars; ``most``: images per second that the axis has room for at least."""
    speeds = [row.images_per_s or 0.0 for row in rows]
    ours, stock, others = BARS.values()
    colours = [ours if r.provider == OURS else stock if r.stock else others for r in rows]
    axis.barh(range(len(rows)), speeds, color=colours)
    for place, row in enumerate(rows):
        if row.images_per_s is not None:
            axis.plot(_quartiles(row), (place, place), color="black", linewidth=1, marker="|", markersize=7)
    axis.set_yticks(range(len(rows)), [_label(row) for row in rows], fontsize=8)
    axis.invert_yaxis()
    axis.set_title(heading, fontsize=9, loc="left")
    axis.set_xlim(0, (max(most, *(_quartiles(row)[1] for row in rows)) or 1) * 1.3)
    axis.spines[["top", "right"]].set_visible(False)
    for place, row in enumerate(rows):
        if row.images_per_s is None:
            text = "did not run, see the table"
        else:
            text = f"{row.images_per_s:.1f}" + (f"  ({row.ratio:.2f}x)" if row.ratio is not None else "")
        axis.text(_quartiles(row)[1], place, f"  {text}", va="center", fontsize=8)


def _label(row: BenchRow) -> str:
    """The provider, and its precision where that is not the one asked for."""
    return row.provider if row.precision in ("", row.dtype) else f"{row.provider} (in {row.precision})"


def require_matplotlib() -> None:
    """Raise a UserError where matplotlib is absent; call it before a long run, not after it."""
    plots.require_matplotlib("which draws the bar chart", "bench")


def prepare_folder(out: Path, stem: str = "bench") -> Path:
    """Check, before anything is measured, that the report can be written to ``out``.

    Raises:
        UserError: if the folder cannot be created or written to, or if one of ``<stem>.csv``, ``.md``, ``.json`` and
            ``.png`` exists and is no report.
    """
    todo = "name another with --out"
    try:
        safe_files.check_folder(out)
    except OSError as error:
        raise UserError("a folder to write to", f"{out} ({error.strerror})", todo) from error
    for suffix, ours in OURS_BY_SUFFIX.items():
        safe_files.check_target(
            out / f"{stem}.{suffix}", f"a report ({stem}.{suffix})", ours, todo=todo, make_folder=True
        )
    return out


def _is_json(content: bytes) -> bool:
    try:
        found = safe_files.json_value(content)
    except ValueError:
        return False
    return isinstance(found, dict) and {"rows", "samples_ns", "provenance"} <= found.keys()


OURS_BY_SUFFIX: dict[str, Callable[[bytes], bool]] = {
    "csv": lambda content: content.startswith(",".join(f.name for f in fields(BenchRow)).encode()),
    "md": lambda content: content.startswith(TITLE.encode()),
    "json": _is_json,
    "png": plots.is_ours,
}
"""Whether a file's bytes are an earlier report, which may be replaced."""


def write(report: BenchReport, out: Path, stem: str = "bench") -> list[Path]:
    """Write ``<stem>.csv``, ``.md``, ``.json`` and ``.png`` to ``out``; return their paths."""
    contents: dict[str, bytes] = {
        "csv": to_csv(report).encode(),
        "md": to_markdown(report).encode(),
        "json": to_json(report).encode(),
        "png": to_png(report),
    }
    out.mkdir(parents=True, exist_ok=True)
    return [safe_files.write_whole(out / f"{stem}.{suffix}", content) for suffix, content in contents.items()]
