"""Timing, and nothing else: interleaved rounds over competing callables, raw samples kept.

One run measures all competitors, turn by turn, in an order drawn anew for each round: a machine that slows down for a
while slows all of them, and the ratios stay honest. A turn opens with one untimed call. It warms caches that the last
competitor filled, and it absorbs that one's worker threads, which spin for some milliseconds after their last job.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

Clock = Callable[[Callable[[], object]], int]


@dataclass(frozen=True)
class Plan:
    """How much to measure: ``rounds`` turns per competitor after ``warmup`` calls.

    A turn times ``calls`` calls, and more while it has lasted less than ``turn_ms``: short calls need more samples.
    """

    rounds: int = 10
    calls: int = 2
    turn_ms: float = 20.0
    warmup: int = 2
    seed: int = 0


@dataclass
class Samples:
    """Raw times of one competitor in nanoseconds, in the order taken; ``error`` if it failed on the way."""

    ns: list[int] = field(default_factory=list)
    error: str = ""

    def quartiles_ms(self) -> tuple[float, float, float]:
        """First quartile, median and third quartile in milliseconds; needs at least one sample."""
        ms = sorted(t / 1e6 for t in self.ns)
        if len(ms) == 1:
            return ms[0], ms[0], ms[0]
        q1, median, q3 = statistics.quantiles(ms, n=4, method="inclusive")
        return q1, median, q3


def first_line(error: BaseException) -> str:
    """An exception on one line: its type, and the first line of its message that is not empty."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}"[:240] if lines else type(error).__name__


def _time_cpu(call: Callable[[], object]) -> int:
    start = time.perf_counter_ns()
    call()
    return time.perf_counter_ns() - start


def _time_cuda(call: Callable[[], object]) -> int:
    """Device time between two events around the call, so that the launch queue does not hide work."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    call()
    end.record()
    end.synchronize()
    return round(begin.elapsed_time(end) * 1e6)


def measure(
    calls: Mapping[str, Callable[[], object]],
    plan: Plan,
    device: str = "cpu",
    deadline: float | None = None,
    on_turn: Callable[[str, int], None] | None = None,
) -> dict[str, Samples]:
    """Time every callable of ``calls``; returns its samples under the same name.

    ``deadline`` (a ``time.monotonic()`` value) ends the run after a whole round, so that all competitors had the same
    number of turns; it also cuts the warm-up, but the first round always runs. ``on_turn(name, round)`` is called
    before each turn. A callable that raises keeps the first line of its error and leaves the run; the others go on.
    """
    clock = _time_cuda if torch.device(device).type == "cuda" else _time_cpu
    result = {name: Samples() for name in calls}
    order = list(calls)
    rng = random.Random(plan.seed)
    for name in order:
        _guarded(result[name], _warm_up, calls[name], plan.warmup, deadline)
    for number in range(plan.rounds):
        if number and _over(deadline):
            break
        rng.shuffle(order)
        for name in order:
            samples = result[name]
            if samples.error:
                continue
            if on_turn is not None:
                on_turn(name, number)
            _guarded(samples, _turn, calls[name], clock, plan, samples.ns)
    return result


def _warm_up(call: Callable[[], object], n: int, deadline: float | None) -> None:
    for _ in range(n):
        if _over(deadline):
            return
        call()


def _over(deadline: float | None) -> bool:
    return deadline is not None and time.monotonic() >= deadline


def _turn(call: Callable[[], object], clock: Clock, plan: Plan, ns: list[int]) -> None:
    """One untimed call, then the timed ones of a turn, appended to ``ns``."""
    call()
    enough, end = len(ns) + plan.calls, time.perf_counter_ns() + plan.turn_ms * 1e6
    while len(ns) < enough or time.perf_counter_ns() < end:
        ns.append(clock(call))


def _guarded(samples: Samples, work: Callable[..., None], *arguments: object) -> None:
    try:
        work(*arguments)
    except Exception as error:  # a competitor's failure of any kind is a row of the report
        samples.error = first_line(error)
        samples.ns.clear()
