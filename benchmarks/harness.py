"""Time callables, and nothing else: two clocks with one interface, and three ways to take samples with them.

- :func:`measure` times calls one at a time from an idle device, the competitors interleaved: whole nets and layers.
- :func:`cold` times kernels of a few microseconds, which are shorter than their launch from Python.
- :func:`best` times one call again and again, for a ceiling.

Interleaved runs time all competitors turn by turn, in a new random order each round. A machine that slows down for a
while slows down all of them, and the ratios stay honest.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

Call = Callable[[], object]
MS, US = 1e6, 1e3
"""Nanoseconds in a millisecond and in a microsecond."""

FLUSH_BYTES = 512 << 20
"""About 170 us to overwrite on an H100, ten times its L2."""


@dataclass(frozen=True)
class TimingPlan:
    """How much to measure: ``rounds`` turns per competitor after ``warmup`` calls.

    A turn times ``calls`` calls, and more while it has lasted less than ``turn_ms``: short calls need more samples.
    """

    rounds: int = 10
    calls: int = 2
    turn_ms: float = 20.0
    warmup: int = 2
    seed: int = 0


@dataclass
class TimingSamples:
    """Raw times of one competitor in nanoseconds, in the order taken; ``error`` if it failed on the way."""

    ns: list[int] = field(default_factory=list)
    error: str = ""

    def quartiles(self, unit: float = MS) -> tuple[float, float, float]:
        """Return the first quartile, the median and the third quartile; there must be at least one sample.

        Args:
            unit: nanoseconds per unit of the result, ``MS`` or ``US``.
        """
        times = sorted(t / unit for t in self.ns)
        if len(times) == 1:
            return times[0], times[0], times[0]
        q1, median, q3 = statistics.quantiles(times, n=4, method="inclusive")
        return q1, median, q3


def first_line(error: BaseException) -> str:
    """Return an exception on one line: its type, and the first line of its message that is not empty."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}"[:240] if lines else type(error).__name__


Clock = Callable[[Iterable[Call], Call | None], list[int]]
"""``clock(calls, before)`` returns the nanoseconds that each call took; ``before`` runs untimed in front of each."""


def clock_of(device: str) -> Clock:
    """Return the clock of a device, ``cpu`` or a CUDA device."""
    return _cuda_clock if torch.device(device).type == "cuda" else _cpu_clock


def _cpu_clock(calls: Iterable[Call], before: Call | None) -> list[int]:
    found = []
    for call in calls:
        if before is not None:
            before()
        start = time.perf_counter_ns()
        call()
        found.append(time.perf_counter_ns() - start)
    return found


def _cuda_clock(calls: Iterable[Call], before: Call | None) -> list[int]:
    """Device time between two events around each call, all in one queue that starts empty."""
    pairs = []
    torch.cuda.synchronize()
    for call in calls:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        if before is not None:
            before()
        begin.record()
        call()
        end.record()
        pairs.append((begin, end))
    torch.cuda.synchronize()
    return [round(begin.elapsed_time(end) * MS) for begin, end in pairs]


def measure(
    calls: Mapping[str, Call],
    plan: TimingPlan,
    device: str = "cpu",
    deadline: float | None = None,
    on_turn: Callable[[str, int], None] | None = None,
) -> dict[str, TimingSamples]:
    """Time every callable of ``calls`` in interleaved turns.

    A turn opens with one untimed call. It warms caches that the last competitor filled, and it absorbs that one's
    worker threads, which spin for some milliseconds after their last job.

    Args:
        calls: competitors by name.
        plan: how many rounds, and what a turn is.
        device: the device that the calls run on.
        deadline: a ``time.monotonic()`` value. It ends the run after a whole round, so that all competitors had the
            same number of turns. It also cuts the warm-up, but the first round always runs.
        on_turn: ``on_turn(name, round)`` is called before each turn.

    Returns:
        Samples by name. A callable that raises keeps the first line of its error and leaves the run; the others go on.
    """
    clock = clock_of(device)
    result = {name: TimingSamples() for name in calls}
    for name, call in calls.items():
        _guarded(result[name], _warm_up, call, plan.warmup, deadline)
    for number, order in _rounds(calls, plan.rounds, plan.seed, deadline):
        for name in order:
            samples = result[name]
            if samples.error:
                continue
            if on_turn is not None:
                on_turn(name, number)
            _guarded(samples, _turn, calls[name], clock, plan, samples.ns)
    return result


def cold(calls: Mapping[str, Call], device: str, rounds: int = 40, limit_s: float = 5.0) -> dict[str, TimingSamples]:
    """Time each call once per round with a cold L2 and a queue that stays filled.

    Before each call a large buffer is overwritten. That takes longer than the launches from Python, and leaves L2 cold,
    as between the layers of a net. On a CPU there is no such buffer.

    Args:
        calls: competitors by name.
        device: the device that the calls run on.
        rounds: how many; fewer where ``limit_s`` seconds end before, at least one.

    Returns:
        Samples by name, the same number for each.
    """
    end = time.monotonic() + limit_s
    on_gpu = torch.device(device).type == "cuda"
    for call in calls.values():
        _warm_up(call, 3 if on_gpu else 1, None)
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device).zero_ if on_gpu else None
    found = {name: TimingSamples() for name in calls}
    for _, order in _rounds(calls, rounds, 0, end):
        for name, ns in zip(order, clock_of(device)([calls[name] for name in order], flush), strict=True):
            found[name].ns.append(ns)
    return found


def best(call: Call, device: str, runs: int = 20) -> float:
    """Return the seconds of the fastest of ``runs`` calls, after two untimed ones."""
    _warm_up(call, 2, None)
    return min(clock_of(device)([call] * runs, None)) * 1e-9


def graphed(call: Call) -> Call:
    """Record ``call`` as a CUDA graph, after warm-up calls on the capturing stream; return the graph's replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        _warm_up(call, 3, None)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def _rounds(
    names: Iterable[str], rounds: int, seed: int, deadline: float | None
) -> Iterator[tuple[int, Sequence[str]]]:
    """The number of each round and its order; the first one comes whatever the deadline."""
    order, rng = list(names), random.Random(seed)
    for number in range(rounds):
        if number and _over(deadline):
            return
        rng.shuffle(order)
        yield number, tuple(order)


def _warm_up(call: Call, n: int, deadline: float | None) -> None:
    for _ in range(n):
        if _over(deadline):
            return
        call()


def _over(deadline: float | None) -> bool:
    return deadline is not None and time.monotonic() >= deadline


def _turn(call: Call, clock: Clock, plan: TimingPlan, ns: list[int]) -> None:
    """One untimed call, then the timed ones of a turn, appended to ``ns``."""
    call()
    enough, end = len(ns) + plan.calls, time.perf_counter_ns() + plan.turn_ms * MS
    while len(ns) < enough or time.perf_counter_ns() < end:
        ns += clock((call,), None)


def _guarded(samples: TimingSamples, work: Callable[..., None], *arguments: object) -> None:
    try:
        work(*arguments)
    except Exception as error:  # a competitor's failure of any kind is a row of the report
        samples.error = first_line(error)
        samples.ns.clear()
