"""What is timed: whole models, their residual blocks, their fused convolutions; each on real activations."""

from __future__ import annotations

import importlib

from torch import Tensor, nn

from .case import Case

NAMES = ("models", "blocks", "ops")
"""Each is a module here with ``cases(name, model, x) -> list[Case]``."""

TRAIN = "train"
"""The suite of training steps. It has no cases: ``benchmarks/train.py`` runs it on the whole net."""

__all__ = ["NAMES", "TRAIN", "Case", "cases"]


def cases(suite: str, name: str, model: nn.Module, x: Tensor) -> list[Case]:
    """The cases of ``suite`` for ``model`` (eval mode, float32, CPU) called ``name``, on images ``x`` (N, 3, H, W)."""
    return importlib.import_module(f".{suite}", __name__).cases(name, model, x)
