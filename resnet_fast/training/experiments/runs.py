"""Train what an experiment compares: each run once, resumed if it was interrupted. Results are read from its log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...io.safe_files import json_text
from .. import checkpoints, loop, runlog
from ..options import RunOptions, RunResult, Watch
from ..recipe import Recipe, from_dict
from .protocols import Case, Experiment


@dataclass(frozen=True)
class Run:
    """A finished run of ``case`` in ``out``: the lines of its log by kind. ``facts`` is its last ``run`` line."""

    case: Case
    out: Path
    recipe: Recipe
    epochs: list[dict[str, Any]]
    facts: dict[str, Any]
    trains: list[dict[str, Any]]

    @property
    def last(self) -> dict[str, Any]:
        return self.epochs[-1]

    @property
    def train_error(self) -> float:
        """Share of wrong answers while training, over the last epoch."""
        return self.last["train_error"]

    @property
    def val_error(self) -> float:
        return self.last["val_error"]

    @property
    def images_seen(self) -> int:
        """Training images that the last epoch averages over."""
        return min(self.facts["train_images"], self.recipe.batch * self.last["step"])

    @property
    def seconds(self) -> float:
        return self.last["seconds"]


def folder(out: Path, case: Case, seed: int) -> Path:
    """Return the folder of a run."""
    return out / "runs" / f"{case.key}-seed{seed}"


def read_run(case: Case, out: Path, seed: int, recipe: Recipe) -> Run | None:
    """Return the finished run of ``case``, or None. Raises UserError if it was trained by another recipe."""
    place = folder(out, case, seed)
    lines: dict[str, list[dict[str, Any]]] = {}
    for line in runlog.read_log(place):
        lines.setdefault(line["kind"], []).append(line)
    if "run" not in lines or not (place / "model.safetensors").exists():
        return None
    facts = lines["run"][-1]
    trained = from_dict(facts["recipe"])
    if trained != recipe:
        changed = [k for k, v in recipe.to_dict().items() if trained.to_dict()[k] != v and k != "data_path"]
        if changed:
            got = f"one with other {', '.join(changed)}"
            raise UserError(f"a run of this recipe in {place}", got, "name another folder with --out")
    return Run(case, place, recipe, lines["epoch"], facts, lines["train"])


def missing(
    experiments: Sequence[Experiment],
    out: Path,
    protocol: str,
    data_path: str | None,
    seed: int,
    changes: Mapping[str, Any],
) -> list[tuple[Case, Recipe]]:
    """Return the runs that ``experiments`` need and that are not finished in ``out``, each once."""
    wanted = {case.key: case for e in experiments for case in e.cases}
    pairs = [(case, case.recipe(protocol, data_path, seed, changes)) for case in wanted.values()]
    return [(case, recipe) for case, recipe in pairs if read_run(case, out, seed, recipe) is None]


def train_case(case: Case, recipe: Recipe, out: Path, seed: int, options: Mapping[str, Any], watch: Watch) -> RunResult:
    """Train ``case``, resuming from its last checkpoint if there is one."""
    place = folder(out, case, seed)
    resume = "auto" if checkpoints.found(place) else ""
    return loop.train(recipe, RunOptions(out=place, resume=resume, **options), watch)


def short_log(run: Run) -> str:
    """Return the ``run`` and ``epoch`` lines of the log, against which the figures of a page can be checked."""
    return "".join(json_text(line) + "\n" for line in (run.facts, *run.epochs))
