"""Register an op with ``torch.library``, with the same rules for each.

    torch.ops.resnet_fast.NAME(...)
      Autocast   x to the autocast dtype; weights and BatchNorm stay as they are (folding rounds them once)
      Autograd   a graph or batch statistics are needed -> a training step (train.py) if the chosen backend has
                 kernels for it, else the reference, which autograd records; otherwise one level down
      backend    check -> Spec -> dispatch
      Fake       the reference on fake tensors: real shapes, dtypes and strides

While a compiler traces a call that needs a graph, it records the training ops if the chosen backend has them and
shapes are known, else the reference's ATen operations.
Running statistics are updated in place without an alias annotation, as in ``aten::batch_norm``: a call with batch
statistics is decomposed above functionalization, where ATen's own annotations apply.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import _after_autograd_keyset, _AutoDispatchBelowAutograd
from torch.autograd import forward_ad

from ..calls import Call
from ..dispatch import select
from ..errors import UserError
from . import train
from .infer import infer
from .op import DEFINED, NAMESPACE, OPS, Op

_log = logging.getLogger("torch.utils.flop_counter")
# Importing it warns if Triton is missing; importing this package must not.
_log.disabled, _before = True, _log.disabled
from torch.utils.flop_counter import register_flop_formula  # noqa: E402

_log.disabled = _before

LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def register(op: Op) -> None:
    """Define ``resnet_fast::NAME`` with every rule it needs."""
    OPS[op.name] = op
    LIBRARY.define(f"{op.name}({op.schema}, {train.OPTIONS_SCHEMA}) -> Tensor")
    packet = getattr(DEFINED, op.name)
    bound = train.binder(op, packet.default)

    def on_backend(*args: Any) -> Tensor:
        call, options = bound(args)
        return train.run_anywhere(call, options, False) if call.batch_stats else infer(call, options.backend)

    def on_autograd(keyset: torch._C.DispatchKeySet, *args: Any) -> Tensor:
        call, options = bound(args)
        graph = _needs_graph(call)
        if graph or call.batch_stats:
            return train.run_anywhere(call, options, graph)
        with _AutoDispatchBelowAutograd():
            return packet.default.redispatch(keyset & _after_autograd_keyset, *args)

    def on_fake(*args: Any) -> Tensor:
        call, _ = bound(args)
        _check_one_device(call)
        return select.trace(call)

    train.define(LIBRARY, op)
    LIBRARY.impl(op.name, on_backend, "CompositeExplicitAutograd")
    LIBRARY.impl(op.name, on_autograd, "Autograd", with_keyset=True)
    for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        LIBRARY.impl(op.name, _autocast_rule(packet.default, device), key)
    torch.library.register_fake(f"{NAMESPACE}::{op.name}", on_fake, lib=LIBRARY)
    register_flop_formula(packet)(op.flops)


def _autocast_rule(op: Any, device: str) -> Callable[..., Tensor]:
    complete = train.completer(op)

    def rule(*args: Any) -> Tensor:
        dtype = torch.get_autocast_dtype(device)

        def cast(t: Any) -> Any:
            return t.to(dtype) if isinstance(t, Tensor) and t.dtype == torch.float32 else t

        # Activations are x, first, and the tensor that is added, which the schemas pass last, before the options.
        x, *rest, last, backend, save, sync = complete(args)
        with torch.autocast(device, enabled=False):
            return op(cast(x), *rest, cast(last), backend, save, sync)

    return rule


def _check_one_device(call: Call) -> None:
    """Check devices. Otherwise a real tensor among meta tensors would give a result without numbers."""
    for t in call.tensors():
        if t.device != call.x.device:
            raise UserError(
                f"{call.op}: every tensor on {call.x.device}, where x is",
                f"one of shape {tuple(t.shape)} on {t.device}",
                f"call model.to({str(call.x.device)!r})",
            )


def _needs_graph(call: Call) -> bool:
    """Return whether autograd, backward or forward, needs to see what the call does."""
    if torch.is_grad_enabled() and train.needs_gradient(call):
        return True
    # forward-mode AD: a dual tensor need not require a gradient, and would lose its tangent below autograd
    return forward_ad._current_level >= 0 and train.has_tangents(call.tensors())
