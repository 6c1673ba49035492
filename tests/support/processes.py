"""Programs in processes of their own, and functions in threads of their own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

LIMIT_S = 300
"""After so many seconds something hangs. The machine may have other work: it is no limit of speed."""


def in_threads(*works: Callable[[], object]) -> None:
    """Run each in a thread of its own, all at the same time, and raise what one of them raised."""
    with ThreadPoolExecutor(len(works)) as pool:
        for future in [pool.submit(work) for work in works]:
            future.result(timeout=LIMIT_S)


def run_python(
    code: str, *arguments: object, timeout: float = LIMIT_S, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run ``python -c code`` and keep what it wrote; ``options`` are those of :func:`subprocess.run`."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, **{"capture_output": True, "text": True, "timeout": timeout} | options)
