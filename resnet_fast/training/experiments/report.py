"""Write an experiment as a page: the question, the results and the paper's, the differences, how to repeat it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ...io import plots, safe_files
from .. import curves
from ..disk import write_file
from ..recipe import Recipe
from . import verdicts
from .protocols import Experiment
from .responses import Responses, responses_of_run
from .runs import Run
from .verdicts import Finding


@dataclass(frozen=True)
class Page:
    """The page of an experiment, not saved yet: its text, its picture if it has one, and its findings."""

    name: str
    text: str
    picture: Any
    findings: tuple[Finding, ...]

    def save(self, folder: Path) -> tuple[Path, ...]:
        """Write ``<name>.png`` and ``<name>.md`` into ``folder``, and return the paths of page and picture."""
        page = folder / f"{self.name}.md"
        picture = page.with_suffix(".png")
        if self.picture is not None:
            curves.write_png(self.picture, picture)
        write_file(page, self.text.encode())
        return (page,) if self.picture is None else (page, picture)


@cache
def _macs(net: str, shortcut: str | None, v1: bool, size: int) -> int:
    """Return the multiply-adds per image of a net's convolutions, counted by shapes."""
    from ...tools.summary import compare

    return compare([net], size, shortcut, v1)[0].conv_macs


def check_targets(experiments: Sequence[Experiment], folder: Path) -> None:
    """Raise UserError if a page, its picture or its logs would replace a file of something else."""
    todo = "name another folder with --report or --out"
    for experiment in experiments:

        def is_page(content: bytes, title: str = experiment.title) -> bool:
            return content.startswith(f"# {title}\n".encode())

        def is_log(content: bytes) -> bool:
            return content.startswith(b'{"kind": "run"')

        page, kept = folder / f"{experiment.name}.md", [folder / "logs" / f"{c.key}.jsonl" for c in experiment.cases]
        safe_files.check_target(page, f"the page {experiment.name}", is_page, todo=todo, make_folder=True)
        if experiment.cases:
            what = f"the picture {experiment.name}"
            safe_files.check_target(page.with_suffix(".png"), what, plots.is_ours, todo=todo, make_folder=True)
        for path in kept:
            safe_files.check_target(path, "the log of a run", is_log, todo=todo, make_folder=True)


def compose(experiment: Experiment, runs: Sequence[Run], protocol: str, command: str) -> Page:
    """Compose the page of ``experiment`` from the logs of ``runs`` (for ``responses``, from their weights too)."""
    by_label = {run.case.label: run for run in runs}
    lines = [f"# {experiment.title}", "", f"**Question.** {experiment.question}", ""]
    lines += [f"**In the paper** ({experiment.source}). {experiment.found}", ""]
    picture: Any = None
    found: list[Finding] = []
    if experiment.name == "flops":
        lines += _flops()
    else:
        measured: dict[str, Responses] = {}
        if experiment.name == "responses":
            measured = {run.case.label: responses_of_run(run.recipe, run.out / "model.safetensors") for run in runs}
            found = verdicts.responses(measured)
        else:
            found = getattr(verdicts, experiment.name)(by_label)
        lines += ["**Here.**", "", *(f"- {sentence(v)}." for v in found), ""]
        lines += [f"![{experiment.title}]({experiment.name}.png)", ""]
        if measured:
            lines += [*_responses_table(measured), ""]
            picture = _draw_responses(experiment, measured)
        else:
            picture = _draw(experiment, runs)
        lines += [*_runs_table(runs), "", *_differences(runs, protocol), "", *_repeat(runs, command)]
    return Page(experiment.name, "\n".join(lines).rstrip() + "\n", picture, tuple(found))


def sentence(finding: Finding) -> str:
    """Return a finding as a sentence without a full stop."""
    because = finding.because[0].upper() + finding.because[1:]
    return f"{'Shown' if finding.shown else 'NOT shown'}: {finding.claim}. {because}"


def _draw(experiment: Experiment, runs: Sequence[Run]) -> Any:
    """Draw a panel of curves per group: plain and residual nets, CIFAR nets and the ImageNet family."""
    groups: dict[tuple[bool, bool], dict[str, list[dict[str, Any]]]] = {}
    plain_apart = experiment.name == "degradation"
    for run in runs:
        key = (not run.case.cifar, plain_apart and "plain" not in run.case.net)
        groups.setdefault(key, {})[run.case.label] = run.epochs
    picture, axes = curves.figure(len(groups), 4.6)
    for axis, key in zip(axes, sorted(groups), strict=True):
        family = "ImageNet family" if key[0] else "CIFAR nets"
        kind = f", {'residual' if key[1] else 'plain'}" if plain_apart else ""
        curves.draw(axis, groups[key], f"{family}{kind}")
    curves.show_whole(axes)
    curves.headline(picture, experiment.title)
    return picture


def _draw_responses(experiment: Experiment, measured: Mapping[str, Responses]) -> Any:
    """Draw Figure 7: on the left in the order of the layers, on the right in descending order."""
    picture, (ordered, descending) = curves.figure(2, 5.5)
    looks = zip(measured.items(), plots.COLOURS, plots.MARKERS, strict=False)
    for (label, found), colour, marker in looks:
        layers = range(1, len(found.std) + 1)
        line = "--" if label.startswith("plain") else "-"
        style = {"color": colour, "marker": marker, "markersize": 4, "fillstyle": "none", "label": label}
        style |= {"linewidth": 1.1, "alpha": 0.85, "markevery": max(1, len(layers) // 10)}
        ordered.plot(layers, found.std, line, **style)
        descending.plot(layers, sorted(found.std, reverse=True), line, **style)
    ordered.set_title("in the order of the net", fontsize=10)
    descending.set_title("sorted by magnitude", fontsize=10)
    every = [value for found in measured.values() for value in found.std if value > 0]
    for axis in (ordered, descending):
        axis.set(xlabel="layer", ylabel="standard deviation of the response", yscale="log", ylim=plots.limits(every))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.tick_params(axis="y", which="both", labelsize=8)
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=8, title="dashed: plain, solid: residual", title_fontsize=8)
    curves.headline(picture, experiment.title)
    return picture


def _runs_table(runs: Sequence[Run]) -> list[str]:
    lines = [
        "| net | parameters | multiply-adds | steps | training error | validation error (best) | minutes "
        "| paper, full protocol |",
        "|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for run in runs:
        recipe = run.recipe
        params = run.facts["parameters"]
        macs = _macs(recipe.model, recipe.shortcut, recipe.stride_in_1x1, recipe.size)
        best = min(line["val_error"] for line in run.epochs)
        paper = "-" if run.case.paper is None else f"{run.case.paper:.2f} % ({run.case.source})"
        lines.append(
            f"| {run.case.label} | {params / 1e6:.2f} M | {macs / 1e6:.1f} M | {run.last['step']} | "
            f"{100 * run.train_error:.2f} % | {100 * run.val_error:.2f} % ({100 * best:.2f} %) | "
            f"{run.seconds / 60:.1f} | {paper} |"
        )
    lines += ["", "Training error: wrong answers while training, over the last epoch. Multiply-adds: of the"]
    lines += ["convolutions, counted, per image at the size trained on."]
    return lines


def _responses_table(measured: Mapping[str, Responses]) -> list[str]:
    lines = ["| net | 3x3 layers | mean response | smallest | largest |", "|---|---:|---:|---:|---:|"]
    for label, found in measured.items():
        lines.append(f"| {label} | {len(found.std)} | {found.mean:.3f} | {min(found.std):.3f} | {max(found.std):.3f} |")
    return lines


def _family(run: Run) -> str:
    return "CIFAR nets" if run.case.cifar else "ImageNet family"


def _length(recipe: Recipe) -> str:
    return f"{recipe.epochs:g} epochs" if recipe.epochs is not None else f"{recipe.steps} steps"


def _one_recipe(recipe: Recipe, facts: Mapping[str, Any]) -> str:
    marks = ", ".join(f"{m:g}" for m in recipe.milestones)
    schedule = f"{recipe.schedule} at {marks}" if marks else recipe.schedule
    return (
        f"{recipe.data} at {recipe.size}x{recipe.size}, {facts['train_images']:,} training images, batch "
        f"{recipe.batch}, {_length(recipe)}, rate {recipe.lr:g} ({schedule}; warm-up {recipe.warmup:g}), weight decay "
        f"{recipe.weight_decay:g}, pad {recipe.pad}, flip {'yes' if recipe.flip else 'no'}, "
        f"{'float32' if recipe.amp == 'none' else recipe.amp}"
    )


PAPERS = {
    "CIFAR nets": "CIFAR-10 at 32x32, 50,000 training images, batch 128, 64,000 steps, rate 0.1 divided by 10 at "
    "32,000 and 48,000, weight decay 0.0001, pad 4, flip yes",
    "ImageNet family": "ImageNet at 224x224, 1.28 million training images, batch 256, up to 600,000 steps, rate 0.1 "
    "divided by 10 on plateaus, weight decay 0.0001, crops of pictures scaled to 256-480",
}


def _differences(runs: Sequence[Run], protocol: str) -> list[str]:
    """Return the protocol of each family next to the paper's."""
    lines = [f"## Where this differs from the paper ({protocol} protocol)", ""]
    for family in dict.fromkeys(_family(run) for run in runs):
        lines.append(f"- {family}, paper: {PAPERS[family]}.")
        seen: dict[str, list[str]] = {}
        for run in runs:
            if _family(run) == family:
                seen.setdefault(_one_recipe(run.recipe, run.facts), []).append(run.case.label)
        lines += [f"- {', '.join(labels)}, here: {text}." for text, labels in seen.items()]
    if protocol == "reduced":
        lines.append(
            "- Other pictures, smaller ones and far fewer steps: errors are not comparable with the paper's, their "
            "order is."
        )
    lines.append("- One seed per net; the paper has one too, but for ResNet-110 (five).")
    return lines


def _repeat(runs: Sequence[Run], command: str) -> list[str]:
    facts = runs[0].facts
    total = sum(run.seconds for run in runs) / 60
    return [
        "## To repeat it",
        "",
        "```bash",
        command,
        "```",
        "",
        f"Seed {runs[0].recipe.seed}; torch {facts['torch']}, {facts['device']}, {facts['threads']} threads; "
        f"{total:.0f} minutes of training in all (wall clock, measured, on a machine that did other work too), runs "
        "shared with other experiments included. What the figures are read from: `logs/`.",
    ]


def _flops() -> list[str]:
    """Return the table that ``resnet-fast summary`` prints, with each net's share of VGG-19's multiply-adds."""
    from ...tools.summary import COUNTED, compare

    rows = compare()
    vgg = next(row.macs for row in rows if row.name == "vgg19")
    lines = [
        "| net | variant | image | parameters | multiply-adds, counted | of VGG-19's | published | source |",
        "|---|---|---:|---:|---:|---:|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row.name} | {row.variant} | {row.image} | {row.params / 1e6:.2f} M | {row.macs / 1e9:.3f} G | "
            f"{row.macs / vgg:.1%} | {row.published or '-'} | {row.source or '-'} |"
        )
    notes = [f"- {row.name}: {row.note}." for row in rows if row.note]
    return [*lines, "", COUNTED, "", *notes, "", "Counted from shapes; `resnet-fast summary` prints the same table."]
