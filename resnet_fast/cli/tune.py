"""``resnet-fast tune``: time the kernels that a net can run on, PyTorch's own among them, and remember the fastest."""

from __future__ import annotations

import json as json_module
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import limits
from ..errors import UserError
from .options import one_of
from .output import progress_bar, show

if TYPE_CHECKING:
    from rich.table import Table

    from ..dispatch.tune import Tuned

DTYPES = ("float32", "bfloat16", "float16")


def tune(
    model: Annotated[str, typer.Argument(help="A net's name.")],
    batch: Annotated[int, typer.Option(help="Images per batch.")] = 1,
    image: Annotated[int | None, typer.Option(help="Side of the image in pixels; by default the net's own.")] = None,
    dtype: Annotated[str, one_of(DTYPES, "Element type")] = "bfloat16",
    train: Annotated[
        bool, typer.Option("--train", help="Measure a training step: every convolution's three directions.")
    ] = False,
    only: Annotated[
        str | None,
        typer.Option(help="Kernel whose launches are measured, such as conv_bn_act_3x3; by default all."),
    ] = None,
    budget: Annotated[float, typer.Option(help="Seconds to spend; the next run measures the rest.")] = 170.0,
    table: Annotated[
        Path | None, typer.Option(help="File to read and write; by default the one that calls on this GPU use.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table, and no progress bar.")] = False,
) -> None:
    """Time every kernel that a net can run on here, ours and PyTorch's. The fastest one runs from then on."""
    if not budget >= 0:
        raise UserError("--budget >= 0", str(budget), "correct --budget")
    limits.check_input(batch, image, planes=0)
    import torch

    from .. import accelerate
    from ..dispatch import tune as tuning
    from ..models import registry

    side = image or registry.image_size(model)
    limits.check_input(batch, side)
    if only is not None:
        tuning.check_kernel(only)
    device = tuning.default_device()
    kind = getattr(torch, dtype)
    # a training step keeps fp32 parameters and rounds under autocast
    place: dict[str, Any] = {
        "device": device,
        "dtype": torch.float32 if train else kind,
        "memory_format": torch.channels_last,
    }
    path = table or tuning.table_file(device)
    tuning.check_table(path, device)
    net = accelerate(registry.build(model).train(train).to(**place), backend="triton")
    x = torch.randn(batch, 3, side, side).to(**place)
    rounded = torch.autocast(device.type, kind, enabled=train and kind.itemsize == 2)
    reached = (0, 0)
    try:
        with progress_bar(silent=json, eta=True) as progress:

            def on_progress(done: int, total: int, launch: str) -> None:
                nonlocal reached
                reached = done, total
                progress(done, total, launch)

            with rounded:
                tuned = tuning.tune(net, x, budget, on_progress, path, only)
    except KeyboardInterrupt:
        done, total = reached
        known = (
            f"{done} of {total} launches are in {path}; the next run measures the others" if total else "nothing done"
        )
        typer.echo(f"interrupted: {known}", err=True)
        raise typer.Exit(130) from None
    if json:
        typer.echo(json_module.dumps(_to_dict(tuned), indent=2))
    else:
        what = f"{model}, batch {batch}, {side}x{side}, {dtype}{', training' if train else ''}, {tuned.table.gpu}"
        show(_table(tuned, what), *_notes(tuned))
    if tuned.unsaved:
        raise UserError("a table that can be written", f"{path} ({tuned.unsaved})", "free some space and run it again")


def _to_dict(tuned: Tuned) -> dict[str, Any]:
    return {
        "gpu": tuned.table.gpu,
        "table": str(tuned.path),
        "measured": tuned.measured,
        "kept": tuned.kept,
        "left": tuned.left,
        "seconds": tuned.seconds,
        "launches": [asdict(row) | {"speedup": row.speedup} for row in tuned.rows()],
        "refused": [dict(zip(("launch", "candidate", "reason"), entry, strict=True)) for entry in tuned.refused],
        "net_us": tuned.net_us,
        "net_stock_us": tuned.net_stock_us,
    }


def _table(tuned: Tuned, title: str) -> Table:
    from rich.table import Table

    table = Table("launch", "best", title=title, title_justify="left")
    for column in ("us", "stock us", "speedup"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in tuned.rows():
        table.add_row(row.launch, row.best or "-", *_times(row.us, row.stock_us))
    table.add_section()
    table.add_row("net: its fused layers, one after another", "", *_times(tuned.net_us, tuned.net_stock_us))
    return table


def _times(us: float | None, stock_us: float | None) -> tuple[str, str, str]:
    ratio = f"{stock_us / us:.2f}x" if us and stock_us else "-"
    return "-" if us is None else f"{us:,.1f}", "-" if stock_us is None else f"{stock_us:,.1f}", ratio


def _notes(tuned: Tuned) -> list[str]:
    """Return what the table does not say: where the numbers are, what was refused, what a dash means."""
    notes = [str(tuned)]
    if tuned.refused:
        notes.append(f"{len(tuned.refused)} candidates refused; --json gives the reasons")
    if tuned.net_us is None:
        notes.append("no total: a launch of the net is not measured yet")
    return notes
