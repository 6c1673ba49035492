"""``resnet-fast validate``: measure the accuracy of trained weights, overall and per class, and the speed."""

from __future__ import annotations

import json as json_module
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UserError, printable
from ..flags import BACKENDS
from ..io.weight_facts import AMP
from ..training.data_sources import DATASETS
from .answers import csv_file
from .options import DeviceOption, ModelOption, NamesOption, ThreadsOption, one_of
from .output import progress_bar, say, show

if TYPE_CHECKING:
    from rich.table import Table

    from ..training.evaluate import Evaluation, ImageResult

CSV_HEADER = ("image", "class", "answer", "probability", "right", "in_top5", "error")
SHOWN = 40
"""Most classes in the printed table. JSON has all of them."""


def validate(
    file: Annotated[
        Path, typer.Argument(help="Weights (.safetensors, .pth), or the folder of a checkpoint or of a run.")
    ],
    data: Annotated[
        str | None,
        typer.Option(help=f"Data set: {', '.join(DATASETS)}; by default the one that the weights were trained on."),
    ] = None,
    data_path: Annotated[
        Path | None,
        typer.Option(help="Folder of the data; by default the run's. Of class folders: the validation half, or all."),
    ] = None,
    held_out: Annotated[
        bool,
        typer.Option(
            "--held-out", help="Take only the fifth that a run holds out of a folder without a validation half."
        ),
    ] = False,
    model: ModelOption = None,
    names: NamesOption = None,
    batch: Annotated[int | None, typer.Option(help="Images per batch; by default the run's, else 64.")] = None,
    device: DeviceOption = "cpu",
    workers: Annotated[
        int | None, typer.Option(help="Processes that read images; by default one per core, at most 8.")
    ] = None,
    threads: ThreadsOption = None,
    amp: Annotated[str | None, one_of(AMP, "Dtype of autocast, by default the run's")] = None,
    backend: Annotated[str, one_of(BACKENDS, "Backend that has to run it")] = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    csv: Annotated[str | None, typer.Option(help="Write a line per image to this file.")] = None,
) -> None:
    """Measure the top-1 and top-5 accuracy of weights, overall and per class, and the images per second.

    Unreadable images are named on stderr and counted. If outputs are not numbers, the exit code is 2.
    """
    from .. import devices, limits
    from ..training import evaluate, restored

    limits.check_input(batch, None)
    limits.check_threads(threads)
    limits.check_workers(workers)
    if csv == "-":
        raise UserError("a file's name with --csv", "-, where the tables go", "name a file")
    devices.check_device(device)
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    net = restored.load_net(file, model, names)
    on = evaluate.evaluation_set(net, data, data_path, held_out)
    for text in (*net.trained.said, *on.said):
        say(text)
    limits.check_input(min(batch or 1, len(on.images)), net.trained.facts.size, names=("--batch", "size"))
    with ExitStack() as stack:
        lines = None if csv is None else stack.enter_context(csv_file(csv, CSV_HEADER))
        progress = stack.enter_context(progress_bar(silent=json, eta=True))
        tell = _teller(progress, lines, net.trained.facts.classes, len(on.images))
        options: dict[str, Any] = {"batch": batch, "device": device, "backend": backend, "workers": workers}
        result = evaluate.measure_accuracy(net, on, **options, amp=amp, tell=tell)
    if json:
        typer.echo(json_module.dumps({"weights": str(file)} | result.to_dict(), indent=2))
    else:
        show(_table(result), *_sentences(result, device))
    if result.not_finite:
        raise UserError(
            "outputs that are numbers",
            f"NaN or infinity for {result.not_finite} of {result.images} images, counted as wrong",
            "check the weights",
        )


def _teller(
    progress: Callable[[int, int, str], None],
    lines: Callable[[Sequence[Sequence[Any]]], None] | None,
    classes: Sequence[str],
    total: int,
) -> Callable[[list[ImageResult], int, list[str]], None]:
    """Return the function called after each batch: it names bad files, writes CSV lines and moves the bar."""

    def tell(results: list[ImageResult], done: int, unreadable: list[str]) -> None:
        for text in unreadable:
            say(f"not read: {text}")
        if lines is not None:
            rows: list[Sequence[Any]] = [
                (
                    printable(v.name),
                    classes[v.label],
                    classes[v.answer],
                    f"{v.probability:.6g}",
                    +v.right,
                    +v.in_top5,
                    "",
                )
                if v.answer >= 0
                else (printable(v.name), classes[v.label], "", "", 0, 0, "NaN or infinity in the outputs")
                for v in results
            ]
            lines([*rows, *(("", "", "", "", "", "", printable(text)) for text in unreadable)])
        progress(done, total, f"{done:,} of {total:,} images")

    return tell


def _table(result: Evaluation) -> Table:
    from rich.table import Table
    from rich.text import Text

    from ..training.evaluate import TOP, worst

    rows = worst(result, SHOWN)
    title = "per class" if len(rows) == len(result.per_class) else f"the {SHOWN} classes with the lowest accuracy"
    five = len(result.classes) > TOP
    table = Table("class", "name", title=title, title_justify="left")
    for heading in ("images", "top-1", *(["top-5"] if five else [])):
        table.add_column(heading, justify="right")
    for row in rows:
        shares = [f"{row['top1']:.2%}"] + ([f"{row['top5']:.2%}"] if five else [])
        table.add_row(str(row["class"]), Text(row["name"]), f"{row['images']:,}", *shares)
    return table


def _sentences(result: Evaluation, device: str) -> list[str]:
    from ..training.evaluate import TOP

    five = f", top-5 {result.top5:.2%}" if len(result.classes) > TOP else ""
    out = [f"top-1 {result.top1:.2%}{five} of {result.images:,} images; {result.wrong:,} wrong, loss {result.loss:.4f}"]
    waits = f", of which {result.waiting:.0%} was waiting for images" if result.waiting > 0.05 else ""
    out.append(f"measured: {result.images_per_s:,.1f} img/s on {device}, reading included{waits}")
    if result.unreadable:
        out.append(f"{len(result.unreadable):,} unreadable images not counted, named on stderr")
    return out
