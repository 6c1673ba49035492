"""Run a call: the entry point of the blocks.

Plain eager calls go straight to dispatch (:mod:`.infer`) or to a training step (:mod:`.train`), because PyTorch's
dispatcher would unpack the lists of a block into boxed values and back several times. A compiler, autocast or a
dispatch mode uses the ``torch.library`` op, which has a rule for each.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad, profiler

from ..calls import Call
from ..dispatch import select
from . import train
from .infer import prepared
from .op import OPS


def run(call: Call, backend: str, save: str = "raw") -> Tensor:
    """Return the result of a call.

    Args:
        backend: a name of :data:`resnet_fast.flags.BACKENDS`.
        save: what training keeps for the backward pass: ``raw`` (all raw outputs) or ``recompute`` (fewer).
    """
    if is_plain(call.x):
        graph = torch.is_grad_enabled() and train.needs_gradient(call)
        if not graph and not call.batch_stats:
            found = prepared(call, backend)
            return select.execute(call, found.spec, found.choice, found.state)
        if not profiler._is_profiler_enabled:  # a profiler shows the op
            return train.run(call, train.Options(backend, save, call.sync), graph)
    flat = OPS[call.op].flatten(call)
    return getattr(torch.ops.resnet_fast, call.op)(*flat, backend, save, call.sync)


def is_plain(x: Tensor) -> bool:
    """Return whether no compiler, tracer, transform, autocast or mode is active. Autograd may be."""
    return not (
        torch.compiler.is_compiling()
        or type(x) is not Tensor
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or x.is_meta  # which autocast does not know
        or torch.is_autocast_enabled(x.device.type)
        or torch.jit.is_tracing()
        or torch._C._functorch.maybe_current_level() is not None
        or forward_ad._current_level >= 0
    )


def is_plain_inference(x: Tensor) -> bool:
    """Return whether no compiler, tracer, transform, autocast or mode is active, and autograd is off."""
    return not torch.is_grad_enabled() and is_plain(x)
