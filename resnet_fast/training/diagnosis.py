"""Find where a number first became infinite or NaN, for the message of a run that its loss ends."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..models.accelerate import restore


class NotFinite(RuntimeError):
    """The loss or a weight became infinite or NaN. The message names the first layer with an output that is not finite.

    Args:
        message: What became infinite or NaN, and where.
        expected: What was expected instead, for the command line.
    """

    def __init__(self, message: str, expected: str = "a loss that is a number"):
        super().__init__(message)
        self.expected = expected


def _describe(tensor: Tensor) -> str:
    finite = tensor.isfinite()
    bad = int((~finite).sum())
    largest = tensor[finite].abs().max().item() if bad < tensor.numel() else float("nan")
    return f"{bad} of {tensor.numel()} values not finite, the largest of the others {largest:.3g}"


def _bad(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and tensor.is_floating_point() and not bool(tensor.isfinite().all())


@torch.no_grad()
def not_finite(model: nn.Module, ema: nn.Module | None, optimizer: torch.optim.Optimizer) -> str:
    """Describe the first weight, running statistic or optimizer state that is not finite; return "" if all are.

    Of sharded tensors, only this process's part is checked.
    """
    tensors = dict(model.state_dict())
    if ema is not None:
        tensors |= {f"averaged {name}": t for name, t in ema.state_dict().items()}
    names: dict[Any, str] = {p: name for name, p in model.named_parameters()}
    for parameter, values in optimizer.state.items():
        tensors |= {f"the optimizer's {key} of {names.get(parameter, '?')}": v for key, v in values.items()}
    for name, tensor in tensors.items():
        held = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if _bad(held):
            return f"{name}: {_describe(held)}"
    return ""


@torch.no_grad()
def first_overflow(model: nn.Module, x: Tensor, autocast: Any) -> str:
    """Describe the first weight, input or layer output of ``model(x)`` that is not finite, in the order of execution.

    Args:
        model: The net. A copy of it runs on stock layers; the net itself is unchanged.
        x: The batch, (n, 3, H, W).
        autocast: A context manager, as the step uses it.

    Returns:
        One sentence.
    """
    sharded = any(isinstance(p, DTensor) for p in model.parameters())
    for name, parameter in model.named_parameters():  # not the running statistics, which include the broken batch
        # Only this process's shard: the others may not reach this point to gather theirs.
        tensor: Tensor = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if _bad(tensor):
            return f"before this step {name} was broken already: {_describe(tensor)}; the last update overflowed"
    if _bad(x):
        return f"the batch itself is broken: {_describe(x)}"
    if sharded:
        return "weights and input are finite; which layer is not cannot be looked at under fsdp, ddp says it"
    stock = copy.deepcopy(model)
    restore(stock)
    for module in stock.modules():
        if isinstance(module, nn.SyncBatchNorm):  # runs in this process only: the loss of the others may be finite
            module.__class__ = nn.BatchNorm2d  # type: ignore[assignment]
    found: list[str] = []

    def look(name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if not found and _bad(output):
            seen = next((i for i in inputs if isinstance(i, Tensor)), None)
            fed = "" if seen is None else f"; its input: {_describe(seen)}"
            found.append(f"first in {name} ({type(module).__name__}, {output.dtype}): {_describe(output)}{fed}")

    for name, module in stock.named_modules():
        if not list(module.children()):
            module.register_forward_hook(lambda m, i, o, name=name: look(name, m, i, o))
    with autocast:
        stock(x)
    return found[0] if found else "every layer's output is finite: the loss itself overflowed"
