"""Python programs in processes of their own."""

from __future__ import annotations

import subprocess
import sys
from typing import Any


def run_python(code: str, *arguments: object, timeout: float = 120, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run ``python -c code`` and keep what it wrote; ``options`` are those of :func:`subprocess.run`."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, **{"capture_output": True, "text": True, "timeout": timeout} | options)
