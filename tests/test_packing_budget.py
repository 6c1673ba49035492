"""When packing pays: a budget never spends more than it earned, and follows patterns of use."""

from __future__ import annotations

import random

import pytest

from resnet_fast import packing_budget
from resnet_fast.packing_budget import PackingBudget


@pytest.mark.parametrize("seed", range(20))
def test_nobody_loses_more_than_a_tenth_whatever_comes(seed: int) -> None:
    """Measures time in work of the stock layers, over any sequence of calls, sizes and changes of weights."""
    draw = random.Random(seed)
    whole = draw.uniform(1, 50)
    budget, stock, taken, version = PackingBudget(whole), 0.0, 0.0, 0
    kept: set[int] = set()
    change, sizes = draw.choice([0, 0.02, 0.5, 1]), draw.choice([1, 4, 24])
    for _ in range(2000):
        if draw.random() < change:
            version += 1
            kept.clear()
        size, work = draw.randrange(sizes), draw.uniform(0.5, 2)
        cost = whole * draw.choice([1, 0.3])
        if size not in kept and budget.pays(cost, None if kept else version):
            taken += cost
            kept.add(size)
        packed = size in kept
        stock += work
        taken += work * (1 - packing_budget.SAVED if packed else 1)
        budget.earn(packing_budget.earned_by(work, packed))
        assert taken <= (1 + packing_budget.ALLOWED) * stock + packing_budget.FIRST * whole


def test_weights_that_change_before_each_call_are_prepared_once() -> None:
    budget = PackingBudget(1.0)
    paid = []
    for version in range(100):
        paid.append(budget.pays(1.0, version))
        budget.earn(10.0)
    assert paid == [True] + 99 * [False]


def test_weights_that_come_again_are_prepared_at_the_second_call() -> None:
    budget = PackingBudget(1.0)
    assert budget.pays(1.0, 0)
    budget.earn(10.0)
    assert [budget.pays(1.0, 1), budget.pays(1.0, 1)] == [False, True]


def test_what_is_free_is_prepared_at_once_and_a_new_size_of_the_same_weights_too() -> None:
    budget = PackingBudget(1.0)
    assert budget.pays(1.0, 0) and budget.pays(1.0, None)
    assert not budget.pays(1.0, None) and budget.pays(0.0, None)


def test_no_more_than_some_packings_are_saved_up() -> None:
    budget = PackingBudget(1.0)
    budget.pays(0.0, 0)
    for _ in range(1000):
        budget.earn(1.0)
    assert sum(budget.pays(1.0, None) for _ in range(100)) == packing_budget.MOST


def test_kinds_of_calls_are_known_again_but_not_without_end() -> None:
    budget = PackingBudget(1.0)
    assert budget.seen("a") == 0
    budget.earn(0)
    assert budget.seen("b") == 0
    budget.earn(0)
    assert budget.seen("a") == 1 and budget.seen("b") == 2
    for i in range(packing_budget.KEYS + 5):
        budget.seen(i)
    assert len(budget._seen) == packing_budget.KEYS and budget.seen("a") == 0
