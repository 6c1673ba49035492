"""Pictures: figures without a display, as bytes that name us, so that a later run knows which it may replace."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError, missing_package
from . import safe_files

COLOURS = ("#d1495b", "#30638e", "#00798c", "#edae49", "#6a4c93", "#5c5c5c")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
"""With :data:`COLOURS`, so that curves are told apart where they lie on each other, and in grey."""

KINDS = {".png": "Software", ".svg": "Creator", ".pdf": "Creator"}
"""What pictures are written as, and the field of each that names the program."""

AUTHOR = "resnet_fast"
LARGEST_SIDE = 60_000
"""Pixels; Agg ends at 2**16."""


def require_matplotlib(purpose: str, extra: str, instead: str = "") -> None:
    """UserError where matplotlib is absent; to be asked before a long run, not after it."""
    try:
        import matplotlib.backends.backend_agg
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise missing_package("matplotlib", purpose, error, extra, instead) from error


def figure(rows: int, columns: int, size: tuple[float, float], **layout: Any) -> tuple[Any, list[list[Any]]]:
    """A figure of ``size`` inches with rows of axes, on the Agg canvas; ``layout`` goes to ``Figure.subplots``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    picture = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(picture)
    return picture, [list(row) for row in picture.subplots(rows, columns, squeeze=False, **layout)]


def encode(picture: Any, kind: str = ".png", dpi: float = 110) -> bytes:
    """The file's bytes; ``kind``: one of :data:`KINDS`. A large figure gets fewer dots, none is refused."""
    content = io.BytesIO()
    dpi = min(dpi, LARGEST_SIDE / max(picture.get_size_inches()))
    picture.savefig(content, format=kind.removeprefix("."), dpi=dpi, metadata={KINDS[kind]: AUTHOR})
    return content.getvalue()


def is_ours(content: bytes) -> bool:
    """Whether a picture's bytes come from :func:`encode`."""
    return content[:5] in (b"\x89PNG\r", b"<?xml", b"%PDF-") and AUTHOR.encode() in content


def check_target(path: Path, todo: str) -> None:
    """UserError unless a picture may be written to ``path``: its kind is known, and no other file is lost."""
    if path.suffix.lower() not in KINDS:
        raise UserError(f"a picture file, {', '.join(KINDS)}", str(path), todo)
    safe_files.check_target(path, "a picture file of this program", is_ours, todo=todo)


def limits(values: Sequence[float], margin: float = 1.1) -> tuple[float, float]:
    """Bounds of a logarithmic axis that nothing lies on or beyond; from (positive) values."""
    return min(values) / margin, max(values) * margin
