"""``accelerate(model)``: exchange the class of every residual block, stage and net for its fused one, and back."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeVar

from torch import nn

from .. import flags
from ..errors import UserError

if TYPE_CHECKING:
    from ..blocks.fused import Fused

M = TypeVar("M", bound=nn.Module)

SAVES = ("raw", "recompute")

OPTIONS = {"_resnet_fast_backend": "auto", "_resnet_fast_save": "raw"}
"""Attributes of a fused module that hold the options of ``accelerate``, with their defaults, which are not stored."""


def fused_classes() -> dict[type[nn.Module], type[Fused]]:
    """Return stock class -> fused class, for the libraries that are imported, as those of a model's classes are."""
    from ..blocks import basic_block, bottleneck, net

    fused: list[type[Fused]] = [basic_block.BasicBlock, bottleneck.Bottleneck, net.ResNet]
    if "resnet_fast.paper_nets" in sys.modules:
        from ..blocks import paper_nets

        fused += [paper_nets.PlainBlock, paper_nets.CifarResNet]
    if "timm.models.resnet" in sys.modules:
        from ..blocks import timm

        fused += [timm.BasicBlock, timm.Bottleneck, timm.ResNet]
    return {cls.stock_class: cls for cls in fused}


def accelerate(model: M, backend: str = "auto", cuda_graph: bool = False, save: str = "raw") -> M:
    """Run the residual blocks of a torchvision or timm ResNet (or of a net built around them) as fused ops, in place.

    Names, parameters, buffers, hooks and ``state_dict`` stay as they are. Only the classes of modules change, each to a
    subclass of its former class. A block that cannot be fused runs its stock layers, and :func:`resnet_fast.explain`
    gives the reason. Blocks of other classes (subclasses, other libraries' residual blocks) are left alone. This is
    logged once per class and counted at each call of the net.

    Call it again to change an option.

    Args:
        model: any module that contains such blocks.
        backend: ``auto``, or the one backend that must run every block. A call that it cannot run raises BackendError.
        cuda_graph: whether to replay every whole net in ``model`` from CUDA graphs, one per input shape in inference,
            two in training (forward and backward pass). Changed weights are picked up. An input that is not on a GPU
            raises BackendError. :mod:`resnet_fast.blocks.graph` lists the calls that are replayed.
        save: what fused training keeps of a block for the backward pass. ``raw`` keeps every convolution's raw output,
            ``recompute`` all but the last one's, which the backward pass computes again.

    Returns:
        ``model`` itself.

    Raises:
        UserError: ``model`` is no module or has no known residual block, ``backend`` or ``save`` is unknown, or
            ``cuda_graph`` is set for a model without a whole net.
        BackendError: in strict mode, ``model`` has a residual block of another class. Nothing is changed then.
    """
    if not isinstance(model, nn.Module):
        raise UserError("an nn.Module", type(model).__name__, "pass the model itself")
    from ..blocks import frozen, stage, unfused

    flags.check_backend(backend)
    if save not in SAVES:
        raise UserError(f"save as one of {', '.join(SAVES)}", repr(save), "'recompute' is slower and saves less")
    classes = fused_classes()
    nets = _whole_nets(model, classes, cuda_graph)
    known = [m for m in model.modules() if type(m) in classes or type(m) in classes.values()]
    if not known:
        raise UserError(
            f"a model with blocks of {_names(classes)}",
            f"{type(model).__name__} without any",
            "subclasses with a forward of their own are not touched",
        )
    unfused.announce(model)
    unfused.forget(model)
    for module in known:
        module.__class__ = classes.get(type(module), type(module))
        _set_options(module, backend, save)
    fused = set(classes.values())
    for module in model.modules():
        if type(module) is nn.Sequential and module and {type(block) for block in module} <= fused:
            module.__class__ = stage.Sequential
    for net in nets:
        frozen.unfreeze(net, "accelerate()")
        _set_replay(net, cuda_graph)
    return model


def restore(model: M) -> M:
    """Undo :func:`accelerate` exactly, in place.

    Args:
        model: any module. One that was never accelerated stays as it is.

    Returns:
        ``model`` itself, every module with its stock class.
    """
    from .. import parameter_cache
    from ..blocks import frozen, held, stage
    from ..blocks.fused import Fused

    parameter_cache.release(model.parameters())
    for module in model.modules():
        if isinstance(module, (Fused, stage.Sequential)):
            _set_options(module, *OPTIONS.values())
            _set_replay(module, False)
            held.forget(module)
            frozen.unfreeze(module)
            module.__class__ = module.stock_class  # type: ignore[assignment]
    return model


def _whole_nets(model: nn.Module, classes: dict[type[nn.Module], type[Fused]], required: bool) -> list[nn.Module]:
    """Return the nets in ``model`` that have a fused class or are fused; UserError if there must be one and is none."""
    from ..blocks.net import Net

    whole = [cls for cls, fused_class in classes.items() if issubclass(fused_class, Net)]
    nets = [m for m in model.modules() if type(m) in whole or isinstance(m, Net)]
    if required and not nets:
        raise UserError(
            f"a whole net ({_names(whole)}) in the model for cuda_graph=True",
            f"{type(model).__name__} without any",
            "call accelerate(model) without it, and torch.cuda.make_graphed_callables on what has fixed shapes",
        )
    return nets


def _names(classes: Iterable[type[nn.Module]]) -> str:
    return ", ".join(sorted({f"{c.__module__}.{c.__qualname__}" for c in classes}))


def _set_options(module: nn.Module, *values: str) -> None:
    """Store the values of :data:`OPTIONS`, in their order."""
    for (name, default), value in zip(OPTIONS.items(), values, strict=True):
        if value == default:
            module.__dict__.pop(name, None)
        else:
            module.__dict__[name] = value


def _set_replay(net: nn.Module, replay: bool) -> None:
    from ..blocks import graph, training_graph

    if replay:
        net.__dict__[graph.FLAG] = True
        training_graph.retry(net)
    else:
        net.__dict__.pop(graph.FLAG, None)
        graph.forget(net)
