"""``accelerate(model)``: exchange the class of every residual block, stage and net for its fused one, and back."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TypeVar

from torch import nn

from .. import flags
from ..errors import UserError

M = TypeVar("M", bound=nn.Module)

SAVES = ("raw", "recompute")


def fused_classes() -> dict[type[nn.Module], type[nn.Module]]:
    """Stock class -> fused class, for the libraries that are already imported (a model's classes always are)."""
    from ..blocks import basic_block, bottleneck, stem

    fused = [basic_block.BasicBlock, bottleneck.Bottleneck, stem.ResNet]
    if "resnet_fast.paper_nets" in sys.modules:
        from ..blocks import paper_nets

        fused += [paper_nets.PlainBlock, paper_nets.CifarResNet]
    if "timm.models.resnet" in sys.modules:
        from ..blocks import timm

        fused += [timm.BasicBlock, timm.Bottleneck, timm.ResNet]
    return {cls.stock_class: cls for cls in fused}


def accelerate(model: M, backend: str = "auto", cuda_graph: bool = False, save: str = "raw") -> M:
    """Run the residual blocks of a torchvision or timm ResNet (or of a net built around them) as fused ops, in place.

    Names, parameters, buffers, hooks and ``state_dict`` stay as they are; only the modules' classes change, each to a
    subclass of what it was. What cannot be fused runs its stock layers, and :func:`resnet_fast.explain` says why.
    Blocks of other classes (subclasses, other libraries' residual blocks) stay as they are, which is logged once per
    class and counted at each call of the net.
    Calling it again changes the backend and what is saved, and switches CUDA graphs on or off.

    Args:
        model: any module that contains such blocks.
        backend: ``auto``, or the one backend that must run every block (a call that it cannot serve raises).
        cuda_graph: replay the inference of every whole net in ``model`` (torchvision's, timm's or ours) as one CUDA
            graph per input shape. Weights may change and training goes on as without it; an input that is not on a GPU
            raises BackendError. Which calls are replayed: :mod:`resnet_fast.blocks.graph`.
        save: what fused training keeps of a block for the backward pass: ``raw``, every convolution's raw output, or
            ``recompute``, all but the last one's, which the backward pass computes again.

    Returns:
        ``model`` itself.

    Raises:
        UserError: not a module, no residual block in it that is known, an unknown backend or ``save``, or
            ``cuda_graph`` for a model without a whole net.
        BackendError: in strict mode, a block of another class; nothing is changed then.
    """
    if not isinstance(model, nn.Module):
        raise UserError("an nn.Module", type(model).__name__, "pass the model itself")
    from ..blocks import graph, stage, stem, unfused

    flags.check_backend(backend)
    if save not in SAVES:
        raise UserError(f"save as one of {', '.join(SAVES)}", repr(save), "'recompute' is slower and saves less")
    classes = fused_classes()
    fused = set(classes.values())
    whole = [cls for cls, fused_class in classes.items() if issubclass(fused_class, stem.Net)]
    nets = [m for m in model.modules() if type(m) in whole or isinstance(m, stem.Net)]
    if cuda_graph and not nets:
        raise UserError(
            f"a whole net ({_names(whole)}) in the model for cuda_graph=True",
            f"{type(model).__name__} without any",
            "call accelerate(model) without it, and torch.cuda.make_graphed_callables on what has fixed shapes",
        )
    if any(type(m) in classes or type(m) in fused for m in model.modules()):
        unfused.announce(model)
    unfused.forget(model)
    found = 0
    for module in model.modules():
        cls = type(module)
        if cls in classes:
            module.__class__ = classes[cls]
        elif cls not in fused:
            continue
        found += 1
        for key, value, default in (("_resnet_fast_backend", backend, "auto"), ("_resnet_fast_save", save, "raw")):
            if value == default:
                module.__dict__.pop(key, None)
            else:
                module.__dict__[key] = value
    for module in model.modules():
        if type(module) is nn.Sequential and module and {type(block) for block in module} <= fused:
            module.__class__ = stage.Sequential
    if not found:
        raise UserError(
            f"a model with blocks of {_names(classes)}",
            f"{type(model).__name__} without any",
            "subclasses with a forward of their own are not touched",
        )
    for net in nets:
        if cuda_graph:
            net.__dict__[graph.FLAG] = True
        else:
            _replay_no_more(net)
    return model


def _names(classes: Iterable[type[nn.Module]]) -> str:
    return ", ".join(sorted({f"{c.__module__}.{c.__qualname__}" for c in classes}))


def _replay_no_more(net: nn.Module) -> None:
    from ..blocks import graph

    net.__dict__.pop(graph.FLAG, None)
    graph.forget(net)


def restore(model: M) -> M:
    """Undo :func:`accelerate` exactly, in place: every module gets its stock class back. Returns ``model``."""
    from .. import parameter_cache
    from ..blocks import stage
    from ..blocks.fused import Fused

    parameter_cache.release(model.parameters())
    for module in model.modules():
        if isinstance(module, (Fused, stage.Sequential)):
            module.__dict__.pop("_resnet_fast_backend", None)
            module.__dict__.pop("_resnet_fast_save", None)
            _replay_no_more(module)
            module.__class__ = module.stock_class  # type: ignore[assignment]
    return model
