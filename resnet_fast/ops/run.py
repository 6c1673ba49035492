"""Run a call: the entry point of the blocks.

Eager calls go straight to dispatch (:mod:`.infer`) or to a training step (:mod:`.train`), because PyTorch's dispatcher
would unpack the lists of a block into boxed values and back several times. A compiler, a transform or a dispatch mode
uses the ``torch.library`` op, which has a rule for each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor
from torch.autograd import forward_ad, profiler

from ..calls import Call
from . import train
from .infer import infer
from .op import DEFINED, OPS

Planner = Callable[[Call, str, str], Tensor]
"""Called with a call on meta tensors, its backend and what training keeps; returns an output without memory."""

_planner: ContextVar[Planner | None] = ContextVar("resnet_fast_planner", default=None)


@contextmanager
def planned_by(planner: Planner) -> Iterator[None]:
    """Give the calls of this thread on meta tensors to ``planner`` inside the ``with``."""
    before = _planner.set(planner)
    try:
        yield
    finally:
        _planner.reset(before)


def run(call: Call, backend: str, save: str = "raw") -> Tensor:
    """Return the result of a call.

    Args:
        backend: a name of :data:`resnet_fast.flags.BACKENDS`.
        save: what training keeps for the backward pass: ``raw`` (all raw outputs) or ``recompute`` (fewer).
    """
    x = call.x
    if not _is_observed(x):
        device = x.device.type
        if not torch.is_autocast_enabled(device):
            return _run_plain(call, backend, save)
        call = autocast(call, torch.get_autocast_dtype(device))
        torch.set_autocast_enabled(device, False)
        try:
            return _run_plain(call, backend, save)
        finally:
            torch.set_autocast_enabled(device, True)
    return _run_op(call, backend, save)


def _run_plain(call: Call, backend: str, save: str) -> Tensor:
    graph = torch.is_grad_enabled() and train.needs_gradient(call)
    if not graph and not call.batch_stats:
        return infer(call, backend)
    if profiler._is_profiler_enabled:  # it shows the op
        return _run_op(call, backend, save)
    return train.run(call, train.Options(backend, save, call.sync), graph)


def _run_op(call: Call, backend: str, save: str) -> Tensor:
    if call.x.is_meta and (plan := _planner.get()) is not None:
        return plan(call, backend, save)
    flat = OPS[call.op].flatten(call)
    return getattr(DEFINED, call.op)(*flat, backend, save, call.sync)


def autocast(call: Call, dtype: torch.dtype) -> Call:
    """Return the call with float32 activations in ``dtype``. Weights stay as they are: folding rounds them once."""
    x, added = call.x, call.added
    if x.dtype == torch.float32:
        x = x.to(dtype)
    if added is not None and added.dtype == torch.float32:
        added = added.to(dtype)
    return call if x is call.x and added is call.added else call.with_inputs(x, added)


def is_plain(x: Tensor) -> bool:
    """Return whether no compiler, tracer, transform, autocast or mode is active. Autograd may be."""
    return not (_is_observed(x) or torch.is_autocast_enabled(x.device.type))


def _is_observed(x: Tensor) -> bool:
    """Return whether a compiler, tracer, transform or mode is active, which has to see an op."""
    return (
        torch.compiler.is_compiling()
        or type(x) is not Tensor
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or x.is_meta  # which autocast does not know
        or torch.jit.is_tracing()
        or torch._C._functorch.maybe_current_level() is not None
        or forward_ad._current_level >= 0
    )


def is_plain_inference(x: Tensor) -> bool:
    """Return whether no compiler, tracer, transform, autocast or mode is active, and autograd is off."""
    return not torch.is_grad_enabled() and is_plain(x)
