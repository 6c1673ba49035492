"""Make one page of result files: ours against each peer, rooflines, the parts of a step, history.

The page is one HTML file that loads nothing. ``resnet-fast report`` and the documentation site write it.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from resnet_fast import __version__

from .. import provenance
from . import markup, results, sections, steps

TITLE = "resnet_fast: benchmark report"


def build(folders: Sequence[Path], date: str = "", commit: str = "") -> str:
    """Return the page.

    Args:
        folders: folders of result files, or single files.
        date, commit: of the page itself; by default now, and this checkout's.

    Raises:
        UserError: a folder is missing or without a result, or a file is broken.
    """
    found = results.read(folders)
    labels = "".join(f"<li>{markup.label(kind)} {escape(text)}</li>" for kind, text in markup.LABELS.items())
    devices = results.devices_of(found.cells)
    lead = markup.paragraph(
        f"{len(found.cells)} measured cells of {len(found.runs)} runs"
        + (f", on {escape(', '.join(devices))}" if devices else "")
        + ". Each figure carries one of these labels:"
    )
    parts = [
        ("peers", "Ours against each peer", sections.peers(found)),
        ("roofline", "Roofline", sections.roofline(found)),
        ("steps", "Where a step's time goes", steps.steps(found)),
        ("history", "History", sections.history(found)),
        ("checks", "Checks and failures", sections.checks(found)),
        ("origins", "Where the figures come from", sections.origins(found)),
    ]
    when, at = date or provenance.now(), commit or provenance.commit()
    foot = markup.paragraph(
        f"Page and models: resnet_fast {__version__}{f', commit {escape(at[:10])}' if at else ''}, {escape(when)}.",
        "soft",
    )
    kept = [part for part in parts if part[2]]
    return markup.page(TITLE, f'{lead}<ul class="legend">{labels}</ul>', kept, foot)


def is_ours(content: bytes) -> bool:
    """Return whether a file is a page of this kind, which may be replaced."""
    return markup.MARK.encode() in content[:2000]
