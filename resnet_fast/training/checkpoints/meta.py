"""``meta.json``: what a checkpoint says of itself, sealed by a digest and checked field by field when it is read.

A checkpoint may come from anywhere, with a seal that fits its content. So every field is checked for its type, and
every file is checked for its size and digest.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...io import safe_files
from ..recipe import from_dict
from .shards import METADATA

FORMAT = "resnet_fast training checkpoint 1"
META = "meta.json"
SHARDS = "shards"
FOLDER = "checkpoints"
NAME = re.compile(r"step-[0-9]{8,}")
BEST = re.compile(r"best-[0-9]{8,}")
LAYOUTS = {"full": ("model.safetensors", "state.pt"), "sharded": (f"{SHARDS}/{METADATA}", "state.pt")}
"""Layout -> the files that every checkpoint of it has, whatever the recipe."""


class Damaged(UserError):
    """A checkpoint that cannot be read as one."""


def is_number(value: Any) -> bool:
    """Return whether ``value`` is a finite int or float; a bool is not a number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_figures(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(map(is_number, value))


def _is_at_step(value: Any) -> bool:
    return isinstance(value, dict) and _is_count(value.get("step"))


def _is_listing(value: Any) -> bool:
    """Return whether ``value`` maps file names to pairs of size and digest."""
    if not isinstance(value, dict) or any("\0" in name for name in value):
        return False
    pairs = [v for v in value.values() if isinstance(v, list) and len(v) == 2]
    return len(pairs) == len(value) and all(_is_count(size) and isinstance(digest, str) for size, digest in pairs)


FIELDS: dict[str, Callable[[Any], bool]] = {
    "layout": lambda v: isinstance(v, str) and v in LAYOUTS,
    "files": _is_listing,
    "step": _is_count,
    "classes": lambda v: _is_count(v) and v > 0,
    "recipe": lambda v: isinstance(v, dict),
    "seconds": is_number,
    "sums": _is_figures,
    "unreadable": lambda v: isinstance(v, list) and all(isinstance(name, str) for name in v),
    "run": lambda v: isinstance(v, str),
    "best": lambda v: v is None or (_is_at_step(v) and is_number(v.get("val_error"))),
    "window": lambda v: v is None or (_is_at_step(v) and _is_figures(v.get("before"))),
}
"""Each field that a run reads from ``meta.json``, and the check of its value."""
OPTIONAL: dict[str, Any] = {"unreadable": [], "run": "", "window": None, "best": None}
"""Fields that checkpoints of earlier versions do not have, and the values used for them."""


def step_of(place: Path) -> int:
    """Return the step in the name of a checkpoint's folder."""
    return int(place.name.rpartition("-")[2])


def seal(meta: Mapping[str, Any]) -> str:
    """Return the digest of the content of a ``meta.json``. It does not depend on the layout of the text."""
    return hashlib.sha256(safe_files.json_text(meta, sort_keys=True).encode()).hexdigest()


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: Any) -> str:
    """Return what hashlib.file_digest returns, which Python 3.10 does not have."""
    digest = hashlib.sha256()
    for block in iter(lambda: file.read(1 << 20), b""):
        digest.update(block)
    return digest.hexdigest()


def read_sealed(place: Path) -> dict[str, Any]:
    """Return the content of ``meta.json`` in ``place`` after checking its seal.

    Raises:
        Damaged: The file is missing, is a link, has another format, or was changed.
    """
    try:
        if (place / META).is_symlink():
            raise Damaged(f"files inside {place}", f"a link {META}", "use a checkpoint that you trust")
        meta = safe_files.json_value(safe_files.read_plain(place / META))
    except (OSError, ValueError) as error:
        raise Damaged("a checkpoint folder with meta.json", f"{place} ({error})", "name another one") from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise Damaged(f"a checkpoint of the format {FORMAT!r}", f"{place}", "it was written by something else")
    if meta.pop("sha256", None) != seal(meta):
        raise Damaged("a whole checkpoint", f"{place / META} (other content)", "use an older checkpoint")
    return meta


def read_meta(place: Path) -> dict[str, Any]:
    """Return the content of ``meta.json`` in ``place`` after checking each of its fields and each file it lists.

    Raises:
        Damaged: The seal, a field or a file is wrong; the message names it.
    """
    meta = read_sealed(place)
    _check_fields(place, meta)
    root = place.resolve()
    for name, (size, digest) in meta["files"].items():
        path = place / name
        try:
            if not path.resolve().is_relative_to(root):
                raise Damaged(f"files inside {place}", f"{name!r} in its {META}", "use a checkpoint that you trust")
            if not path.is_file():
                what = "missing"
            elif path.stat().st_size != size or digest_of(path) != digest:
                what = f"{path.stat().st_size} bytes of {size}, or other content"
            else:
                continue
        except (OSError, RuntimeError) as error:  # not readable; a cycle of links, a name too long
            what = " ".join(str(error).split())
        raise Damaged("a whole checkpoint", f"{path} ({what})", "use an older checkpoint")
    return meta


def _check_fields(place: Path, meta: Mapping[str, Any]) -> None:
    """Raise :class:`Damaged` for the first field that no training run writes."""
    wrong = [name for name, right in FIELDS.items() if not right(meta[name] if name in meta else OPTIONAL.get(name))]
    if wrong:
        got = f"{place / META} with {wrong[0]} = {str(meta.get(wrong[0]))[:80]!r}"
        raise Damaged(f"{wrong[0]} as a training run writes it", got, "use an older checkpoint")
    if (NAME.fullmatch(place.name) or BEST.fullmatch(place.name)) and meta["step"] != step_of(place):
        raise Damaged(f"a checkpoint of step {step_of(place)}", f"{place} of step {meta['step']}", "rename the folder")
    try:
        from_dict(meta["recipe"])
    except UserError as error:
        raise Damaged(error.expected, f"{error.got} in {place / META}", "use an older checkpoint") from error
    absent = [name for name in LAYOUTS[meta["layout"]] if name not in meta["files"]]
    if absent:
        raise Damaged(f"{absent[0]} among its files", f"{place / META} without", "use an older checkpoint")
