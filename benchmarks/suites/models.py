"""Whole nets, image to logits."""

from __future__ import annotations

from torch import Tensor, nn

from .case import Case


def cases(name: str, model: nn.Module, x: Tensor) -> list[Case]:
    """One case: the net itself."""
    return [Case(name, model, x)]
