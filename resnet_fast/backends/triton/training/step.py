"""Run a training step on the chain for its norms: chain.py with batch statistics, frozen_chain.py without any.

A call in which some norms use the batch's statistics and others do not runs on chain.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ....calls import Call
from ....spec import Spec, Verdict
from . import chain, frozen_chain


def chain_for(spec: Spec) -> Any:
    """Return the module that runs a step of this problem."""
    return chain if spec.batch_stats else frozen_chain


def trains_on(device: torch.device) -> tuple[Verdict, bool]:
    """Return the verdict of chain.py, for every call: a net's norms may be frozen today and not tomorrow."""
    return chain.trains_on(device)


def forward(call: Call, spec: Spec, save: str, update: bool) -> tuple[Tensor, list[Tensor], Any]:
    """Return (output, saved, plan), see :class:`resnet_fast.impl.Training`."""
    found: tuple[Tensor, list[Tensor], Any] = chain_for(spec).forward(call, spec, save, update)
    return found


def backward(
    call: Call, spec: Spec, saved: list[Tensor], z: Tensor, dz: Tensor, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Return the gradients that ``needs`` asks for, in the order of :meth:`Call.leaves`."""
    found: tuple[Tensor | None, ...] = chain_for(spec).backward(call, spec, saved, z, dz, needs)
    return found


def statistics(call: Call, saved: list[Tensor]) -> list[Any]:
    """Return the batch's (mean, unbiased variance) of every norm with batch statistics; None for the others."""
    found: list[Any] = (chain if call.batch_stats else frozen_chain).statistics(call, saved)
    return found


def shapes(call: Call, spec: Spec, save: str) -> list[Any]:
    """Return (shape, dtype, layout) of every tensor in ``saved``."""
    found: list[Any] = chain_for(spec).shapes(call, spec, save)
    return found
