"""A small net with its state, and payloads that an attacker may leave in a checkpoint."""

from __future__ import annotations

import errno
import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from resnet_fast.training import checkpoints
from resnet_fast.training.checkpoints import TrainingState
from resnet_fast.training.distributed import World

META = {"classes": 3, "recipe": {}, "sums": [0.1, 2.0, 3.0], "seconds": 1.5}


def make(seed: int = 0, amp: bool = False, ema: bool = False, steps: int = 2, momentum: float = 0.9) -> TrainingState:
    """Return a small net after ``steps`` steps of SGD."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3))
    model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum, weight_decay=0.01)
    averaged = torch.optim.swa_utils.AveragedModel(model, use_buffers=True) if ema else None
    state = TrainingState(model, optimizer, torch.amp.GradScaler("cpu", enabled=amp, init_scale=4.0 + seed), averaged)
    advance(state, steps)
    return state


def advance(state: TrainingState, steps: int) -> None:
    for _ in range(steps):
        x = torch.randn(2, 3, 4, 4) * (1 + random.random() + float(np.random.rand()))
        state.scaler.scale(state.model(x).square().sum()).backward()
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad()
        if state.ema is not None:
            state.ema.update_parameters(state.model)  # type: ignore[operator]


def content(state: TrainingState) -> dict[str, Any]:
    ema = None if state.ema is None else state.ema.state_dict()
    return {
        "model": state.model.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "scaler": state.scaler.state_dict(),
        "ema": ema,
    }


class touching:
    """Return an object that creates the file ``proof`` if its pickle is read without restriction."""

    def __init__(self, proof: Path):
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.proof}",)


def reseal(place: Path, **changes: Any) -> None:
    """Write a ``meta.json`` with ``changes`` that fits the present files, as an attacker would. A change to ``...``
    removes the field."""
    path = place / checkpoints.META
    meta = json.loads(path.read_text())
    meta["files"] = {
        str(p.relative_to(place)): [p.stat().st_size, checkpoints.digest_of(p)]
        for p in sorted(place.rglob("*"))
        if p.is_file() and p != path
    }
    meta = {name: value for name, value in (meta | changes).items() if value is not ... and name != "sha256"}
    path.write_text(json.dumps(meta | {"sha256": checkpoints.seal(meta)}))


def save(out: Path, state: TrainingState, step: int, keep: int = 2, **meta: Any) -> Path:
    return checkpoints.save_checkpoint(out, state, META | {"step": step} | meta, World(), sharded=False, keep=keep)


def names(out: Path) -> list[str]:
    """What is in the folder, hidden or not."""
    return sorted(p.name for p in checkpoints.folder_of(out).iterdir())


def damage(place: Path, how: str) -> str:
    """Spoil a checkpoint; returns what a complaint about it has to name."""
    name, _, what = how.partition(": ")
    path = place / name
    if what == "gone":
        path.unlink()
    elif what == "truncated":
        path.write_bytes(path.read_bytes()[:-7])
    elif what == "empty":
        path.write_bytes(b"")
    elif what == "flipped":
        body = bytearray(path.read_bytes())
        body[len(body) // 2] ^= 1
        path.write_bytes(body)
    else:
        path.write_text(what)
    return name


def full(*arguments: Any, **named: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
