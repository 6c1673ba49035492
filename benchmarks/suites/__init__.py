"""List what is timed: whole models, their residual blocks, their fused convolutions; each on real activations."""

from __future__ import annotations

import importlib

from torch import Tensor, nn

from .case import SuiteCase

NAMES = ("models", "blocks", "ops")
"""Each is a module here with ``cases(name, model, x) -> list[SuiteCase]``."""

TRAIN = "train"
"""The suite of training steps. It has no cases: ``benchmarks/train.py`` runs it on the whole net."""

__all__ = ["NAMES", "TRAIN", "SuiteCase", "cases"]


def cases(suite: str, name: str, model: nn.Module, x: Tensor) -> list[SuiteCase]:
    """Return the cases of a suite.

    Args:
        suite: one of ``NAMES``.
        name: what the model is called.
        model: in eval mode, float32, on the CPU.
        x: images (N, 3, H, W).
    """
    return importlib.import_module(f".{suite}", __name__).cases(name, model, x)
