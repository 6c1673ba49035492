"""The CUDA side of graphs: streams, memory pool and capture, for what a net does with one set of weights."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from ..locks import ForkSafeLock

WARM_UPS = 3
"""Eager runs before a capture, during which nothing may compile, load a kernel or choose an algorithm."""

Forward = Callable[[Tensor], Tensor]
T = TypeVar("T")


class Recorder:
    """The CUDA side of the graphs of one net with one set of weights.

    The graphs share a memory pool: a replay overwrites what another left in it, so replays take turns.
    """

    device_type: ClassVar[str] = "cuda"

    def __init__(self, device: torch.device):
        self.device = device
        self._stream = torch.cuda.Stream(device)
        self._pool: Any = None
        self._last_use = torch.cuda.Event()
        self._lock = ForkSafeLock()

    @staticmethod
    def is_recording() -> bool:
        """Return whether the current stream is being captured."""
        return torch.cuda.is_current_stream_capturing()

    def warm_up(self, fn: Callable[[Tensor], object], x: Tensor, layout: torch.memory_format) -> Tensor:
        """Run ``fn`` on a side stream, as a capture requires, and return its static input (N, C, H, W).

        No replay runs meanwhile: kernels may keep counters for each stream, and graphs have those of the side stream.
        """
        with self.turn():
            current = torch.cuda.current_stream(self.device)
            self._stream.wait_stream(current)
            try:
                with torch.cuda.stream(self._stream):
                    # Not during the capture: in deterministic mode filling new memory would become part of the graph.
                    static = torch.empty_like(x, memory_format=layout)
                    static.copy_(x)
                    for _ in range(WARM_UPS):
                        fn(static)
            finally:
                current.wait_stream(self._stream)
        return static

    def capture(self, fn: Callable[[Tensor], T], x: Tensor) -> tuple[Callable[[], None], T]:
        """Record ``fn(x)``. Return the function that launches it and what receives its result."""
        graph = torch.cuda.CUDAGraph()
        try:
            with self._recording(graph):
                # cuBLAS keeps a workspace per stream. Eager work on the same stream would write to it during a replay,
                # and any caller may free it. If it is cleared, cuBLAS allocates a new one from the pool.
                torch._C._cuda_clearCublasWorkspaces()
                try:
                    y = fn(x)
                finally:
                    torch._C._cuda_clearCublasWorkspaces()
        except Exception:
            # After a failed capture torch 2.11 still records random numbers, and every later torch.rand on the GPU
            # raises. A capture that succeeds resets that state.
            with self._recording(torch.cuda.CUDAGraph()):
                torch.zeros(1, device=self.device)
            raise
        self._pool = graph.pool()
        return graph.replay, y

    @contextmanager
    def _recording(self, graph: torch.cuda.CUDAGraph) -> Iterator[None]:
        # The outer context restores the caller's stream, which a failed capture does not. thread_local: a data loader
        # or another request may allocate at the same time.
        with (
            torch.cuda.stream(self._stream),
            torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
        ):
            yield

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Inside the ``with``, only this thread uses the static buffers, and its stream waits for their last use."""
        with self._lock:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(self._last_use)
            try:
                yield
            finally:
                self._last_use.record(stream)

    @contextmanager
    def same_random_numbers(self) -> Iterator[None]:
        """After the ``with``, random numbers continue as if nothing inside had drawn any."""
        with torch.random.fork_rng([self.device.index] if self.device.type == "cuda" else []):
            yield

    @staticmethod
    def give_back() -> None:
        """Return the memory of dropped graphs to the device."""
        torch.cuda.empty_cache()

    def drain(self) -> None:
        """Wait for the last replay on any stream."""
        if not sys.is_finalizing() and not self.is_recording():  # a capture may not wait
            self._last_use.synchronize()


@contextmanager
def no_autocast_cache() -> Iterator[None]:
    """Inside the ``with``, autocast casts each weight where it is used, so that the casts are part of a graph.

    Otherwise a graph would read casts that autocast keeps: older than a write to the weight, and freed at the end of
    the caller's ``torch.autocast``; or autocast would keep casts that are in the graph's memory.
    """
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def cause(error: BaseException, handled: BaseException | None) -> str:
    """Return the first error after ``handled`` in one line. The error of ending a failed capture says little."""
    while error.__context__ is not None and error.__context__ is not handled:
        error = error.__context__
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
