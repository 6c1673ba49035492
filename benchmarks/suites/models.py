"""Whole nets, image to logits."""

from __future__ import annotations

from torch import Tensor, nn

from .case import SuiteCase


def cases(name: str, model: nn.Module, x: Tensor) -> list[SuiteCase]:
    """Return one case: the net itself."""
    return [SuiteCase(name, model, x)]
