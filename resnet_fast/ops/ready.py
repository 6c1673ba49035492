"""Compile the kernels of a call ahead of its first run on a GPU, and say so while it lasts."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .. import flags
from ..calls import Call, NetCall
from ..impl import Impl, PlannedCall
from ..spec import NetSpec, Spec

log = logging.getLogger("resnet_fast")
OnProgress = Callable[[int, int, str], None]
"""Called with kernels done, kernels in all, and the name of the last one."""


def ready(call: Call | NetCall, spec: Spec | NetSpec, impl: Impl) -> None:
    """Compile what a call of inference launches. Call it without a lock."""
    if not impl.ahead or is_off() or not all(spec.out_shape()):
        return
    device, ahead = call.x.device, impl.compiler
    with announced() as progress:
        ahead.compile_ahead([PlannedCall(ahead.meta_call(call), spec)], ahead.target_of(None, device), progress)


def is_off() -> bool:
    """Return whether each launch shall compile its own kernel."""
    return flags.COMPILE_WORKERS.read() == "0"


@contextmanager
def announced() -> Iterator[OnProgress]:
    """Yield a function that shows progress: a line on stderr if that is a terminal, and one in the log at the end."""
    start, last = time.monotonic(), 0
    terminal = sys.stderr is not None and sys.stderr.isatty()

    def progress(done: int, total: int, name: str) -> None:
        nonlocal last
        last = total
        if terminal:
            text = f"resnet_fast compiles kernels: {done} of {total}, {name}"
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)

    try:
        yield progress
    finally:
        if last and terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
        if last:
            log.info("compiled %d kernels in %.1f s", last, time.monotonic() - start)
