"""Timing of single kernels and of recorded graphs, where benchmarks/harness.py times whole nets.

A kernel of a few microseconds is shorter than its launch from Python. So the queue is kept filled: before each call a
large buffer is overwritten, which takes longer than the launches and leaves L2 cold, as between the layers of a net.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

RUNS = 20
FLUSH_BYTES = 512 << 20
"""About 170 us on an H100, ten times its L2."""


def seconds(call: Callable[[], Any], on_gpu: bool, runs: int = RUNS) -> list[float]:
    """Times of ``runs`` calls after two untimed ones; on a GPU between events in one queue."""
    call(), call()
    if not on_gpu:
        found = []
        for _ in range(runs):
            start = time.perf_counter()
            call()
            found.append(time.perf_counter() - start)
        return found
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(runs)]
    for begin, end in events:
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) * 1e-3 for begin, end in events]


def graphed(call: Callable[[], Any]) -> Callable[[], None]:
    """``call`` recorded as a CUDA graph, after warm-up calls on the capturing stream; its replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def cold(
    calls: Mapping[str, Callable[[], Any]], on_gpu: bool, rounds: int = 40, limit_s: float = 5.0
) -> dict[str, list[float]]:
    """Seconds of each call, turn by turn in an order drawn anew for each round, with a cold L2."""
    rng, order = random.Random(0), list(calls)
    found: dict[str, list[float]] = {name: [] for name in calls}
    end = time.monotonic() + limit_s
    for name in order:
        for _ in range(3 if on_gpu else 1):
            calls[name]()
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda") if on_gpu else None
    for number in range(rounds):
        if number and time.monotonic() > end:
            break
        rng.shuffle(order)
        if flush is None:
            for name in order:
                start = time.perf_counter()
                calls[name]()
                found[name].append(time.perf_counter() - start)
            continue
        events = {name: [torch.cuda.Event(enable_timing=True) for _ in range(2)] for name in order}
        for name in order:
            flush.zero_()
            events[name][0].record()
            calls[name]()
            events[name][1].record()
        torch.cuda.synchronize()
        for name in order:
            found[name].append(events[name][0].elapsed_time(events[name][1]) * 1e-3)
    return found


def quartiles(seconds_: list[float], scale: float = 1e6) -> list[float]:
    """First quartile, median and third quartile, in microseconds unless ``scale`` says otherwise."""
    if len(seconds_) == 1:
        return [round(seconds_[0] * scale, 3)] * 3
    return [round(q * scale, 3) for q in statistics.quantiles(seconds_, n=4, method="inclusive")]
