"""benchmarks/harness.py: the order of runs, the samples that are kept, and what a failure does."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

from resnet_fast.benchmarks import harness
from resnet_fast.benchmarks.harness import US, TimingPlan, TimingSamples, best, clock_of, cold, first_line, measure

QUICK = TimingPlan(rounds=4, calls=2, warmup=3, turn_ms=0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the nanoseconds of a clock that only the test moves."""
    now = [0]
    monkeypatch.setattr(harness.time, "perf_counter_ns", lambda: now[0])
    return now


def test_every_competitor_gets_the_same_turns() -> None:
    seen: list[str] = []
    calls = {name: lambda name=name: seen.append(name) for name in "abc"}
    result = measure(calls, QUICK)
    assert all(len(s.ns) == 8 and not s.error and min(s.ns) > 0 for s in result.values())
    assert seen[:9] == list("aaabbbccc")  # warm-up
    rounds = [seen[9 + 9 * r : 18 + 9 * r] for r in range(4)]
    assert all(sorted(r) == list("aaabbbccc") and r[0::3] == r[1::3] == r[2::3] for r in rounds)
    assert len({tuple(r) for r in rounds}) > 1  # the order is drawn anew


def test_order_depends_on_the_seed_alone() -> None:
    def order(seed: int) -> list[tuple[str, int]]:
        turns: list[tuple[str, int]] = []
        names = {name: lambda: None for name in "abcdef"}
        measure(names, TimingPlan(rounds=3, calls=1, turn_ms=0, seed=seed), on_turn=lambda n, r: turns.append((n, r)))
        return turns

    assert order(1) == order(1) != order(2)


def test_deadline_leaves_one_whole_round_and_no_warm_up() -> None:
    seen: list[str] = []
    calls = {name: lambda name=name: seen.append(name) for name in "ab"}
    result = measure(calls, QUICK, deadline=time.monotonic() - 1)
    assert [len(s.ns) for s in result.values()] == [2, 2] and len(seen) == 6
    assert [len(s.ns) for s in measure(calls, QUICK, deadline=time.monotonic() + 60).values()] == [8, 8]


def test_short_calls_are_repeated_until_the_turn_has_lasted(clock: list[int]) -> None:
    def lasting(ns: int) -> Callable[[], None]:
        def call() -> None:
            clock[0] += ns

        return call

    result = measure({"a": lasting(100_000), "b": lasting(4_000_000)}, TimingPlan(rounds=1, calls=2, turn_ms=3))
    assert result["a"].ns == [100_000] * 30
    assert result["b"].ns == [4_000_000] * 2


@pytest.mark.parametrize("lives", [0, 2, 6])
def test_failure_takes_one_competitor_out(lives: int) -> None:
    left = [lives]

    def fails() -> None:
        if not left[0]:
            raise RuntimeError("\n  broke here\nand more")
        left[0] -= 1

    result = measure({"bad": fails, "good": lambda: None}, QUICK)
    assert result["bad"].error == "RuntimeError: broke here" and result["bad"].ns == []
    assert len(result["good"].ns) == 8


def test_quartiles() -> None:
    assert TimingSamples([1_000_000, 2_000_000, 3_000_000, 4_000_000, 5_000_000]).quartiles() == (2, 3, 4)
    assert TimingSamples([7_000_000]).quartiles() == (7, 7, 7)
    assert TimingSamples([2_000]).quartiles(US) == (2.0, 2.0, 2.0)


def test_cold_timing_gives_every_competitor_the_same_turns() -> None:
    seen: list[str] = []
    found = cold({name: lambda name=name: seen.append(name) for name in "ab"}, "cpu", rounds=3)  # type: ignore[misc]
    assert [len(samples.ns) for samples in found.values()] == [3, 3] and len(seen) == 8


def test_best_is_the_fastest_call_in_seconds(clock: list[int]) -> None:
    lasts = [1, 1, 30_000_000, 4_000_000, 20_000_000]  # the first two warm up

    def call() -> None:
        clock[0] += lasts.pop(0)

    assert best(call, "cpu", runs=3) == pytest.approx(0.004) and not lasts


def test_both_clocks_time_each_call_and_not_what_runs_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            seen.append("event")
            self.at = len(seen)

        def elapsed_time(self, end: Event) -> float:
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: seen.append("synchronize"))
    one = ["before", "event", "call", "event"]
    for device, expected in (("cuda", ["synchronize", *one, *one, "synchronize"]), ("cpu", ["before", "call"] * 2)):
        seen.clear()
        found = clock_of(device)([lambda: seen.append("call")] * 2, lambda: seen.append("before"))
        assert seen == expected and len(found) == 2
        assert device == "cpu" or found == [2_000_000, 2_000_000]


def test_first_line_of_an_empty_message() -> None:
    assert first_line(KeyError()) == "KeyError"
