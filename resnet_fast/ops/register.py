"""How an op becomes a ``torch.library`` op: one mechanism for all of them.

    torch.ops.resnet_fast.NAME(...)
      Autocast   x to the autocast dtype; weights and BatchNorm stay as they are (folding rounds them once)
      Autograd   a graph or batch statistics are needed -> the chosen backend's training ops (train.py) where it has
                 them, else it runs right here, and autograd sees what it does; otherwise one level down
      backend    check -> Spec -> dispatch
      Fake       the reference on fake tensors: real shapes, dtypes and strides

While a compiler traces a call that needs a graph, the training ops go into its graph where the chosen backend has them
and shapes are known, else the reference's ATen operations.
The running statistics are updated in place without an alias annotation, as ``aten::batch_norm`` does it: a call with
batch statistics is decomposed above functionalization, where ATen's own annotations take over.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import _after_autograd_keyset, _AutoDispatchBelowAutograd
from torch.autograd import forward_ad

from ..calls import BlockCall, Call, Conv, given_of
from ..dispatch import select
from ..errors import UserError
from . import train
from .check import spec_of
from .infer import infer

_log = logging.getLogger("torch.utils.flop_counter")
_log.disabled, _before = True, _log.disabled  # where triton is absent, its import says so; importing us is silent
from torch.utils.flop_counter import register_flop_formula  # noqa: E402

_log.disabled = _before

LIBRARY = torch.library.Library("resnet_fast", "DEF")

NORM_SCHEMA = (
    "Tensor? bn_weight, Tensor? bn_bias, Tensor? running_mean, Tensor? running_var, "
    "bool batch_stats, float momentum, float eps"
)
CONV_SCHEMA = "Tensor weight, Tensor? bias, int[2] stride, int[2] padding, int[2] dilation, int groups"


def bind_conv(args: tuple[Any, ...]) -> Conv:
    """The six arguments of CONV_SCHEMA as a record."""
    weight, bias, stride, padding, dilation, groups = args
    return Conv(weight, bias, tuple(stride), tuple(padding), tuple(dilation), groups)


def register(name: str, schema: str, bind: Callable[..., Call], flops: Callable[..., int]) -> None:
    """Define ``resnet_fast::name`` with every rule it needs.

    Args:
        schema: the arguments, without the trailing :class:`~.train.Options` that every op has.
        bind: turns the flat arguments (without options) into a call record.
        flops: FLOPs of the op from the *shapes* of its arguments, as ``torch.utils.flop_counter`` wants it.
    """
    LIBRARY.define(f"{name}({schema}, {train.OPTIONS_SCHEMA}) -> Tensor")
    packet = getattr(torch.ops.resnet_fast, name)
    op = packet.default
    complete = train.completer(op)

    def bind_all(*args: Any) -> Call:
        *given, _, _, sync = args
        call = bind(*given)
        return with_sync(call, sync) if sync else call

    def on_backend(*args: Any) -> Tensor:
        args = complete(args)
        call, options = bind_all(*args), train.Options(*args[-3:])
        return with_statistics(call, options, False) if call.batch_stats else infer(call, options.backend)

    def with_statistics(call: Call, options: train.Options, graph: bool) -> Tensor:
        """What autograd has to see, or what updates running statistics."""
        traced = _is_traced(call.x)
        if traced and not all(type(size) is int for size in call.x.shape):
            return select.trace(call)
        spec = spec_of(call, grad=graph)
        choice = select.choose(spec, call.x.device.type, options.backend)
        if choice.impl.training is not None:
            return train.run(call, choice, options)
        return select.trace(call) if traced else select.run(call, spec, choice)

    def on_autograd(keyset: torch._C.DispatchKeySet, *args: Any) -> Tensor:
        args = complete(args)
        call, options = bind_all(*args), train.Options(*args[-3:])
        graph = _needs_graph(call)
        if graph or call.batch_stats:
            return with_statistics(call, options, graph)
        with _AutoDispatchBelowAutograd():
            return op.redispatch(keyset & _after_autograd_keyset, *args)

    def on_fake(*args: Any) -> Tensor:
        call = bind_all(*complete(args))
        _check_one_device(call)
        return select.trace(call)

    train.define(LIBRARY, name, schema, bind_all)
    LIBRARY.impl(name, on_backend, "CompositeExplicitAutograd")
    LIBRARY.impl(name, on_autograd, "Autograd", with_keyset=True)
    for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        LIBRARY.impl(name, _autocast_rule(op, complete, device), key)
    torch.library.register_fake(f"resnet_fast::{name}", on_fake, lib=LIBRARY)
    register_flop_formula(packet)(flops)


def _autocast_rule(
    op: Any, complete: Callable[[tuple[Any, ...]], tuple[Any, ...]], device: str
) -> Callable[..., Tensor]:
    def rule(*args: Any) -> Tensor:
        dtype = torch.get_autocast_dtype(device)

        def cast(t: Any) -> Any:
            return t.to(dtype) if isinstance(t, Tensor) and t.dtype == torch.float32 else t

        # Activations are x, first, and a residual or shortcut, which the schemas pass last, before ``backend``.
        x, *rest, last, backend, save, sync = complete(args)
        with torch.autocast(device, enabled=False):
            return op(cast(x), *rest, cast(last), backend, save, sync)

    return rule


def with_sync(call: Call, group: str) -> Call:
    """``call`` whose norms with batch statistics share them among the processes of ``group``."""
    if isinstance(call, BlockCall):
        return call._replace(norms=tuple([n._replace(sync=group) if n.batch_stats else n for n in call.norms]))
    return call._replace(norm=call.norm._replace(sync=group)) if call.norm.batch_stats else call


def tensors_of(call: Call) -> list[Tensor]:
    """Every tensor of a call, for the question whether one of them asks for a gradient."""
    return [t for t in (call.x, given_of(call), *call.parameters()) if t is not None]


def _check_one_device(call: Call) -> None:
    """A real tensor among meta tensors is served as a fake: without this, as a result that holds no numbers."""
    for t in tensors_of(call):
        if t.device != call.x.device:
            raise UserError(
                f"{call.op}: every tensor on {call.x.device}, where x is",
                f"one of shape {tuple(t.shape)} on {t.device}",
                f"call model.to({str(call.x.device)!r})",
            )


def _needs_graph(call: Call) -> bool:
    """Does autograd, backward or forward, need to see what the call does?"""
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors_of(call)):
        return True
    # forward-mode AD: a dual tensor need not require a gradient, and would lose its tangent below autograd
    return forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(t).tangent is not None for t in tensors_of(call)
    )


def _is_traced(x: Tensor) -> bool:
    """Is this a tracer's tensor (fake, functional, symbolic) rather than one with memory of its own?"""
    return type(x) not in (Tensor, torch.nn.Parameter) or torch._C._len_torch_dispatch_stack() > 0
