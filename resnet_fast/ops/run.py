"""From a call record to its result: what the blocks call.

Plain eager inference goes straight to dispatch: PyTorch's dispatcher would unpack the lists of a block into boxed
values and back twice, for nothing. Whatever else is going on (autograd, a
compiler, autocast, a dispatch mode) takes the ``torch.library`` op, which has a rule for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..calls import BlockCall, Call, ConvBnActCall, norms_of
from .infer import infer


def run(call: Call, backend: str, save: str = "raw") -> Tensor:
    """The result of ``call`` on ``backend`` (a name of :data:`resnet_fast.flags.BACKENDS`).

    ``save``: what training keeps for the backward pass, ``raw`` (all raw outputs) or ``recompute`` (fewer).
    """
    if is_plain_inference(call.x) and not call.batch_stats:
        return infer(call, backend)
    sync = next((n.sync for n in norms_of(call) if n.sync), "")
    return getattr(torch.ops.resnet_fast, call.op)(*flatten(call), backend, save, sync)


def is_plain_inference(x: Tensor) -> bool:
    """No autograd, compiler, tracer, transform, autocast or dispatch mode wants to know of a call with this input."""
    return not (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or type(x) is not Tensor
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or x.is_meta  # which autocast does not know
        or torch.is_autocast_enabled(x.device.type)
        or torch.jit.is_tracing()
        or torch._C._functorch.maybe_current_level() is not None
        or forward_ad._current_level >= 0
    )


def flatten(call: Call) -> tuple[Any, ...]:
    """The call as the flat arguments of its op's schema, without the options."""
    if isinstance(call, BlockCall):
        geometry = [v for c in call.convs for v in (*c.stride, *c.padding, *c.dilation, c.groups)]
        return (
            call.x,
            [c.weight for c in call.convs],
            [c.bias for c in call.convs],
            [t for n in call.norms for t in n.tensors()],
            geometry,
            [n.batch_stats for n in call.norms],
            [n.momentum for n in call.norms],
            [n.eps for n in call.norms],
            call.shortcut,
        )
    if isinstance(call, ConvBnActCall):
        return (call.x, *call.conv, *call.norm[:7], call.relu, call.residual)
    return (call.x, *call.conv, *call.norm[:7], list(call.pool))
