"""Define the unit of a suite, and capture the inputs of modules inside a net."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class SuiteCase:
    """A module in eval mode and its input, float32 (N, C, H, W). Smaller batches are slices of ``x``."""

    name: str
    module: nn.Module
    x: Tensor


@torch.no_grad()
def capture(model: nn.Module, x: Tensor, modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Run ``model(x)`` once and return the first input of each of ``modules``, by its name."""
    seen: dict[str, Tensor] = {}

    def remember(name: str, args: tuple[Tensor, ...]) -> None:
        seen.setdefault(name, args[0].clone())  # a later in-place ReLU would change it

    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: remember(name, args))
        for name, module in modules.items()
    ]
    try:
        model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return seen
