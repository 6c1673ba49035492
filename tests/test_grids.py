"""The rule that drops cases of a grid drops no pair of values."""

from __future__ import annotations

from itertools import combinations, product

import pytest

from tests.support.grids import covering

AXES = [range(8), "abc", ("none", "exact", "packed"), (True, False)]


@pytest.mark.parametrize("allowed", [lambda row: True, lambda row: row[1] != "a" or row[2] != "packed"])
def test_every_pair_is_left_and_no_row_is_made_up(allowed) -> None:
    grid = [row for row in product(*AXES) if allowed(row)]
    chosen = covering(grid)
    assert set(chosen) <= set(grid) and chosen == sorted(chosen, key=grid.index)
    for i, j in combinations(range(len(AXES)), 2):
        assert {(row[i], row[j]) for row in chosen} == {(row[i], row[j]) for row in grid}
    assert 24 <= len(chosen) <= 30 < len(grid) / 4  # 24 pairs of the two longest axes


def test_two_axes_lose_nothing() -> None:
    grid = list(product(range(3), "ab"))
    assert covering(grid) == grid
