"""``resnet-fast summary``: print a net as the paper's Table 1 does, or compare several."""

from __future__ import annotations

import json as json_module
from typing import TYPE_CHECKING, Annotated

import typer

from ..spec import ITEMSIZE

if TYPE_CHECKING:
    from rich.table import Table

    from ..tools.summary import ComparedNet, Summary


def summary(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="One net prints its stages, several are compared; by default the paper's own comparison."),
    ] = None,
    image: Annotated[int | None, typer.Option(help="Side of the image in pixels; by default the net's own.")] = None,
    batch: Annotated[int, typer.Option(help="Images per batch (one net only).")] = 1,
    dtype: Annotated[
        str, typer.Option(help=f"Element type that bytes are counted for (one net only): {', '.join(ITEMSIZE)}.")
    ] = "float32",
    shortcut: Annotated[
        str | None, typer.Option(help="Shortcut option of the paper: A, B or C; by default the net's own.")
    ] = None,
    stride_in_1x1: Annotated[
        bool, typer.Option("--stride-in-1x1", help="The paper's v1: a bottleneck's stride on its first 1x1.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Print layers, parameters, multiply-adds and least bytes of a net; without a name, recount the paper's figures."""
    from ..errors import UserError
    from ..tools.summary import compare, summarize
    from .output import show

    if names and len(names) == 1:
        one = summarize(names[0], image, batch, dtype, shortcut, stride_in_1x1)
        if json:
            typer.echo(json_module.dumps(one.to_dict(), indent=2))
        else:
            show(_stage_table(one), *one.notes)
        return
    if batch != 1 or dtype != "float32":
        raise UserError("one name with --batch or --dtype", f"{len(names or ())} names", "a comparison is per image")
    rows = compare(names or (), image, shortcut, stride_in_1x1)
    if json:
        typer.echo(json_module.dumps([row.to_dict() for row in rows], indent=2))
    else:
        show(*_comparison(rows))


def _stage_table(s: Summary) -> Table:
    from rich.table import Table

    title = f"{s.name} ({s.variant}), batch {s.batch}, {s.image}x{s.image}, {s.dtype}"
    table = Table("stage", "output", "layers", title=title, title_justify="left")
    for column in ("params", "multiply-adds", "min bytes"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in s.stages:
        table.add_row(
            row.name,
            f"{row.output[0]}x{row.output[1]}",
            row.formula,
            f"{row.params:,}",
            f"{row.macs / 1e6:,.1f} M",
            f"{row.min_bytes / 1e6:,.2f} MB",
        )
    table.add_section()
    table.add_row("total", "", "", f"{s.params:,}", f"{s.macs / 1e9:,.3f} G", f"{s.min_bytes / 1e6:,.2f} MB")
    return table


def _comparison(rows: list[ComparedNet]) -> tuple[Table | str, ...]:
    """Return the table and its numbered notes."""
    from rich.table import Table

    from ..tools.summary import COUNTED

    table = Table("net", "variant", title="per image", title_justify="left")
    for column in ("image", "params", "multiply-adds", "convolutions alone", "published"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("source")
    notes = [COUNTED]
    for row in rows:
        mark = ""
        if row.note:
            mark = f" ({len(notes)})"
            notes.append(f"({len(notes)}) {row.name}: {row.note}.")
        table.add_row(
            row.name,
            row.variant,
            str(row.image),
            f"{row.params / 1e6:,.2f} M",
            f"{row.macs / 1e9:,.3f} G",
            f"{row.conv_macs / 1e9:,.3f} G",
            (row.published or "") + mark,
            row.source or "",
        )
    return (table, *notes)
