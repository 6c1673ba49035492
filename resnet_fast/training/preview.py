"""Describe what a run would do, and check the memory that it needs, before the first step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import limits
from ..errors import printable
from ..tools import summary
from .datasets.samples import Data, Files
from .loader import BatchPlan
from .recipe import Recipe

MOST_CLASSES = 20
"""The most classes for which images are counted one by one."""


def preview_lines(
    recipe: Recipe,
    data: Data,
    plan: BatchPlan,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    total: int,
    start: int,
    where: Path,
) -> list[str]:
    """Return one line each for net, data, classes, steps, optimizer, learning rates and folder."""
    sizes = [p.numel() for p in model.parameters()]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = f", {trained:,} of them trained" if trained < sum(sizes) else ""
    epochs = total / plan.steps_per_epoch
    return [
        f"net: {recipe.model}, {sum(sizes):,} parameters{frozen}",
        f"data: {printable(data.summary())}",
        *([f"note: {printable(data.note)}"] if data.note else []),
        *_counts("training", data.train, data.classes),
        *_counts("validation", data.val, data.classes),
        f"steps: {total:,} of {recipe.batch:,} images, {plan.steps_per_epoch:,} per epoch, {epochs:g} epochs"
        + (f"; {start:,} of them done" if start else ""),
        f"optimizer: {type(optimizer).__name__}, {_hyper(optimizer)}",
        f"learning rate: {', '.join(_rates(recipe, plan.steps_per_epoch, total))}",
        f"folder: {where}",
    ]


MOST_PLANES = 30_000
"""Values per pixel of the input that no net exceeds in a step: CIFAR's net of 1202 layers has 28,031."""
SHARE = 0.75
"""Memory of a step as a share of the least bytes that the net's fused forward pass moves. Measured on a CPU with seven
nets and dtypes: peaks of 0.76 to 1.5."""


def check_step_memory(
    model: str, images: int, size: int, amp: str = "none", names: tuple[str, str] = ("batch", "size")
) -> None:
    """Check that the free memory holds a training step of ``model`` on the CPU with nothing frozen.

    Args:
        model: The name of the net.
        images: Images that a process sees at once.
        size: The side of the input in pixels.
        amp: The dtype of autocast, or ``none``.
        names: What the message calls batch and size.

    Raises:
        UserError: The memory does not suffice.
    """
    limits.check_input(images, size, names=names)
    free = limits.available_memory()
    if free is None or images * size * size * MOST_PLANES * 4 <= free:
        return  # no need to know the net
    dtype = "float32" if amp == "none" else amp
    needed = round(SHARE * summary.summarize(model, size, images, dtype).min_bytes)
    what = f"a training step of {images:,} images of {size}x{size}"
    limits.check_memory(needed, what, f"lower {names[0]} or {names[1]}")


def _counts(which: str, dataset: Any, classes: Sequence[str]) -> list[str]:
    labels = torch.tensor([label for _, label in dataset.files]) if isinstance(dataset, Files) else dataset.labels
    counts = torch.bincount(labels, minlength=len(classes)).tolist()
    if len(classes) > MOST_CLASSES:
        return [f"{which} images per class: {min(counts):,} to {max(counts):,}, in {len(classes):,} classes"]
    named = (f"{printable(name)} {count:,}" for name, count in zip(classes, counts, strict=False))
    return [f"{which} images per class: {', '.join(named)}"]


def _hyper(optimizer: torch.optim.Optimizer) -> str:
    group = optimizer.param_groups[0]
    shown = {key: group[key] for key in ("momentum", "betas", "nesterov", "weight_decay") if key in group}
    return ", ".join(f"{key} {value}" for key, value in shown.items())


def _rates(recipe: Recipe, per_epoch: int, total: int) -> list[str]:
    """Return the learning rate at the first step, at the peak, at each drop, and at the last step."""
    unit = 1 if recipe.steps is not None else per_epoch
    turns = {0, round(recipe.warmup * unit), *(round(m * unit) for m in recipe.milestones), total - 1}
    seen = sorted(step for step in turns if 0 <= step < total)
    return [f"{recipe.lr * recipe.factor(step, per_epoch):.3g} at step {step + 1:,}" for step in seen]
