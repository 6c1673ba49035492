"""``resnet-fast train``: train a net from its first step, or from where it was stopped."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UserError, printable
from ..flags import BACKENDS
from ..io.safe_files import json_text
from ..training.data_sources import DATASETS
from .output import progress_bar, show

if TYPE_CHECKING:
    from ..training.options import Tick

RECIPE = "Recipe (by default as --recipe says)"
RUN = "How to run it"


def train(
    recipe: Annotated[
        str | None,
        typer.Option(help="A recipe from --list, or a YAML file; by default digits.", rich_help_panel=RECIPE),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Net, see `resnet-fast models`.", rich_help_panel=RECIPE)] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help=f"Data set: {', '.join(DATASETS)}.",
            rich_help_panel=RECIPE,
        ),
    ] = None,
    data_path: Annotated[Path | None, typer.Option(help="Folder of the data.", rich_help_panel=RECIPE)] = None,
    size: Annotated[int | None, typer.Option(help="Side of the network's input.", rich_help_panel=RECIPE)] = None,
    epochs: Annotated[float | None, typer.Option(help="Length in epochs.", rich_help_panel=RECIPE)] = None,
    steps: Annotated[int | None, typer.Option(help="Length in optimizer steps.", rich_help_panel=RECIPE)] = None,
    batch: Annotated[
        int | None, typer.Option(help="Images per step, over all processes.", rich_help_panel=RECIPE)
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.", rich_help_panel=RECIPE)] = None,
    optimizer: Annotated[
        str | None,
        typer.Option(help="sgd, adamw or another of torch.optim, in lower case.", rich_help_panel=RECIPE),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(help="Trained weights to begin with; a new head where classes differ.", rich_help_panel=RECIPE),
    ] = None,
    classes: Annotated[
        int | None, typer.Option(help="Classes of the net; by default those of the data.", rich_help_panel=RECIPE)
    ] = None,
    freeze: Annotated[
        str | None,
        typer.Option(help="Train what comes after this stage of --weights: stem, layer1 …", rich_help_panel=RECIPE),
    ] = None,
    amp: Annotated[str | None, typer.Option(help="none, bfloat16 or float16.", rich_help_panel=RECIPE)] = None,
    backend: Annotated[
        str | None, typer.Option(help=f"{', '.join(BACKENDS)}; reference is stock PyTorch.", rich_help_panel=RECIPE)
    ] = None,
    cuda_graph: Annotated[
        bool | None,
        typer.Option(
            "--cuda-graph/--no-cuda-graph", help="Replay the net's step from CUDA graphs.", rich_help_panel=RECIPE
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights, order and crops.", rich_help_panel=RECIPE)] = None,
    set: Annotated[
        list[str] | None,
        typer.Option(help="Any key of a recipe, as key=value; repeatable.", rich_help_panel=RECIPE),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run; by default out/train/MODEL-DATA.", rich_help_panel=RUN)
    ] = None,
    resume: Annotated[
        str,
        typer.Option(
            help="auto: resume the run in --out. Or the folder of a run or a checkpoint. By default start a new run.",
            rich_help_panel=RUN,
        ),
    ] = "",
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda; by default cuda if there is a GPU.", rich_help_panel=RUN)
    ] = None,
    parallel: Annotated[str, typer.Option(help="Under torchrun: ddp, or fsdp (sharded).", rich_help_panel=RUN)] = "ddp",
    workers: Annotated[
        int | None,
        typer.Option(help="Processes that read images; by default as the machine allows.", rich_help_panel=RUN),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads of the net; by default PyTorch's choice.", rich_help_panel=RUN)
    ] = None,
    strict_data: Annotated[
        bool,
        typer.Option(
            "--strict-data", help="Decode all images first; an unreadable one is an error.", rich_help_panel=RUN
        ),
    ] = False,
    save_steps: Annotated[
        int, typer.Option(help="Steps between checkpoints; 0 spends 1 % of the time on them.", rich_help_panel=RUN)
    ] = 0,
    keep: Annotated[int, typer.Option(help="Checkpoints to keep, not counting the best one.", rich_help_panel=RUN)] = 2,
    log_every: Annotated[int, typer.Option(help="Steps per line of the log.", rich_help_panel=RUN)] = 10,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard/--no-tensorboard", help="Write TensorBoard event files.", rich_help_panel=RUN)
    ] = True,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="Use only deterministic cuDNN algorithms.", rich_help_panel=RUN)
    ] = False,
    stop_after: Annotated[
        int | None,
        typer.Option(help="Save and stop after that many steps; by default at the end.", rich_help_panel=RUN),
    ] = None,
    list_recipes: Annotated[bool, typer.Option("--list", help="Print the recipes and stop.")] = False,
    print_recipe: Annotated[
        bool, typer.Option("--print-recipe", help="Print the recipe as YAML, for --recipe, and stop.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Build everything, print what would be done, and stop.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the epochs as JSON instead of a table.")] = False,
) -> None:
    """Train a net with fused blocks, and write log, curves and checkpoints to one folder.

    Without options it trains a small net on digits in a minute.

    On several GPUs: torchrun --nproc-per-node 8 -m resnet_fast.cli.main train …
    """
    from ..training import loop, recipe_text
    from ..training import recipe as recipes
    from ..training.distributed import reported, speaks
    from ..training.options import RunOptions

    if list_recipes:
        show(*[_one_line(recipes.load_recipe(name, {"data_path": "PATH"}), name) for name in recipes.names()])
        return
    flags = {
        "model": model,
        "data": data,
        "data_path": None if data_path is None else str(data_path),
        "size": size,
        "epochs": epochs,
        "steps": steps,
        "batch": batch,
        "lr": lr,
        "optimizer": optimizer,
        "weights": None if weights is None else str(weights),
        "classes": classes,
        "freeze": freeze,
        "amp": amp,
        "backend": backend,
        "cuda_graph": cuda_graph,
        "seed": seed,
    }
    if not speaks():
        logging.getLogger("resnet_fast").setLevel(logging.ERROR)  # why a block runs unfused is the same everywhere
    with _divergence(), reported():
        given = recipes.combine({key: value for key, value in flags.items() if value is not None}, set or ())
        out, kept = _kept(out, resume) if recipe is None and data is None else (out, None)
        note = _tell if speaks() else (lambda text: None)
        chosen = recipes.load_recipe(recipe or kept or (None if data else "digits"), given, note)
        if print_recipe:
            typer.echo(recipe_text.to_yaml(chosen.to_dict()), nl=False)
            return
        place = out or Path("out/train") / f"{chosen.model}-{chosen.data}"
        options = RunOptions(
            out=place,
            resume=resume,
            device=device or default_device(),
            parallel=parallel,
            workers=workers,
            threads=threads,
            strict_data=strict_data,
            save_steps=save_steps,
            keep=keep,
            log_every=log_every,
            tensorboard=tensorboard,
            deterministic=deterministic,
            stop_after=stop_after,
        )
        if dry_run:
            planned = loop.describe_run(chosen, options)
            show(*planned if speaks() else ())
            return
        silent = json or not speaks()
        with progress_bar(silent=silent, eta=True) as progress:
            result = loop.train(chosen, options, watch(progress, silent=silent))
    if speaks():
        _report(result, json)
    raise typer.Exit(0 if result.finished else EXIT.get(result.stopped_by, 0))


def _report(result: Any, json: bool) -> None:
    """Print what the run reached, and where it stopped."""
    if json:
        typer.echo(json_text({"out": str(result.out), "step": result.step, "epochs": result.epochs}, indent=2))
    elif result.epochs:
        last = result.epochs[-1]
        best = min(line["val_error"] for line in result.epochs)
        show(
            f"validation accuracy {100 - 100 * last['val_error']:.2f} % (best {100 - 100 * best:.2f} %) after epoch "
            f"{last['epoch']:g}, {result.seconds:.0f} s; curves, log, checkpoints"
            f"{' and model.safetensors' if result.finished else ''} in {result.out}"
        )
    if not result.finished:
        _tell(f"stopped by {result.stopped_by} after step {result.step}, saved; go on with --resume auto")


def _kept(out: Path | None, resume: str) -> tuple[Path | None, dict[str, Any] | None]:
    """Return the folder of the run to resume, unless ``out`` names one, and the recipe in its checkpoint."""
    from ..training import checkpoints

    if not resume or (resume == "auto" and out is None):
        return out, None
    if resume != "auto" and out is None:
        named = Path(resume)
        inside = (named / checkpoints.META).exists() and named.parent.name == checkpoints.FOLDER
        out = named.parent.parent if inside else named
    assert out is not None
    place, meta, _ = checkpoints.resume_point(out, resume)
    return out, None if place is None else meta["recipe"]


def default_device() -> str:
    """Return ``cuda`` if there is a GPU, else ``cpu``."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def _divergence() -> Iterator[None]:
    """Turn NotFinite into a UserError: a loss that is no number is due to the recipe, not to the program."""
    from ..training.diagnosis import NotFinite

    try:
        yield
    except NotFinite as error:
        todo = "lower lr, lengthen warmup, or leave out amp; the checkpoints are as they were"
        raise UserError(error.expected, str(error), todo) from error


EXIT = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129}
"""What a shell reports for a program ended by these signals, so that a scheduler sees an unfinished run."""


def watch(progress: Any, silent: bool = False, label: str = "") -> Any:
    """Return a :class:`~resnet_fast.training.options.Watch` that moves a progress bar and prints a line per epoch."""
    from ..training.options import Watch

    if silent:
        return Watch()

    def step(tick: Tick) -> None:
        text = f"{label}epoch {tick.epoch:.2f}"
        if tick.images_per_s:  # the first line of the log is written after some steps
            waits = f", waits for data {tick.waiting:.0%}" if tick.waiting > 0.05 else ""
            text += f"  {tick.images_per_s:,.0f} img/s{waits}  loss {tick.loss:.3f}"
        progress(tick.step, tick.steps, text)

    def epoch(line: dict[str, Any]) -> None:
        _tell(
            f"{label}epoch {line['epoch']:>6g}  training loss {line['train_loss']:.4f} error "
            f"{100 * line['train_error']:5.2f} %  validation loss {line['val_loss']:.4f} error "
            f"{100 * line['val_error']:5.2f} %  {line['seconds']:.0f} s"
        )

    return Watch(step, epoch, lambda text: _tell(f"{label}{text}"))


def _tell(text: str) -> None:
    """Print to stderr. If it is a closed terminal or pipe, the run continues."""
    with suppress(OSError):
        print(printable(text), file=sys.stderr)


def _one_line(recipe: Any, name: str) -> str:
    length = f"{recipe.epochs:g} epochs" if recipe.epochs is not None else f"{recipe.steps} steps"
    rate = f"lr {recipe.lr:g} {recipe.schedule}"
    return f"{name:<18} {recipe.model} on {recipe.data}, batch {recipe.batch}, {length}, {rate}"
