"""Training on a backend whose gradient is code of its own: two ops per op, and the step of autograd between them.

    NAME_train(args, options)                          -> y, saved          every call with a graph or batch statistics
    NAME_backward(dy, y, saved, args, options, needs)  -> gradients         in the order of ``calls.Leaves``

``args`` and ``options`` are those of the op NAME. The chosen implementation's :class:`~resnet_fast.spec.Training` runs
below both, so a compiler sees two opaque ops with known shapes and keeps one graph. Running statistics are updated
here, from what ``saved`` holds, after the forward has succeeded: a launch that fails leaves them as they were.

``saved`` holds raw convolution outputs and the vectors of the norms. It goes through ``save_for_backward`` together
with the output, the input and the weights, so that saved-tensor hooks, checkpointing and autograd's check for tensors
that were changed in place see all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _AutoDispatchBelowAutograd
from torch.autograd import forward_ad

from ..calls import Call, Leaves, norms_of
from ..dispatch import record, select
from ..errors import BackendError
from ..spec import Training
from .check import check, spec_of
from .run import flatten

Bind = Callable[..., Call]


class Options(NamedTuple):
    """Every op's trailing arguments. ``save``: ``raw`` or ``recompute``; ``sync``: the name of a process group."""

    backend: str = "auto"
    save: str = "raw"
    sync: str = ""


OPTIONS_SCHEMA = 'str backend="auto", str save="raw", str sync=""'


def completer(op: Any) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """What puts back the trailing arguments that PyTorch drops before it calls a Python kernel: those at default."""
    defaults = tuple(a.default_value for a in op._schema.arguments)
    return lambda args: (*args, *defaults[len(args) :])


def define(library: torch.library.Library, name: str, schema: str, bind: Bind) -> None:
    """Define ``name_train`` and ``name_backward``. ``schema``: the arguments of ``name`` without its options; ``bind``
    makes a call of all arguments of ``name``."""
    library.define(f"{name}_train({schema}, {OPTIONS_SCHEMA}) -> (Tensor, Tensor[])")
    library.define(
        f"{name}_backward(Tensor dy, Tensor y, Tensor[] saved, {schema}, {OPTIONS_SCHEMA}, *, bool[] needs) -> Tensor[]"
    )
    forward_op = getattr(torch.ops.resnet_fast, f"{name}_train").default
    backward_op = getattr(torch.ops.resnet_fast, f"{name}_backward").default
    complete = completer(forward_op)

    def bound(args: tuple[Any, ...]) -> tuple[Call, Options]:
        args = complete(args)
        return bind(*args), Options(*args[-3:])

    def chosen(call: Call, spec: Any, options: Options) -> tuple[select.Choice, Training]:
        choice = select.choose(spec, call.x.device.type, options.backend)
        return choice, _training(choice)

    def train(*args: Any) -> tuple[Tensor, list[Tensor]]:
        call, options = bound(args)
        spec: Any = spec_of(call, grad=True)
        choice, training = chosen(call, spec, options)
        record.chosen(spec, choice)
        y, saved, plan = training.forward(call, spec, options.save)
        record.ran(call, spec, choice, plan)
        return y, saved

    def train_fake(*args: Any) -> tuple[Tensor, list[Tensor]]:
        call, options = bound(args)
        spec: Any = check(call, grad=True)
        shapes = chosen(call, spec, options)[1].shapes(call, spec, options.save)
        return _empty(call.x, spec.out_shape(), call.x.dtype, spec.layout), [_empty(call.x, *each) for each in shapes]

    def train_autograd(*args: Any) -> tuple[Tensor, list[Tensor]]:
        call, options = bound(args)
        if not _wants_gradient(Leaves.of(call).flat()):
            with _AutoDispatchBelowAutograd():
                return forward_op(*args)
        y, *saved = _Step.apply(forward_op, backward_op, None, call, options, *Leaves.of(call).flat())
        return y, saved

    def backward(dy: Tensor, y: Tensor, saved: list[Tensor], *args: Any, needs: list[bool]) -> list[Tensor]:
        call, options = bound(args)
        spec: Any = spec_of(call, grad=True)
        wanted = Leaves.of(call).like(needs)
        grads = chosen(call, spec, options)[1].backward(call, spec, saved, y, dy, wanted).flat()
        return [dy.new_empty(0) if g is None else g for g in grads]

    def backward_fake(dy: Tensor, y: Tensor, saved: list[Tensor], *args: Any, needs: list[bool]) -> list[Tensor]:
        leaves = Leaves.of(bound(args)[0]).flat()
        return [torch.empty_like(t) if need else dy.new_empty(0) for t, need in zip(leaves, needs, strict=True)]

    def backward_autograd(dy: Tensor, y: Tensor, saved: list[Tensor], *args: Any, needs: list[bool]) -> list[Tensor]:
        leaves = (dy, *Leaves.of(bound(args)[0]).flat())
        if _wants_gradient(leaves):
            return list(_Second.apply(name, backward_op, (dy, y, saved, *args), needs, *leaves))
        with _AutoDispatchBelowAutograd():
            return backward_op(dy, y, saved, *args, needs=needs)

    library.impl(f"{name}_train", train, "CompositeExplicitAutograd")
    library.impl(f"{name}_train", train_autograd, "Autograd")
    library.impl(f"{name}_backward", backward, "CompositeExplicitAutograd")
    library.impl(f"{name}_backward", backward_autograd, "Autograd")
    torch.library.register_fake(f"resnet_fast::{name}_train", train_fake, lib=library)
    torch.library.register_fake(f"resnet_fast::{name}_backward", backward_fake, lib=library)


def _wants_gradient(tensors: tuple[Tensor | None, ...]) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _training(choice: select.Choice) -> Training:
    found = choice.impl.training
    if found is None:
        op, backend = choice.impl.op, choice.impl.backend
        raise BackendError(
            f"expected a backend with training kernels of its own, got {backend!r}; call torch.ops.resnet_fast.{op}, "
            "which lets autograd record what that backend does"
        )
    return found


def _empty(x: Tensor, shape: tuple[int, ...], dtype: torch.dtype, layout: str = "") -> Tensor:
    nhwc = torch.channels_last if layout == "nhwc" else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=nhwc)


def run(call: Call, choice: select.Choice, options: Options) -> Tensor:
    """A call with a graph or batch statistics, on an implementation that has :class:`~resnet_fast.spec.Training`."""
    tangents = forward_ad._current_level >= 0 and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in Leaves.of(call).flat()
    )
    if tangents:
        raise BackendError(
            f"expected reverse-mode autograd on backend {choice.impl.backend!r}, got forward-mode tangents; run inside "
            "resnet_fast.use_backend('reference')"
        )
    forward_op = getattr(torch.ops.resnet_fast, f"{call.op}_train").default
    backward_op = getattr(torch.ops.resnet_fast, f"{call.op}_backward").default
    # The backward pass may run in a thread of autograd's, which the caller's ``use_backend`` does not reach.
    options = options._replace(backend=select.requested(options.backend))
    leaves, statistics = Leaves.of(call).flat(), _training(choice).statistics
    if _wants_gradient(leaves):
        return _Step.apply(forward_op, backward_op, statistics, call, options, *leaves)[0]
    y, saved = forward_op(*flatten(call), *options)
    with torch.no_grad():
        _update_running(call, statistics(call, saved))
    return y


def _update_running(call: Call, batch: list[tuple[Tensor, Tensor] | None]) -> None:
    """running = (1 - momentum) * running + momentum * batch in place, as ``torch.nn.functional.batch_norm`` does it."""
    for norm, found in zip(norms_of(call), batch, strict=True):
        if found is None or norm.mean is None or norm.var is None:
            continue
        for running, value in zip((norm.mean, norm.var), found, strict=True):
            running.copy_(running.float() * (1 - norm.momentum) + value * norm.momentum)


class _Step(torch.autograd.Function):
    """The node of a training op in autograd's graph, with the leaves of the call as its inputs.

    ``statistics``: how the running statistics are found in what the op saves; None: they are not this call's to update.
    They are updated before anything is handed to autograd: the recomputation of a checkpoint stops as soon as it has
    seen the last saved tensor, and stock's BatchNorm has counted the batch by then.
    """

    @staticmethod
    def forward(
        ctx: Any,
        op: Any,
        backward_op: Any,
        statistics: Callable[..., Any] | None,
        call: Call,
        options: Options,
        *leaves: Tensor | None,
    ) -> Any:
        with _AutoDispatchBelowAutograd():
            y, saved = op(*flatten(call), *options)
        if statistics is not None:
            _update_running(call, statistics(call, saved))
        here = [t is not None for t in leaves]
        ctx.backward_op, ctx.options, ctx.here, ctx.saved_count = backward_op, options, here, len(saved)
        ctx.form = Leaves.of(call).like([None] * len(leaves)).put_into(call)  # everything of the call but its tensors
        ctx.save_for_backward(y, *saved, *(t for t in leaves if t is not None))
        ctx.mark_non_differentiable(*saved)
        ctx.set_materialize_grads(False)
        return (y, *saved)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *others: Any) -> Any:
        skipped = (None,) * 5
        if dy is None:
            return (*skipped, *(None for _ in ctx.here))
        y, *rest = ctx.saved_tensors
        saved, tensors = rest[: ctx.saved_count], iter(rest[ctx.saved_count :])
        leaves = Leaves.of(ctx.form).like([next(tensors) if here else None for here in ctx.here])
        call, needs = leaves.put_into(ctx.form), list(ctx.needs_input_grad[5:])
        grads = ctx.backward_op(dy, y, saved, *flatten(call), *ctx.options, needs=needs)
        return (*skipped, *(g if need else None for g, need in zip(grads, needs, strict=True)))


class _Second(torch.autograd.Function):
    """A first derivative inside a graph (``create_graph=True``): differentiating it again is what cannot be done."""

    @staticmethod
    def forward(ctx: Any, name: str, op: Any, args: tuple[Any, ...], needs: list[bool], *leaves: Tensor | None) -> Any:
        ctx.name = name
        with _AutoDispatchBelowAutograd():
            return tuple(op(*args, needs=needs))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise BackendError(
            f"expected a first derivative of {ctx.name}, got a request to differentiate its backward kernels (double "
            "backward); run forward and backward inside resnet_fast.use_backend('reference'), or "
            "accelerate(model, backend='reference')"
        )
