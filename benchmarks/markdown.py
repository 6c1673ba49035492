"""Write Markdown tables: of benchmark reports, of the GPU reports and of docs/tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

LEFT, RIGHT = "---", "---:"
"""How a column is aligned."""


def row(cells: Iterable[object]) -> str:
    """Return one line of a table, with the cells' own ``|`` escaped."""
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def table(headings: Sequence[str], rows: Iterable[Iterable[object]], align: Sequence[str] = ()) -> str:
    """Return a table without a line break at its end.

    Args:
        headings: one per column.
        rows: cells in the order of the headings.
        align: ``LEFT`` or ``RIGHT`` per column; all to the left by default.
    """
    return "\n".join([row(headings), row(align or [LEFT] * len(headings)), *map(row, rows)])
