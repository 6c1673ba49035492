"""The forward of a layer of the hub: a stock module's own children, in fused ops.

``kernels`` puts a layer's ``forward`` into a module and leaves the module's class alone. So this reads the module
through a description of its block (:mod:`resnet_fast.blocks.described`), and where it cannot be fused, the module's
class still has the stock forward. Reasons are counted and logged as those of fused classes are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..blocks import described, fused, pristine, probe
from ..blocks.described import Reading
from ..blocks.mapping import BlockMapping
from ..dispatch import record
from ..errors import UserError

_checked: dict[tuple[type[nn.Module], BlockMapping], dict[Any, str]] = {}
_watched: dict[type[nn.Module], pristine.Watched] = {}


def run(m: nn.Module, x: Tensor, mapping: BlockMapping, written_for: tuple[str, ...]) -> Tensor:
    """Return what the class of ``m`` computes, fused where its layers allow it.

    Args:
        m: a module with the layers that ``mapping`` names.
        x: its input (N, C, H, W).
        mapping: what its forward computes, up to the class; it is compared once per class, in eager code.
        written_for: full names of the classes that ``mapping`` describes. Only these are believed unseen, in a
            compiler.

    Raises:
        UserError: ``m`` is the layer itself, which has no children.
        BackendError: in strict and in batch-invariant mode, the stock forward would run.
    """
    stock: Any = type(m)
    if stock.__module__.startswith(__package__ or "."):
        raise UserError(
            "a module whose forward kernels.kernelize() replaced",
            f"the layer {stock.__name__} itself",
            "name the layer in a kernel mapping of the class that it stands for",
        )
    if fused.runs_for_tracer(x):
        return stock.forward(m, x)
    reading = described.read(m, mapping)
    reason = _obstacle(m, x, mapping, reading, f"{stock.__module__}.{stock.__qualname__}" in written_for)
    quiet = not reason
    if not reason and torch.is_grad_enabled():
        reason = fused.gradient_obstacle(
            x, lambda: described.unlike_reference(reading, mapping.residual), lambda: [m], "auto"
        )
    if reason:
        record.stock(m, mapping.op(), reason, quiet)
        return stock.forward(m, x)
    return described.Runner(reading, mapping.residual, m.training).run(x)


def _obstacle(m: nn.Module, x: Tensor, mapping: BlockMapping, reading: Reading, known: bool) -> str:
    """Return why the stock forward must run, apart from reasons that only gradients have."""
    stock = type(m)
    reason = _replaced(stock) if torch.compiler.is_compiling() else watched(stock).changed()
    if reason or reading.reason:
        return reason or reading.reason
    groups = described.groups(reading)
    return (
        probe.unlike(stock, mapping, m, _checked.setdefault((stock, mapping), {}), known)
        or fused.image_obstacle(x, any(isinstance(p.norm, nn.modules.batchnorm._BatchNorm) for p in reading.pieces()))
        or (fused.group_obstacle(groups, x, "auto") if groups else "")
        or fused.cache_obstacle(m)
    )


def watched(stock: type[nn.Module]) -> pristine.Watched:
    """Return the functions that a fused call in place of this class's forward skips."""
    found = _watched.get(stock)
    if found is None:
        found = _watched[stock] = pristine.Watched(stock, ("forward",))
    return found


@torch.compiler.assume_constant_result
def _replaced(stock: type[nn.Module]) -> str:
    return watched(stock).changed()
