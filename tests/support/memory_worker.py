"""A training run of 1,000 steps: ``python memory_worker.py FOLDER`` prints the memory that it held.

It is a process of its own because other tests' garbage moves a process's memory by hundreds of megabytes.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from resnet_fast.training import optim, recipe
from resnet_fast.training.loop import train
from resnet_fast.training.options import RunOptions, Tick, Watch
from resnet_fast.training.recipe import Recipe


def build(recipe: Recipe, classes: int) -> nn.Module:
    """Return a net whose step takes a millisecond."""
    torch.manual_seed(recipe.seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, classes))


def resident() -> int:
    """Return this process's resident bytes."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS"))


def main() -> None:
    tensors: dict[int, int] = {}
    memory: dict[int, int] = {}

    def look(tick: Tick) -> None:
        if tick.step in (300, 1000):
            gc.collect()
            memory[tick.step] = resident()
            tensors[tick.step] = sum(issubclass(type(o), Tensor) for o in gc.get_objects())

    optim.build_net = build
    changes = {"size": 8, "subset": 1000, "batch": 16, "lr": 0.05, "steps": 1000, "ema": 0.9}
    options = RunOptions(out=Path(sys.argv[1]), probe=False, threads=1, log_every=10, save_steps=50)
    train(recipe.load_recipe(None, changes), options, Watch(step=look))
    print(json.dumps({"tensors": tensors, "memory": memory}))


if __name__ == "__main__":
    main()
