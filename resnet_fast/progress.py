"""Say how far the compilation of kernels is, wherever it happens."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from . import flags

log = logging.getLogger("resnet_fast")
OnProgress = Callable[[int, int, str], None]
"""Called with kernels done, kernels in all, and the name of the last one."""


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
