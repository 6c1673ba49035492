"""``resnet-fast bench``: the accelerated net and its peers side by side, on photographs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import UserError
from .output import progress_bar, show


def _list(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _batches(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in _list(text))
    except ValueError as error:
        raise UserError("batch sizes such as 1,16", repr(text), "correct --batch") from error


def bench(
    model: Annotated[str, typer.Option(help="Net to measure; `resnet-fast summary` lists some.")] = "resnet50",
    batch: Annotated[str, typer.Option(help="Batch sizes, separated by commas.")] = "1,16",
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, bfloat16, float16, separated by commas. "
            "By default float32, and bfloat16 where the device has instructions for it."
        ),
    ] = None,
    providers: Annotated[str | None, typer.Option(help="Competitors, separated by commas; by default all.")] = None,
    suite: Annotated[str, typer.Option(help="models, blocks (of the model) or ops (of the model).")] = "models",
    images: Annotated[
        list[Path] | None,
        typer.Option(help="A picture or a folder of pictures; repeatable. By default three photographs."),
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="Weights, .safetensors or .pth. By default random, calibrated on the pictures.")
    ] = None,
    size: Annotated[int | None, typer.Option(help="Side of the input in pixels; by default the net's own.")] = None,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds per cell.")] = 10,
    budget: Annotated[
        float, typer.Option(help="Seconds for the whole run; each cell runs one round at least.")
    ] = 300.0,
    device: Annotated[str, typer.Option(help="cpu or a CUDA device.")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="CPU threads; by default PyTorch's choice.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for bench.csv, .md, .json and .png.")] = Path("out/bench"),
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables, and no progress bar.")] = False,
) -> None:
    """Speed and numeric error of the accelerated net and its peers, measured interleaved in one run."""
    from resnet_fast.benchmarks import compare, report
    from resnet_fast.benchmarks import providers as peers

    options = compare.Options(
        model=model,
        suite=suite,
        batches=_batches(batch),
        dtypes=compare.native_dtypes(device) if dtype is None else _list(dtype),
        providers=peers.NAMES if providers is None else _list(providers),
        images=tuple(images or ()),
        weights=weights,
        size=size,
        rounds=rounds,
        budget=budget,
        device=device,
        threads=threads,
    )
    options.check()
    report.require_matplotlib()
    report.prepare_folder(out)
    with progress_bar(silent=json) as progress:
        result = compare.run(options, progress)
    written = report.write(result, out)
    if json:
        typer.echo(report.to_json(result), nl=False)
        return
    show(*report.tables(result), report.READING, f"written: {', '.join(map(str, written))}")
