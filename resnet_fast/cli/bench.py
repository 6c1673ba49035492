"""``resnet-fast bench``: compare the accelerated net with its peers on photographs, in inference or training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import UserError
from .options import DeviceOption, PicturesOption, ThreadsOption
from .output import progress_bar, show


def _list(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _batches(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in _list(text))
    except ValueError as error:
        raise UserError("batch sizes such as 1,16", repr(text), "correct --batch") from error


def bench(
    model: Annotated[str, typer.Option(help="Net to measure; `resnet-fast models` lists them.")] = "resnet50",
    batch: Annotated[
        str | None, typer.Option(help="Batch sizes, separated by commas; by default 1,16, and 16 for --suite train.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, bfloat16, float16, separated by commas. "
            "By default float32, and bfloat16 where the device has instructions for it."
        ),
    ] = None,
    providers: Annotated[
        str | None,
        typer.Option(
            help="Competitors, separated by commas; by default all, but no compile for --suite train on a CPU."
        ),
    ] = None,
    suite: Annotated[
        str,
        typer.Option(help="models, blocks (of the model), ops (of the model), or train: steps of training the model."),
    ] = "models",
    steps: Annotated[
        int | None, typer.Option(help="For --suite train: compare the loss after this many steps; by default 10.")
    ] = None,
    images: PicturesOption = None,
    weights: Annotated[
        Path | None, typer.Option(help="Weights, .safetensors or .pth. By default random, calibrated on the pictures.")
    ] = None,
    size: Annotated[int | None, typer.Option(help="Side of the input in pixels; by default the net's own.")] = None,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds per cell.")] = 10,
    budget: Annotated[
        float, typer.Option(help="Seconds for the whole run; each cell runs at least one round.")
    ] = 300.0,
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    out: Annotated[Path, typer.Option(help="Folder for bench.csv, .md, .json and .png.")] = Path("out/bench"),
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables, and no progress bar.")] = False,
) -> None:
    """Measure speed and numeric error of the accelerated net and its peers in interleaved rounds.

    With --suite train: speed, memory and loss of training steps.
    """
    from resnet_fast.benchmarks import compare, report, suites, train
    from resnet_fast.benchmarks import providers as peers

    training = suite == suites.TRAIN
    if steps is not None and not training:
        raise UserError("--steps with --suite train", f"--suite {suite}", "leave out --steps")
    chosen: dict[str, Any] = {} if batch is None else {"batches": _batches(batch)}
    chosen |= {} if steps is None else {"steps": steps}
    everyone = train.default_providers(device) if training else peers.NAMES
    options = (train.TrainBenchOptions if training else compare.BenchOptions)(
        model=model,
        suite=suite,
        dtypes=compare.native_dtypes(device) if dtype is None else _list(dtype),
        providers=everyone if providers is None else _list(providers),
        images=tuple(images or ()),
        weights=weights,
        size=size,
        rounds=rounds,
        budget=budget,
        device=device,
        threads=threads,
        **chosen,
    )
    options.check()
    report.require_matplotlib()
    report.prepare_folder(out)
    result = compare.BenchReport(row_type=train.TrainingRow if training else compare.InferenceRow)

    def show_result() -> None:
        if json:
            typer.echo(report.to_json(result), nl=False)
        else:
            show(*report.tables(result), report.reading(result))

    try:
        with progress_bar(silent=json) as progress:
            (train if training else compare).run(options, progress, report=result)
    except BaseException:  # Ctrl-C, or too little memory for the last batch size: what was measured is not lost
        if result.rows:
            show_result()
        raise
    show_result()
    written = report.write(result, out)  # after the tables: a disk that is full takes nothing from them
    if not json:
        show(f"written: {', '.join(map(str, written))}")
