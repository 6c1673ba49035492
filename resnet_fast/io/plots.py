"""Draw figures without a display, and mark the files as ours, so that a later run knows which it may replace."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError, missing_package
from . import safe_files

COLOURS = ("#d1495b", "#30638e", "#00798c", "#edae49", "#6a4c93", "#5c5c5c")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
"""Markers distinguish curves that overlap or are printed in grey."""

KINDS = {".png": "Software", ".svg": "Creator", ".pdf": "Creator"}
"""File endings of pictures, and the metadata field of each that names the program."""

AUTHOR = "resnet_fast"
LARGEST_SIDE = 60_000
"""Most pixels of a side; Agg's limit is 2**16."""


def require_matplotlib(purpose: str, extra: str, instead: str = "") -> None:
    """Raise UserError if matplotlib is missing; call it before a long run, not after it."""
    try:
        import matplotlib.backends.backend_agg
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise missing_package("matplotlib", purpose, error, extra, instead) from error


def figure(rows: int, columns: int, size: tuple[float, float], **layout: Any) -> tuple[Any, list[list[Any]]]:
    """Return a figure of ``size`` inches on the Agg canvas, and its axes by row; ``layout`` goes to ``subplots``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    picture = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(picture)
    return picture, [list(row) for row in picture.subplots(rows, columns, squeeze=False, **layout)]


def encode(picture: Any, kind: str = ".png", dpi: float = 110) -> bytes:
    """Return the bytes of a picture file; ``kind`` is one of :data:`KINDS`. Very large figures get a lower ``dpi``."""
    content = io.BytesIO()
    dpi = min(dpi, LARGEST_SIDE / max(picture.get_size_inches()))
    picture.savefig(content, format=kind.removeprefix("."), dpi=dpi, metadata={KINDS[kind]: AUTHOR})
    return content.getvalue()


def is_ours(content: bytes) -> bool:
    """Return whether a picture's bytes come from :func:`encode`."""
    return content[:5] in (b"\x89PNG\r", b"<?xml", b"%PDF-") and AUTHOR.encode() in content


def check_target(path: Path, todo: str) -> None:
    """Check that a picture may be written to ``path``.

    Raises:
        UserError: an unknown ending, a file that is not ours, or a path that cannot be written.
    """
    if path.suffix.lower() not in KINDS:
        raise UserError(f"a picture file, {', '.join(KINDS)}", str(path), todo)
    safe_files.check_target(path, "a picture file of this program", is_ours, todo=todo)


def limits(values: Sequence[float], margin: float = 1.1) -> tuple[float, float]:
    """Return bounds for a logarithmic axis that strictly contain ``values``, which are positive."""
    return min(values) / margin, max(values) * margin
