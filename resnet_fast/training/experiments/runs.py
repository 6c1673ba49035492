"""Training what an experiment compares: each run once, gone on with where it was cut, and read from its log alone."""

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
    """A finished run of ``case`` in ``out``: its ``epoch`` lines, and what its log says of how it ran."""

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
        """Training images that the last epoch line averages over."""
        return min(self.facts["train_images"], self.recipe.batch * self.last["step"])

    @property
    def seconds(self) -> float:
        return self.last["seconds"]


def folder(out: Path, case: Case, seed: int) -> Path:
    return out / "runs" / f"{case.key}-seed{seed}"


def read_run(case: Case, out: Path, seed: int, recipe: Recipe) -> Run | None:
    """The finished run of ``case``; None if it is not finished. UserError if it was trained by another recipe."""
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
    """The runs that ``experiments`` need and ``out`` does not have finished, each once, the quickest nets first."""
    wanted = {case.key: case for e in experiments for case in e.cases}
    pairs = [(case, case.recipe(protocol, data_path, seed, changes)) for case in wanted.values()]
    return [(case, recipe) for case, recipe in pairs if read_run(case, out, seed, recipe) is None]


def train_case(case: Case, recipe: Recipe, out: Path, seed: int, options: Mapping[str, Any], watch: Watch) -> RunResult:
    """Train ``case``, from its last checkpoint if it has one."""
    place = folder(out, case, seed)
    resume = "auto" if checkpoints.found(place) else ""
    return loop.train(recipe, RunOptions(out=place, resume=resume, **options), watch)


def short_log(run: Run) -> str:
    """The run's ``run`` and ``epoch`` lines, as its log has them: what a page's figures can be checked against."""
    return "".join(json_text(line) + "\n" for line in (run.facts, *run.epochs))
