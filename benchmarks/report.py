"""A report as files (CSV, Markdown, PNG, JSON) and as tables on the terminal.

Every file is complete in memory before the first is written, and each takes its name by a rename: a run that is cut
leaves the files of the last one or none, never half of one.
"""

from __future__ import annotations

import csv
import io
import json
import os
import tempfile
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resnet_fast.errors import UserError

from .compare import Report, Row
from .providers import OURS

if TYPE_CHECKING:
    from rich.table import Table

HEADINGS = ("provider", "precision", "ms", "quartiles", "img/s", "x best stock", "error L2", "error max", "note")
READING = (
    "Time per batch: median and quartiles of the raw samples. 'x best stock': speed relative to the fastest path that "
    "PyTorch alone offers, in the same cell. Errors against fp64 on the same rounded weights and photographs: "
    "norm of the difference over the norm, and the largest difference over the largest output."
)


def values(row: Row) -> tuple[str, ...]:
    """The cells of one row, in the order of ``HEADINGS``."""
    return (
        row.provider,
        row.precision or "-",
        "-" if row.median_ms is None else f"{row.median_ms:.2f}",
        "-" if row.q1_ms is None else f"{row.q1_ms:.2f} - {row.q3_ms:.2f}",
        "-" if row.images_per_s is None else f"{row.images_per_s:.1f}",
        "-" if row.ratio is None else f"{row.ratio:.2f}",
        "-" if row.error_l2 is None else f"{row.error_l2:.1e}",
        "-" if row.error_max is None else f"{row.error_max:.1e}",
        row.note,
    )


def title(cell: tuple[str, str, int], rows: list[Row]) -> str:
    case, dtype, batch = cell
    return f"{case}, {dtype}, batch {batch}, {rows[0].device}"


def tables(report: Report) -> list[Table]:
    """One rich table per cell."""
    from rich.table import Table
    from rich.text import Text

    out = []
    for cell, rows in report.cells().items():
        table = Table(title=title(cell, rows), title_justify="left")
        for heading in HEADINGS:
            number = heading not in ("provider", "precision", "note")
            table.add_column(heading, justify="right" if number else "left", no_wrap=heading != "note")
        for row in rows:
            table.add_row(*(Text(v, "bold" if row.provider == OURS else "") for v in values(row)))
        out.append(table)
    return out


def to_csv(report: Report) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, [f.name for f in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in report.rows)
    return out.getvalue()


def to_markdown(report: Report) -> str:
    lines = ["# resnet_fast beside its peers", "", READING, ""]
    for cell, rows in report.cells().items():
        lines += [f"## {title(cell, rows)}", "", f"| {' | '.join(HEADINGS)} |", "|" + "---|" * len(HEADINGS)]
        lines += ["| " + " | ".join(v.replace("|", "\\|") for v in values(row)) + " |" for row in rows]
        lines.append("")
    lines += ["## Provenance", ""]
    lines += [f"- {key}: {value}" for key, value in report.provenance.items()]
    return "\n".join(lines) + "\n"


def to_json(report: Report) -> str:
    return json.dumps(report.to_dict(), indent=2) + "\n"


def to_png(report: Report) -> bytes:
    """Horizontal bars of images per second, one panel per cell, each bar with its ratio to the best stock path."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cells = report.cells()
    heights = [len(rows) + 1.2 for rows in cells.values()]
    figure = Figure(figsize=(9, 0.34 * sum(heights) + 0.9), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(cells), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, (cell, rows) in zip(axes, cells.items(), strict=True):
        _panel(axis, title(cell, rows), rows)
    axes[-1].set_xlabel("images per second (more is better); label: x the best stock PyTorch path")
    what = report.provenance
    figure.suptitle(
        f"{what.get('gpu', what.get('cpu'))}, threads: {what.get('threads')}, {what.get('date')}", fontsize=8
    )
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=min(130.0, 60_000 / figure.get_figheight()))  # Agg ends at 2**16 pixels
    return out.getvalue()


def _panel(axis: Any, heading: str, rows: list[Row]) -> None:
    speeds = [row.images_per_s or 0.0 for row in rows]
    colours = ["#d1495b" if r.provider == OURS else "#30638e" if r.stock else "#9aa5b1" for r in rows]
    axis.barh(range(len(rows)), speeds, color=colours)
    axis.set_yticks(range(len(rows)), [_label(row) for row in rows], fontsize=8)
    axis.invert_yaxis()
    axis.set_title(heading, fontsize=9, loc="left")
    axis.set_xlim(0, (max(speeds) or 1) * 1.25)
    axis.spines[["top", "right"]].set_visible(False)
    for place, row in enumerate(rows):
        if row.images_per_s is None:
            text = "did not run, see the table"
        else:
            text = f"{row.images_per_s:.1f}" + (f"  ({row.ratio:.2f}x)" if row.ratio is not None else "")
        axis.text(speeds[place], place, f" {text}", va="center", fontsize=8)


def _label(row: Row) -> str:
    """The provider, and its precision where that is not the one asked for."""
    return row.provider if row.precision in ("", row.dtype) else f"{row.provider} (in {row.precision})"


def require_matplotlib() -> None:
    """UserError where matplotlib is absent; asked before a long run, not after it."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError(
            "matplotlib for the bar chart", f"no such package ({error})", 'pip install "resnet-fast[bench]"'
        ) from error


def prepare_folder(out: Path) -> Path:
    """Create ``out``; UserError where that or writing into it is impossible, before anything is measured."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise UserError("a folder to write to", f"{out} ({error.strerror})", "name another with --out") from error
    return out


def write(report: Report, out: Path, stem: str = "bench") -> list[Path]:
    """Write ``<stem>.csv``, ``.md``, ``.json`` and ``.png`` into ``out``; returns their paths."""
    contents: dict[str, bytes] = {
        "csv": to_csv(report).encode(),
        "md": to_markdown(report).encode(),
        "json": to_json(report).encode(),
        "png": to_png(report),
    }
    prepare_folder(out)
    return [_replace(out / f"{stem}.{suffix}", content) for suffix, content in contents.items()]


def _replace(path: Path, content: bytes) -> Path:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would hide the report from others
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return path
