"""``resnet-fast demo``: compare a stock ResNet-50 with the accelerated one on photographs."""

from __future__ import annotations

import copy
import json as json_module
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import PicturesOption
from .output import progress_bar, show

if TYPE_CHECKING:
    from rich.table import Table

    from resnet_fast.benchmarks.side_by_side import AnswerPair

    from ..dispatch.explain import Explanation

RANDOM = (
    "No weights were given (--weights FILE): the net has seeded random weights, calibrated on the photographs. "
    "Its classes mean nothing, so they are only compared, not named."
)
BUDGET = (
    "Error: norm of the difference to fp64 over the norm. Budget: at most twice the stock net's own error, "
    "and a rounding floor."
)


def answer_table(answers: list[AnswerPair], names: list[str] | None) -> Table:
    """Return a table with one row per picture; classes are named if weights were given, else numbered."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Same answer?", title_justify="left")
    for heading in ("picture", "top-1 stock", "top-1 accelerated", "same"):
        table.add_column(heading)
    for heading in ("largest difference", "error stock", "error accelerated", "budget", "within"):
        table.add_column(heading, justify="right")

    def label(top1: int) -> Text:
        return Text(f"#{top1}" if names is None else names[top1])

    for a in answers:
        table.add_row(
            Text(a.image),
            label(a.stock_top1),
            label(a.accelerated_top1),
            "yes" if a.agree else "NO",
            f"{a.difference:.1e}",
            f"{a.stock_error:.2e}",
            f"{a.accelerated_error:.2e}",
            f"{a.budget:.2e}",
            "yes" if a.within else "NO",
        )
    return table


def summarise(explanation: Explanation) -> list[dict[str, Any]]:
    """Count the rows of ``explain`` by op, backend and the reasons against the other backends."""
    counted = Counter((row.op, row.backend, tuple(sorted(row.why_not.items()))) for row in explanation.rows)
    return [
        {"op": op, "backend": backend, "calls": n, "why_not": dict(reasons)}
        for (op, backend, reasons), n in counted.items()
    ]


def explain_table(summary: list[dict[str, Any]]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table("op", "ran on", title="Which kernel ran where, and why not another", title_justify="left")
    table.add_column("calls", justify="right")
    table.add_column("why not the others", overflow="fold")
    for row in summary:
        reasons = "\n".join(f"{name}: {reason}" for name, reason in row["why_not"].items())
        table.add_row(row["op"], row["backend"], str(row["calls"]), Text(reasons or "-"))
    return table


def demo(
    weights: Annotated[
        Path | None, typer.Option(help="Weights, .safetensors or .pth. By default random, calibrated on the pictures.")
    ] = None,
    model: Annotated[str, typer.Option(help="Net to show.")] = "resnet50",
    images: PicturesOption = None,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds of the speed comparison.")] = 5,
    budget: Annotated[float, typer.Option(help="Seconds for the speed comparison.")] = 60.0,
    out: Annotated[Path, typer.Option(help="Folder for demo.csv, .md, .json and .png.")] = Path("out/demo"),
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables, and no progress bar.")] = False,
) -> None:
    """Compare a stock net with the accelerated one on photographs: answers, speed, and which kernel ran and why."""
    import torch

    from resnet_fast.benchmarks import compare, report, side_by_side

    from .. import accelerate, explain
    from ..io import images as pictures
    from ..models import registry
    from ..tools import trained

    options = compare.BenchOptions(
        model=model,
        batches=(1,),
        images=tuple(images or ()),
        weights=weights,
        rounds=rounds,
        budget=budget,
    )
    options.check()
    report.require_matplotlib()
    report.prepare_folder(out, "demo")
    photos = pictures.load(options.images, limit=8)
    size = registry.image_size(model)
    with progress_bar(silent=json) as progress:
        progress(0, 1, "building the net")
        stock = compare.network(model, photos, weights, size, options.seed)
        x = pictures.batch(photos, len(photos), size).contiguous(memory_format=torch.channels_last)
        plain = copy.deepcopy(stock).to(memory_format=torch.channels_last)
        fused = accelerate(copy.deepcopy(plain))
        progress(0, 1, "comparing the answers")
        answers = side_by_side.answers(plain, fused, x, [p.name for p in photos])
        with torch.inference_mode():
            chosen = summarise(explain(fused, x[:1]))
        speed = compare.run(options, progress, stock)
    speed.provenance["agreement"] = f"{sum(a.agree for a in answers)} of {len(answers)} top-1, see the tables"
    if json:
        found = {"answers": [asdict(a) | {"agree": a.agree, "within": a.within} for a in answers], "kernels": chosen}
        typer.echo(json_module.dumps(found | {"speed": speed.to_dict()}, indent=2))
        report.write(speed, out, "demo")
        return
    names = None if weights is None else list(trained.load(weights, model).facts.classes)
    show(
        RANDOM if weights is None else f"Weights: {weights}",
        answer_table(answers, names),
        BUDGET,
        *report.tables(speed),
        report.READING,
        explain_table(chosen),
    )
    show(f"Written: {', '.join(map(str, report.write(speed, out, 'demo')))}")
