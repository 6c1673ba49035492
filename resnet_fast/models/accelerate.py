"""``accelerate(model)``: exchange the class of every residual block, stage and net for its fused one, and back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn

from .. import flags
from ..dispatch import record
from ..errors import UserError
from .known import fused_classes, is_registered, stage_classes

if TYPE_CHECKING:
    from ..blocks.fused import Fused

M = TypeVar("M", bound=nn.Module)

SAVES = ("raw", "recompute")

OPTIONS = {"_resnet_fast_backend": "auto", "_resnet_fast_save": "raw"}
"""Attributes of a fused module that hold the options of ``accelerate``, with their defaults, which are not stored."""


def accelerate(model: M, backend: str = "auto", cuda_graph: bool = False, save: str = "raw") -> M:
    """Run the residual blocks of a torchvision, timm or transformers ResNet (or of a net around them) as fused ops.

    Names, parameters, buffers, hooks and ``state_dict`` stay as they are. Only the classes of modules change, each to a
    subclass of its former class. A block that cannot be fused runs its stock layers, and :func:`resnet_fast.explain`
    gives the reason. Blocks of other classes (subclasses, other libraries' residual blocks) are left alone, unless
    :func:`resnet_fast.register_block` describes them. They are logged once per class and counted at each call of the
    net. :func:`resnet_fast.report` tells the share of the model that is fused.

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
        UserError: ``model`` is no module or has no known residual block, a block is not as ``register_block`` described
            it, ``backend`` or ``save`` is unknown, ``cuda_graph`` is no bool, or it is set for a model without a whole
            net. Nothing is changed then.
        BackendError: in strict mode, ``model`` has a residual block of another class. Nothing is changed then.
    """
    if not isinstance(model, nn.Module):
        raise UserError("an nn.Module", type(model).__name__, "pass the model itself")
    from ..blocks import frozen, frozen_norms, stage, unfused

    flags.check_backend(backend)
    if save not in SAVES:
        raise UserError(f"save as one of {', '.join(SAVES)}", repr(save), "'recompute' is slower and saves less")
    if not isinstance(cuda_graph, bool):
        raise UserError("cuda_graph as True or False", repr(cuda_graph), "pass True to replay whole nets")
    classes = fused_classes()
    nets = _whole_nets(model, classes, cuda_graph)
    for module in model.modules():  # the answer is kept, for calls inside a compiler
        frozen_norms.is_frozen(module)
    chosen = _choose(model, classes)
    if not chosen:
        raise UserError(
            f"a model with blocks of {_names(classes)}",
            f"{type(model).__name__} without any",
            _without_blocks(model),
        )
    unfused.announce(model)
    unfused.forget(model)
    containers = stage_classes()
    for module, cls in chosen:
        module.__class__ = cls
        _set_options(module, backend, save)
    for module in model.modules():
        of_blocks = stage.class_for(module, containers)
        if of_blocks is not None:
            module.__class__ = of_blocks
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
        if isinstance(module, (Fused, stage.ConvertingStage)):
            _set_options(module, *OPTIONS.values())
            _set_replay(module, False)
            held.forget(module)
            frozen.unfreeze(module)
            module.__class__ = module.stock_class  # type: ignore[assignment]
    return model


def _choose(model: nn.Module, classes: dict[type[nn.Module], type[Fused]]) -> list[tuple[nn.Module, type[Fused]]]:
    """Return the modules of known classes, each with the fused class that it gets."""
    chosen = []
    for m in model.modules():
        stock_class = type(m).__dict__.get("stock_class", type(m))  # FSDP2's class of a fused module has none
        if stock_class not in classes:
            continue
        try:
            chosen.append((m, classes[stock_class].class_for(m)))
        except UserError as wrong:
            if is_registered(stock_class):
                raise
            # another release of a library whose blocks this package describes
            record.fall_back(f"a {stock_class.__module__}.{stock_class.__qualname__} is not fused: {wrong}")
    return chosen


def _without_blocks(model: nn.Module) -> str:
    """Return what to do about a model that has no block of a known class."""
    from ..blocks import unfused
    from ..blocks.fused import KNOWN

    if isinstance(model, torch.jit.ScriptModule):
        return "TorchScript has compiled the modules away; call accelerate() before torch.jit.script or trace"
    if isinstance(model, torch.fx.GraphModule):
        return (
            "a traced or exported graph has no blocks; call accelerate() before torch.fx, torch.export or a quantizer"
        )
    if any(hasattr(type(m), "set_requires_gradient_sync") and isinstance(m, tuple(KNOWN)) for m in model.modules()):
        return "fully_shard() changed the classes of the blocks; call accelerate() before it"
    found = _names({type(each.module()) for each in unfused.find(model)})
    blocks = f"its blocks ({found})" if found else "its blocks"
    return f"describe {blocks} with register_block() if they are residual; subclasses of known ones are not touched"


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


def _names(classes: Iterable[type]) -> str:
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
