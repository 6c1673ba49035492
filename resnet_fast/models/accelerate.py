"""``accelerate(model)``: exchange the class of every residual block, stage and net for its fused one, and back."""

from __future__ import annotations

import sys
from typing import TypeVar

from torch import nn

from .. import flags
from ..errors import UserError

M = TypeVar("M", bound=nn.Module)


def fused_classes() -> dict[type[nn.Module], type[nn.Module]]:
    """Stock class -> fused class, for the libraries that are already imported (a model's classes always are)."""
    from ..blocks import basic_block, bottleneck, stem

    fused = [basic_block.BasicBlock, bottleneck.Bottleneck, stem.ResNet]
    if "resnet_fast.models.paper" in sys.modules:
        from ..blocks import paper

        fused += [paper.PlainBlock, paper.CifarResNet]
    if "timm.models.resnet" in sys.modules:
        from ..blocks import timm

        fused += [timm.BasicBlock, timm.Bottleneck, timm.ResNet]
    return {cls.stock_class: cls for cls in fused}


def accelerate(model: M, backend: str = "auto") -> M:
    """Run the residual blocks of a torchvision or timm ResNet (or of a net built around them) as fused ops, in place.

    Names, parameters, buffers, hooks and ``state_dict`` stay as they are; only the modules' classes change, each to a
    subclass of what it was. What cannot be fused runs its stock layers, and :func:`resnet_fast.explain` says why.
    Calling it again changes the backend.

    Args:
        model: any module that contains such blocks.
        backend: ``auto``, or the one backend that must run every block (a call that it cannot serve raises).

    Returns:
        ``model`` itself.

    Raises:
        UserError: not a module, no residual block in it that is known, or an unknown backend.
    """
    if not isinstance(model, nn.Module):
        raise UserError("an nn.Module", type(model).__name__, "pass the model itself")
    from ..blocks import stage

    flags.check_backend(backend)
    classes = fused_classes()
    fused = set(classes.values())
    found = 0
    for module in model.modules():
        cls = type(module)
        if cls in classes:
            module.__class__ = classes[cls]
        elif cls not in fused:
            continue
        found += 1
        if backend == "auto":
            module.__dict__.pop("_resnet_fast_backend", None)
        else:
            module.__dict__["_resnet_fast_backend"] = backend
    for module in model.modules():
        if type(module) is nn.Sequential and module and {type(block) for block in module} <= fused:
            module.__class__ = stage.Sequential
    if not found:
        names = sorted({f"{c.__module__}.{c.__qualname__}" for c in classes})
        raise UserError(
            f"a model with blocks of {', '.join(names)}",
            f"{type(model).__name__} without any",
            "subclasses with a forward of their own are not touched",
        )
    return model


def restore(model: M) -> M:
    """Undo :func:`accelerate` exactly, in place: every module gets its stock class back. Returns ``model``."""
    from ..blocks import stage
    from ..blocks.fused import Fused

    for module in model.modules():
        if isinstance(module, (Fused, stage.Sequential)):
            module.__dict__.pop("_resnet_fast_backend", None)
            module.__class__ = module.stock_class  # type: ignore[assignment]
    return model
