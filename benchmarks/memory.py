"""Measure the most memory that one call holds at once, as PyTorch's allocators report it."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def method(device: str) -> str:
    """Return how :func:`peak` measures on ``device``, for a report."""
    if torch.device(device).type == "cuda":
        return "torch.cuda.max_memory_allocated"
    return "the CPU allocator's events in torch.profiler"


def peak(call: Callable[[], object], device: str) -> int:
    """Return the bytes on ``device`` that ``call`` holds at its peak, above what was allocated when it began.

    Warm up first: what a first call allocates to keep (an optimizer's state, a library's workspace) would count.
    """
    gc.collect()  # what an earlier call left in a cycle must not be freed on this one's account
    return _peak_cuda(call, torch.device(device)) if torch.device(device).type == "cuda" else _peak_cpu(call)


def _peak_cuda(call: Callable[[], object], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _peak_cpu(call: Callable[[], object]) -> int:
    """The highest sum of the allocator's events, one for every block allocated (bytes > 0) or freed (< 0).

    The allocator does not know the size of blocks from before the profiler started: a call that frees such blocks has a
    lower peak than this. A warm training step allocates and frees its own.
    """
    from torch.profiler import ProfilerActivity, profile

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its log complains on stderr where there is no GPU
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    highest = held = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest


def size(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the storages of ``tensors``, each storage counted once."""
    storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}
    return sum(storages.values())
