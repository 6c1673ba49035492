"""Parametrize over part of a grid, by a rule instead of by taste."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any

Row = tuple[Any, ...]
Pair = tuple[int, Any, int, Any]


def _pairs(row: Row) -> set[Pair]:
    return {(i, row[i], j, row[j]) for i, j in combinations(range(len(row)), 2)}


def covering(grid: Iterable[Sequence[Any]]) -> list[Row]:
    """Select rows of ``grid`` in which every pair of values that occurs in it still occurs.

    A fault that one value causes, or two values together, is found by what is left. Dropped is only what repeats such
    pairs: a fault that needs three particular values at once may hide. What ``grid`` leaves out is not made up.

    Args:
        grid: rows of hashable values, one column per axis.

    Returns:
        The rows chosen, in the order of ``grid``: each time the first of those with the most pairs not seen yet.
    """
    rows = [tuple(row) for row in grid]
    open_pairs = [_pairs(row) for row in rows]
    missing = set().union(*open_pairs)
    chosen = []
    while missing:
        best = max(range(len(rows)), key=lambda i: len(open_pairs[i] & missing))
        missing -= open_pairs[best]
        chosen.append(best)
    return [rows[i] for i in sorted(chosen)]
