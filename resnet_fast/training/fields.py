"""What each field of a checkpoint's ``meta.json`` has to be: the file may come from anywhere, with a seal that fits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from .shards import METADATA

SHARDS = "shards"
LAYOUTS = {"full": ("model.safetensors", "state.pt"), "sharded": (f"{SHARDS}/{METADATA}", "state.pt")}
"""Layout -> the files that it has whatever the recipe."""


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _figures(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(map(number, value))


def _listing(value: Any) -> bool:
    """Whether ``value`` maps names of files to sizes and digests."""
    if not isinstance(value, dict) or any("\0" in name for name in value):
        return False
    pairs = [v for v in value.values() if isinstance(v, list) and len(v) == 2]
    return len(pairs) == len(value) and all(_count(size) and isinstance(digest, str) for size, digest in pairs)


FIELDS: dict[str, Callable[[Any], bool]] = {
    "layout": lambda v: isinstance(v, str) and v in LAYOUTS,
    "files": _listing,
    "step": _count,
    "classes": lambda v: _count(v) and v > 0,
    "recipe": lambda v: isinstance(v, dict),
    "seconds": number,
    "sums": lambda v: _figures(v),
    "unreadable": lambda v: isinstance(v, list) and all(isinstance(name, str) for name in v),
    "run": lambda v: isinstance(v, str),
    "best": lambda v: v is None or (isinstance(v, dict) and _count(v.get("step")) and number(v.get("val_error"))),
    "window": lambda v: v is None or (isinstance(v, dict) and _count(v.get("step")) and _figures(v.get("before"))),
}
"""What a run reads of ``meta.json``, and what each has to be."""
OPTIONAL: dict[str, Any] = {"unreadable": [], "run": "", "window": None, "best": None}
