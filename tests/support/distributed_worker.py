"""Training runs one after the other in one group of processes; test_distributed.py starts it with torchrun.

``distributed_worker.py FILE``: FILE holds a JSON list of runs ``{"out", "recipe", "options", "fails"}``. ``fails`` is
``[rank, step, kind]``: in that process that step raises (``error``), or its loss becomes NaN (``nan``).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from resnet_fast.training import distributed, loop, recipe
from resnet_fast.training.options import RunOptions, RunResult
from resnet_fast.training.step import TrainingStep

BASE: dict[str, Any] = {"data": "digits", "size": 8, "subset": 101, "batch": 32, "steps": 8, "lr": 0.01}
"""Of the recipe. 101 images are batches of 32, 32, 32 and 5: two epochs."""


def run(out: Path, recipe_: dict[str, Any], options: dict[str, Any]) -> RunResult:
    """Run ``BASE`` with changes and log every step."""
    settings = {"probe": False, "threads": 1, "log_every": 1} | options
    return loop.train(recipe.load_recipe(None, BASE | recipe_), RunOptions(out=out, **settings))


def plant(rank: int, step: int, kind: str) -> None:
    """Make step number ``step`` (from 1) fail in process ``rank``."""
    if dist.get_rank() != rank:
        return
    call, count = TrainingStep.__call__, 0

    def failing(self: TrainingStep, parts: Any, batch: int, rate: float) -> list[str]:
        nonlocal count
        count += 1
        if count == step and kind == "error":
            raise RuntimeError("planted: this process has had enough")
        if count == step:
            with torch.no_grad():
                next(self.inner.parameters()).fill_(torch.nan)
        return call(self, parts, batch, rate)

    TrainingStep.__call__ = failing  # type: ignore[method-assign]


def main() -> None:
    jobs = json.loads(Path(sys.argv[1]).read_text())
    with distributed.reported(), distributed.world("cpu", "ddp"):
        for job in jobs:
            if "fails" in job:
                plant(*job["fails"])
            result = run(Path(job["out"]), job.get("recipe", {}), job.get("options", {}))
            print(f"rank {dist.get_rank()} at step {result.step} of {job['out']}")


if __name__ == "__main__":
    main()
