"""``freeze(model)``: promise that a model does not change, so that its calls need not look for changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn

from ..errors import UserError

if TYPE_CHECKING:
    from ..blocks.net import Net

M = TypeVar("M", bound=nn.Module)


def freeze(model: M) -> AbstractContextManager[M]:
    """Promise that the layers, hooks, parameters and buffers of every net in ``model`` stay as they are.

    Each call of an accelerated net in eval compares them with what it derived from them (folded and packed weights, a
    CUDA graph). Until :func:`unfreeze` the calls of a frozen net compare nothing but the call itself: its input,
    autograd, autocast, the requested backend and torch's switches. **A change that is made in spite of the promise is
    not seen**: results use the old weights and layers. Only ``train()``, ``load_state_dict()`` and ``to()`` (and what
    else moves or casts a module) of the net, or of a module around it, end the promise by themselves, with a line in
    the log.

    Everything is compared once more, to the last element, before the promise begins. Copies and pickles of a frozen net
    are not frozen. A net that cannot run as one call, or is not replayed from a CUDA graph, gains nothing.

    It is in force when this returns, and may also be used in a ``with`` statement, which ends it::

        resnet_fast.freeze(model)           # from now on

        with resnet_fast.freeze(model):     # or only here
            ...

    Args:
        model: an accelerated net in eval mode, or a module that contains such nets.

    Returns:
        a context manager that gives ``model``.

    Raises:
        UserError: ``model`` is no module, has no accelerated net, or is in training mode.
    """
    from .. import parameter_cache
    from ..blocks import frozen, held, inference_graph

    nets = _nets(model)
    if not nets:
        from ..blocks.fused import Fused

        apart = any(isinstance(m, Fused) for m in model.modules())
        raise UserError(
            "a model with a whole accelerated net",
            f"{type(model).__name__} with {'blocks outside of one' if apart else 'no accelerated block'}",
            "call it without freeze(); each block compares its own weights"
            if apart
            else "call accelerate(model) first",
        )
    for net in nets:
        training = next((name or "the net" for name, m in net.named_modules() if m.training), None)
        if training is not None:
            raise UserError("a net in eval mode", f"{training} in training mode", "call model.eval() first")
    for net in nets:
        held.forget(net)
        with torch.no_grad():
            net.parts(torch.empty(0))  # which follows the batch counters of its norms
        inference_graph.forget_changed(net)
    parameter_cache.drop_changed((*model.parameters(), *model.buffers()))
    for net in nets:
        frozen.freeze(net)
    return _until_exit(model)


def unfreeze(model: M) -> M:
    """End the promise of :func:`freeze` for every net in ``model``. The next call compares everything again.

    Args:
        model: any module. One that is not frozen stays as it is.

    Returns:
        ``model`` itself.

    Raises:
        UserError: ``model`` is no module.
    """
    from ..blocks import frozen

    for net in _nets(model):
        frozen.unfreeze(net)
    return model


@contextmanager
def _until_exit(model: M) -> Iterator[M]:
    try:
        yield model
    finally:
        unfreeze(model)


def _nets(model: nn.Module) -> list[Net]:
    if not isinstance(model, nn.Module):
        raise UserError("an nn.Module", type(model).__name__, "pass the model itself")
    from ..blocks.net import Net

    return [m for m in model.modules() if isinstance(m, Net)]
