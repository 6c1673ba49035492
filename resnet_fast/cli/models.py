"""``resnet-fast models``: list the nets that the other commands take."""

from __future__ import annotations

import json as json_module
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from .output import progress_bar, show

if TYPE_CHECKING:
    from rich.table import Table

    from ..tools.listing import ListedNet


def models(
    patterns: Annotated[
        list[str] | None,
        typer.Argument(help="Parts of names, or patterns such as '*50*'; by default every net."),
    ] = None,
    timm: Annotated[
        bool, typer.Option("--timm", help="List timm's ResNets with blocks that run fused; takes seconds per ten nets.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List the nets by name: parameters, multiply-adds, image size and source."""
    from ..tools import listing

    if timm:
        found: list[ListedNet] = []
        names = listing.timm_names(patterns or ())
        with progress_bar(silent=json) as progress:
            for number, name in enumerate(names):
                progress(number, len(names), name)
                found += listing.timm_entries([name])
    else:
        found = listing.entries(patterns or ())
    if json:
        typer.echo(json_module.dumps([asdict(entry) for entry in found], indent=2))
        return
    notes = [f"{source}: {text}." for source, text in listing.SOURCES.items() if any(e.source == source for e in found)]
    if not timm:
        notes.append("--timm lists timm's.")
    show(table(found), *notes)


def table(found: Sequence[ListedNet]) -> Table:
    """Return a table with one row per net, and how many of its blocks run fused if not all do."""
    from rich.table import Table

    out = Table("name", title_justify="left")
    for column in ("parameters", "multiply-adds", "image", "fused blocks"):
        out.add_column(column, justify="right")
    out.add_column("source")
    for e in found:
        macs = "-" if e.macs is None else f"{e.macs / 1e9:,.3f} G"
        fused = "-" if not e.blocks else f"{e.fused}" if e.fused == e.blocks else f"{e.fused} of {e.blocks}"
        out.add_row(e.name, f"{e.params / 1e6:,.2f} M", macs, str(e.image), fused, e.source)
    return out
