"""Time one launch as a net runs it: with a cold L2 cache, and on a GPU without Python between the launches.

    graph 1    [ flush | launch | flush | launch | ... ]        flush: overwrite a buffer larger than the L2 cache
    graph 2    [ flush |          flush |          ... ]        seconds = (graph 1 - graph 2) / launches

A small launch takes 2 us on a GPU and 20 us or more in Python, so that events around a call would measure Python. Both
graphs are replayed in turns, so that a change of the clock reaches both. Where a launch cannot be captured, it is timed
by events around each call.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch

from ..errors import named

_log = logging.getLogger("resnet_fast")

Work = Callable[[], object]

SAMPLES = 5
"""Pairs of replays; the median counts."""

BUSY_S = 10e-3
"""Seconds of a graph, where the launch is short; the difference of the two graphs is then far above noise."""

FEWEST, MOST = 4, 100
"""Launches in a graph."""

LEAST_S = 1e-7
"""A time below this is noise."""


class Stopwatch(Protocol):
    """A device that records work and replays it; :class:`GpuStopwatch` on a GPU."""

    def flush(self) -> object:
        """Overwrite the L2 cache."""

    def recorded(self, work: Work) -> Work:
        """Return a function that replays ``work``. RuntimeError where it cannot be captured."""

    def elapsed(self, work: Work) -> float:
        """Return the device's seconds from the beginning to the end of ``work``."""


class GpuStopwatch:
    """CUDA graphs and events on one GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        nbytes = max(256 << 20, 2 * torch.cuda.get_device_properties(device).L2_cache_size)
        self._buffer = torch.empty(nbytes // 4, dtype=torch.int32, device=device)

    def flush(self) -> object:
        return self._buffer.zero_()

    def recorded(self, work: Work) -> Work:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            work()
        return graph.replay

    def elapsed(self, work: Work) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize(self.device)
        return begin.elapsed_time(end) * 1e-3


def cold_seconds(call: Work, watch: Stopwatch) -> float:
    """Return the seconds of a call with a cold cache, from the beginning of one to the beginning of the next.

    Raises:
        RuntimeError: the call cannot be captured.
    """

    def one() -> None:
        watch.flush()
        call()

    for _ in range(2):  # compile, choose algorithms
        one()
    launches = max(FEWEST, min(MOST, round(BUSY_S / max(watch.elapsed(one), LEAST_S))))
    with_calls, alone = (watch.recorded(partial(_repeat, work, launches)) for work in (one, watch.flush))
    differences = [watch.elapsed(with_calls) - watch.elapsed(alone) for _ in range(SAMPLES + 1)]
    return max(statistics.median(differences[1:]) / launches, LEAST_S)  # the first replay uploads the graph


def _repeat(work: Work, times: int) -> None:
    for _ in range(times):
        work()


def seconds(call: Work, device: torch.device) -> float:
    """Return the median seconds of a call on ``device``."""
    with torch.inference_mode():
        if device.type != "cuda":
            return _on_cpu(call)
        try:
            return cold_seconds(call, GpuStopwatch(device))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            _log.info("a launch is timed outside a CUDA graph: %s", named(error))
            from triton.testing import do_bench

            return float(do_bench(call, warmup=5, rep=25, return_mode="median")) * 1e-3


def _on_cpu(call: Work) -> float:
    samples = []
    for _ in range(3):
        begin = time.perf_counter()
        call()
        samples.append(time.perf_counter() - begin)
    return statistics.median(samples)
