"""``resnet-fast reproduce``: repeat the paper's experiments and write a page for each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UserError
from .options import ThreadsOption
from .output import progress_bar, show
from .train import EXIT, default_device, watch

if TYPE_CHECKING:
    from ..training.experiments.protocols import Experiment
    from ..training.experiments.runs import Run


def reproduce(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="degradation, depth, bottleneck, shortcuts, responses, flops, or all."),
    ] = None,
    protocol: Annotated[
        str, typer.Option(help="reduced (Fashion-MNIST, two CPU cores, an hour) or full (the paper's).")
    ] = "reduced",
    data_path: Annotated[
        Path | None, typer.Option(help="Folder of CIFAR-10 or ImageNet, for the full protocol; by default none.")
    ] = None,
    set: Annotated[
        list[str] | None, typer.Option(help="Change a key of every run's recipe, as key=value; repeatable.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of every run.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; by default cuda if there is a GPU.")] = None,
    threads: ThreadsOption = None,
    workers: Annotated[
        int | None, typer.Option(help="Processes that read images; by default as the machine allows.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the runs; finished ones are not trained again.")] = Path(
        "out/reproduce"
    ),
    report: Annotated[Path | None, typer.Option(help="Folder of the pages; by default the folder of the runs.")] = None,
) -> None:
    """Train the nets of the paper's experiments, and write a page with figures, picture and verdict for each."""
    from ..training import recipe as recipes
    from ..training.experiments import protocols, runs
    from ..training.experiments import report as pages

    if not names:
        listed = [f"{e.name:<12} {e.title}" for e in protocols.EXPERIMENTS]
        show(*listed, "all          every one of them")
        return
    if protocol not in protocols.PROTOCOLS:
        raise UserError(f"a protocol among {', '.join(protocols.PROTOCOLS)}", repr(protocol), "correct --protocol")
    chosen = list(protocols.EXPERIMENTS) if names == ["all"] else [protocols.experiment(name) for name in names]
    changes = recipes.parse_assignments(set or ())
    root = out / protocol
    path = None if data_path is None else str(data_path)
    options: dict[str, Any] = {
        "device": device or default_device(),
        "threads": threads,
        "workers": workers,
        "probe": False,
    }
    folder = report or root
    pages.check_targets(chosen, folder)
    left = runs.missing(chosen, root, protocol, path, seed, changes)
    for number, (case, recipe) in enumerate(left, 1):
        with progress_bar(eta=True) as progress:
            result = runs.train_case(case, recipe, root, seed, options, watch(progress, label=f"{case.label}: "))
        if not result.finished:
            show(f"stopped by {result.stopped_by} in run {number} of {len(left)}; the same command continues")
            raise typer.Exit(EXIT.get(result.stopped_by, EXIT["SIGTERM"]))
    command = " ".join(["resnet-fast reproduce", *names, *_options(protocol, seed, threads, set)])
    folder.mkdir(parents=True, exist_ok=True)
    for experiment in chosen:
        cases = [(case, case.recipe(protocol, path, seed, changes)) for case in experiment.cases]
        found = [runs.read_run(case, root, seed, recipe) for case, recipe in cases]
        _write_page(experiment, [run for run in found if run is not None], protocol, command, folder)


def _write_page(experiment: Experiment, found: Sequence[Run], protocol: str, command: str, folder: Path) -> None:
    """Print the findings of an experiment, then write its page, its picture and the logs of its runs."""
    from ..training.disk import write_file
    from ..training.experiments import report, runs

    page = report.compose(experiment, found, protocol, command)
    show(f"{experiment.name}: {folder / experiment.name}.md", *[f"  {report.sentence(f)}" for f in page.findings])
    page.save(folder)  # after printing: a full disk must not lose the findings
    for run in found:
        kept = folder / "logs" / f"{run.case.key}.jsonl"
        kept.parent.mkdir(exist_ok=True)
        write_file(kept, runs.short_log(run).encode())


def _options(protocol: str, seed: int, threads: int | None, changes: list[str] | None) -> list[str]:
    """Return the options that change what is computed, as they were given."""
    out = [] if protocol == "reduced" else ["--protocol", protocol]
    out += ["--seed", str(seed)] if seed else []
    out += ["--threads", str(threads)] if threads is not None else []
    for change in changes or ():
        out += ["--set", change]
    return out
