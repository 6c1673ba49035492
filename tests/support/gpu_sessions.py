"""The rows that a command for a GPU has written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def rows(out: Path, name: str) -> list[dict[str, Any]]:
    """Return the rows of every line, and fail if a line is cut off."""
    return [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]
