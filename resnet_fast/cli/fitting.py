"""Fit tables to a narrow terminal without cutting a name or a number.

rich shortens cells if a table is wider than the terminal. Here text is wrapped between words, and a table that is still
too wide is split into several, one below the other, that begin with the same columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Column, Table

KEYS_SHARE = 0.6
"""The share of the width that the repeated columns may take."""

_BORDERS = 3
"""Characters around a cell: a line and two spaces."""


@dataclass(frozen=True)
class _Need:
    """A column, and the width of its longest word and of its longest cell."""

    column: Column
    least: int
    natural: int


def _need(column: Column) -> _Need:
    from rich.text import Text

    texts = [Text.from_markup(cell) if isinstance(cell, str) else cell for cell in (column.header, *column.cells)]
    plain = [str(text) for text in texts]
    lines = [line for text in plain for line in text.splitlines()]
    words = [word for line in lines for word in line.split()]
    least = max((len(word) for word in words), default=1)
    if column.justify == "right":  # a number stays in one piece with its unit; a heading may fold
        least = max([least, *(len(line) for text in plain[1:] for line in text.splitlines())])
    return _Need(column, least, max(map(len, lines), default=1))


def _width(columns: Sequence[_Need]) -> int:
    return 1 + sum(need.least + _BORDERS for need in columns)


def fit(table: Table, width: int) -> list[Table]:
    """Split ``table`` into tables of at most ``width`` characters that hold all of its cells.

    Every part begins with the columns before the first number, as long as they take no more than :data:`KEYS_SHARE` of
    the width. Only a word longer than the width is broken into lines.

    Returns:
        The parts, or only ``table`` if it fits.
    """
    needs = [_need(column) for column in table.columns]
    if 1 + sum(need.natural + _BORDERS for need in needs) <= width:
        return [table]
    keys: list[_Need] = []
    for need in needs:
        if need.column.justify == "right" or (keys and _width([*keys, need]) > KEYS_SHARE * width):
            break
        keys.append(need)
    parts: list[list[_Need]] = [[]]
    for need in needs[len(keys) :]:
        if parts[-1] and _width([*keys, *parts[-1], need]) > width:
            parts.append([])
        parts[-1].append(need)
    return [_part(table, [*keys, *part], width, number) for number, part in enumerate(parts)]


def _part(table: Table, needs: Sequence[_Need], width: int, number: int) -> Table:
    """Return a table of these columns. Only the first part has the title."""
    from rich.table import Table

    out = Table(title=table.title if number == 0 else None, title_justify=table.title_justify, box=table.box)
    spare = max(0, width - _width(needs))
    for need in needs:
        more = min(spare, need.natural - need.least) if need.natural > need.least else 0
        spare -= more
        wide = min(need.least + more, width - 1 - _BORDERS)
        out.add_column(need.column.header, justify=need.column.justify, overflow="fold", min_width=wide, max_width=wide)
    for row, cells in zip(table.rows, zip(*(need.column.cells for need in needs), strict=True), strict=True):
        out.add_row(*cells, style=row.style, end_section=row.end_section)
    return out
