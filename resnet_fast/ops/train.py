"""Run a call that needs a graph or batch statistics.

With training kernels, the call is one node in autograd's graph. Eager training calls the chosen implementation's
:class:`~resnet_fast.impl.Training` directly (:class:`_DirectStep`). A compiler sees two opaque ops with known shapes
instead (:class:`_StepThroughOps`), so that it keeps one graph:

    NAME_train(args, options)                          -> y, saved          every call with a graph or batch statistics
    NAME_backward(dy, y, saved, args, options, needs)  -> gradients         in the order of ``calls.Call.leaves``

``args`` and ``options`` are those of the op NAME. An eager step's kernels update the running statistics themselves. The
ops change no argument: around them, running statistics are updated here, from tensors in ``saved``. A call that fails
before its first launch leaves them unchanged.

``saved`` holds raw convolution outputs and the vectors of the norms. It is passed to ``save_for_backward`` together
with the output, the input and the weights, so that saved-tensor hooks, checkpointing and autograd's check for in-place
changes see all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _AutoDispatchBelowAutograd
from torch.autograd import forward_ad, profiler

from ..calls import Call
from ..dispatch import catalog, record, select
from ..errors import BackendError
from ..impl import Choice
from ..spec import Spec
from .op import DEFINED, NAMESPACE, OPS, Op
from .specs import check, key_of, spec_of


class Options(NamedTuple):
    """Every op's trailing arguments. ``save``: ``raw`` or ``recompute``; ``sync``: the name of a process group."""

    backend: str = "auto"
    save: str = "raw"
    sync: str = ""


OPTIONS_SCHEMA = 'str backend="auto", str save="raw", str sync=""'


def needs_gradient(call: Call) -> bool:
    """Return whether a tensor of the call requires a gradient."""
    if call.x.requires_grad:  # of most blocks of a net
        return True
    return any(t.requires_grad for t in call.tensors())


def has_tangents(tensors: Iterable[Tensor | None]) -> bool:
    """Return whether a tensor has a forward-mode tangent."""
    return any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)


class Decision(NamedTuple):
    """What is decided about a call that needs a graph or batch statistics, for all calls with the same key.

    Attributes:
        spec: the problem.
        choice: the implementation.
        save: of :class:`Options`.
        form: the call with True in place of each tensor that it has. The key, and so this, leaves the momenta out.
        here: the leaves of ``form``: True for each that the call has, else None.
    """

    spec: Spec
    choice: Choice
    save: str
    form: Call
    here: tuple[Any, ...]


def _forward(spec: Spec, choice: Choice, save: str, call: Call, update: bool) -> tuple[Tensor, list[Tensor]]:
    """Return the output and the tensors that the backward pass needs, and count the call.

    ``update``: whether to update the running statistics.
    """
    if choice.fell_back:
        record.fell_back(spec, choice)
    if update:  # kernels write to them where autograd does not see it
        written: list[Any] = []
        for norm in call.norms:
            if norm.batch_stats and norm.mean is not None:
                written += norm[2:4]
        torch._C._increment_version(written)
    y, saved, plan = choice.impl.trainer.forward(call, spec, save, update)
    record.ran(call, spec, choice, plan)
    return y, saved


_KEEP = 4096
_decisions: dict[Any, Decision] = {}


def _decide(call: Call, options: Options, graph: bool) -> Decision:
    """Check a call and choose its implementation. A call with a key that was seen before costs one look-up."""
    key = (key_of(call, graph), select.requested(options.backend), catalog.fingerprint(), options.save)
    found = _decisions.get(key)
    if found is None:
        spec = spec_of(call, graph)
        choice = select.choose(spec, call.x.device, options.backend)
        if choice.impl.training and not graph:
            spec = spec_of(call, True)
        here = tuple([None if t is None else True for t in call.leaves()])
        found = Decision(spec, choice, options.save, call.with_leaves(here), here)
        if choice.lasts:
            if len(_decisions) >= _KEEP:
                _decisions.clear()
            _decisions[key] = found
    return found


def forget() -> None:
    """Decide anew about the next call of every kind."""
    _decisions.clear()


def run(call: Call, options: Options, graph: bool) -> Tensor:
    """Run a call on tensors with memory of their own. ``graph``: whether autograd needs its graph."""
    decision = _decide(call, options, graph)
    if not decision.choice.impl.training:
        return select.run(call, decision.spec, decision.choice)
    if graph:
        return _apply(decision, call, *[t for t in call.leaves() if t is not None])
    with _AutoDispatchBelowAutograd():
        return _forward(decision.spec, decision.choice, decision.save, call, update=True)[0]


def run_anywhere(call: Call, options: Options, graph: bool) -> Tensor:
    """Run a call on any tensors, also on those of a compiler or tracer and with forward-mode tangents."""
    traced = _is_traced(call.x)
    if traced and not all(type(size) is int for size in call.x.shape):
        return select.trace(call)
    tangents = forward_ad._current_level >= 0 and has_tangents(call.leaves())
    if not traced and not tangents and not profiler._is_profiler_enabled:  # a profiler shows both passes as ops
        return run(call, options, graph)
    spec = spec_of(call, graph)
    choice = select.choose(spec, call.x.device, options.backend)
    if not choice.impl.training:
        return select.trace(call) if traced else select.run(call, spec, choice)
    if tangents:
        raise BackendError(
            f"expected reverse-mode autograd on backend {choice.impl.backend!r}, got forward-mode tangents; run inside "
            "resnet_fast.use_backend('reference')"
        )
    # The backward pass may run in a thread of autograd's, which the caller's ``use_backend`` does not reach.
    passes = _ThroughOps(call.op, options._replace(backend=select.requested(options.backend)))
    statistics = choice.impl.trainer.statistics
    leaves = call.leaves()
    if _wants_gradient(leaves):
        return _StepThroughOps.apply(passes, statistics, call, *leaves)[0]
    with _AutoDispatchBelowAutograd():
        y, saved = passes.forward(call)
    with torch.no_grad():
        _update_running(call, statistics(call, saved))
    return y


def _wants_gradient(tensors: Iterable[Tensor | None]) -> bool:
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def _update_running(call: Call, batch: list[tuple[Tensor, Tensor] | None]) -> None:
    """running = (1 - momentum) * running + momentum * batch in place, as ``torch.nn.functional.batch_norm`` does it."""
    for norm, found in zip(call.norms, batch, strict=True):
        if found is None or norm.mean is None or norm.var is None:
            continue
        for running, value in zip((norm.mean, norm.var), found, strict=True):
            running.copy_(running.float() * (1 - norm.momentum) + value * norm.momentum)


def _is_traced(x: Tensor) -> bool:
    """Return whether this is a tracer's tensor (fake, functional, symbolic), without memory of its own."""
    return type(x) not in (Tensor, torch.nn.Parameter) or torch._C._len_torch_dispatch_stack() > 0


class _ThroughOps(NamedTuple):
    """Run both passes of a traced or profiled step as the ops ``NAME_train`` and ``NAME_backward``."""

    op: str
    options: Options

    def forward(self, call: Call) -> tuple[Tensor, list[Tensor]]:
        """Return the output and the tensors that the backward pass needs."""
        op = getattr(DEFINED, f"{self.op}_train").default
        return op(*OPS[self.op].flatten(call), *self.options)

    def backward(self, call: Call, dy: Tensor, y: Tensor, saved: list[Tensor], needs: list[bool]) -> Sequence[Any]:
        """Return the gradients of ``call.leaves()``."""
        op = getattr(DEFINED, f"{self.op}_backward").default
        return op(dy, y, saved, *OPS[self.op].flatten(call), *self.options, needs=needs)


class _DirectStep(torch.autograd.Function):
    """The node of an eager training step in autograd's graph. Its inputs are the leaves that the call has.

    Running statistics are updated before any tensor is saved: the recomputation of a checkpoint stops after the last
    saved tensor, and stock BatchNorm has updated its statistics by then.
    """

    @staticmethod
    def forward(ctx: Any, decision: Decision, call: Call, *leaves: Tensor) -> Tensor:
        with _AutoDispatchBelowAutograd():
            y, saved = _forward(decision.spec, decision.choice, decision.save, call, update=True)
        ctx.decision, ctx.saved_count = decision, len(saved)
        ctx.save_for_backward(y, *saved, *leaves)
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> Any:
        needs_here: tuple[bool, ...] = ctx.needs_input_grad[2:]
        if dy is None:
            return (None, None, *[None] * len(needs_here))
        decision: Decision = ctx.decision
        here = decision.here
        y, *rest = ctx.saved_tensors
        saved, tensors, needs = rest[: ctx.saved_count], iter(rest[ctx.saved_count :]), iter(needs_here)
        leaves = [next(tensors) if there else None for there in here]
        wanted = [bool(there) and next(needs) for there in here]
        call = decision.form.with_leaves(leaves)
        grads = _backward(decision, call, dy, y, saved, wanted)
        return (None, None, *[g if need else None for g, need, there in zip(grads, wanted, here, strict=True) if there])


# ``torch.autograd.Function.apply`` without the look for transforms of torch.func, which no plain call has.
_apply: Any = super(torch.autograd.Function, _DirectStep).apply


def _backward(
    decision: Decision, call: Call, dy: Tensor, y: Tensor, saved: list[Tensor], needs: list[bool]
) -> Sequence[Any]:
    """Return the gradients of ``call.leaves()``, by the implementation that was chosen for the forward pass."""
    spec, choice, save = decision[:3]
    if _is_traced(dy):  # an eager step's backward pass may be traced, by compiled autograd for instance
        return _ThroughOps(call.op, Options(choice.impl.backend, save, call.sync)).backward(call, dy, y, saved, needs)

    def run() -> Sequence[Any]:
        return choice.impl.trainer.backward(call, spec, saved, y, dy, needs)

    if torch.is_grad_enabled():  # a graph of the first derivative (``create_graph=True``)
        leaves = (dy, *call.leaves())
        if _wants_gradient(leaves):
            return _Second.apply(call.op, run, *leaves)
    with _AutoDispatchBelowAutograd():
        return run()


class _StepThroughOps(torch.autograd.Function):
    """The node of a traced or profiled training step, with the leaves of the call as its inputs, None for those absent.

    ``statistics`` returns the batch's statistics from the saved tensors, for running statistics that ``passes`` leaves
    alone; None where the caller updates them. As in :class:`_DirectStep`, they are updated before any tensor is saved.
    """

    @staticmethod
    def forward(
        ctx: Any, passes: _ThroughOps, statistics: Callable[..., Any] | None, call: Call, *leaves: Tensor | None
    ) -> Any:
        with _AutoDispatchBelowAutograd():
            y, saved = passes.forward(call)
        if statistics is not None:
            _update_running(call, statistics(call, saved))
        ctx.passes, ctx.saved_count = passes, len(saved)
        ctx.form = call.with_leaves([t is not None for t in leaves])  # the call without its tensors
        ctx.save_for_backward(y, *saved, *[t for t in leaves if t is not None])
        ctx.mark_non_differentiable(*saved)
        ctx.set_materialize_grads(False)
        return (y, *saved)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *others: Any) -> Any:
        here, needs = ctx.form.leaves(), list(ctx.needs_input_grad[3:])
        if dy is None:
            return (None, None, None, *[None] * len(here))
        y, *rest = ctx.saved_tensors
        saved, tensors = rest[: ctx.saved_count], iter(rest[ctx.saved_count :])
        call = ctx.form.with_leaves([next(tensors) if there else None for there in here])
        grads = ctx.passes.backward(call, dy, y, saved, needs)
        return (None, None, None, *[g if need else None for g, need in zip(grads, needs, strict=True)])


class _Second(torch.autograd.Function):
    """A first derivative inside a graph (``create_graph=True``). Differentiating it again raises."""

    @staticmethod
    def forward(ctx: Any, name: str, backward: Callable[[], Sequence[Any]], *leaves: Tensor | None) -> Any:
        ctx.name = name
        with _AutoDispatchBelowAutograd():
            return tuple(backward())

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise BackendError(
            f"expected a first derivative of {ctx.name}, got a request to differentiate its backward kernels (double "
            "backward); run forward and backward inside resnet_fast.use_backend('reference'), or "
            "accelerate(model, backend='reference')"
        )


def completer(op: Any) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """Return a function that appends the trailing defaults, which PyTorch drops before it calls a Python kernel."""
    defaults = tuple(a.default_value for a in op._schema.arguments)
    return lambda args: (*args, *defaults[len(args) :])


def binder(op: Op, overload: Any) -> Callable[[tuple[Any, ...]], tuple[Call, Options]]:
    """Return a function that makes a call and its options from the flat arguments of a Python kernel."""
    complete = completer(overload)

    def bound(args: tuple[Any, ...]) -> tuple[Call, Options]:
        *given, backend, save, sync = complete(args)
        call = op.bind(*given)
        return call.with_sync(sync) if sync else call, Options(backend, save, sync)

    return bound


def define(library: torch.library.Library, op: Op) -> None:
    """Define ``NAME_train`` and ``NAME_backward``."""
    name, schema = op.name, op.schema
    library.define(f"{name}_train({schema}, {OPTIONS_SCHEMA}) -> (Tensor, Tensor[])")
    library.define(
        f"{name}_backward(Tensor dy, Tensor y, Tensor[] saved, {schema}, {OPTIONS_SCHEMA}, *, bool[] needs) -> Tensor[]"
    )
    forward_op = getattr(DEFINED, f"{name}_train").default
    backward_op = getattr(DEFINED, f"{name}_backward").default
    bound = binder(op, forward_op)

    def train(*args: Any) -> tuple[Tensor, list[Tensor]]:
        call, options = bound(args)
        spec = spec_of(call, True)
        return _forward(spec, _chosen(call, spec, options), options.save, call, update=False)

    def train_fake(*args: Any) -> tuple[Tensor, list[Tensor]]:
        call, options = bound(args)
        spec = check(call, True)
        shapes = _chosen(call, spec, options).impl.trainer.shapes(call, spec, options.save)
        return _empty(call.x, spec.out_shape(), call.x.dtype, spec.layout), [_empty(call.x, *each) for each in shapes]

    def train_autograd(*args: Any) -> tuple[Tensor, list[Tensor]]:
        call, options = bound(args)
        leaves = call.leaves()
        if not _wants_gradient(leaves):
            with _AutoDispatchBelowAutograd():
                return forward_op(*args)
        y, *saved = _StepThroughOps.apply(_ThroughOps(name, options), None, call, *leaves)
        return y, saved

    def backward(dy: Tensor, y: Tensor, saved: list[Tensor], *args: Any, needs: list[bool]) -> list[Tensor]:
        call, options = bound(args)
        spec = spec_of(call, True)
        grads = _chosen(call, spec, options).impl.trainer.backward(call, spec, saved, y, dy, needs)
        return [dy.new_empty(0) if g is None else g for g in grads]

    def backward_fake(dy: Tensor, y: Tensor, saved: list[Tensor], *args: Any, needs: list[bool]) -> list[Tensor]:
        leaves: Iterable[Any] = bound(args)[0].leaves()
        return [torch.empty_like(t) if need else dy.new_empty(0) for t, need in zip(leaves, needs, strict=True)]

    def backward_autograd(dy: Tensor, y: Tensor, saved: list[Tensor], *args: Any, needs: list[bool]) -> list[Tensor]:
        def run() -> Sequence[Any]:
            return backward_op(dy, y, saved, *args, needs=needs)

        leaves = (dy, *bound(args)[0].leaves())
        if _wants_gradient(leaves):
            return list(_Second.apply(name, run, *leaves))
        with _AutoDispatchBelowAutograd():
            return list(run())

    library.impl(f"{name}_train", train, "CompositeExplicitAutograd")
    library.impl(f"{name}_train", train_autograd, "Autograd")
    library.impl(f"{name}_backward", backward, "CompositeExplicitAutograd")
    library.impl(f"{name}_backward", backward_autograd, "Autograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}_train", train_fake, lib=library)
    torch.library.register_fake(f"{NAMESPACE}::{name}_backward", backward_fake, lib=library)


def _chosen(call: Call, spec: Spec, options: Options) -> Choice:
    """Return the choice for a direct call of a training op. BackendError if it has no training kernels."""
    choice = select.choose(spec, call.x.device, options.backend)
    if not choice.impl.training:
        op, backend = choice.impl.op, choice.impl.backend
        because = f" because of {choice.fell_back}" if choice.fell_back else ""
        raise BackendError(
            f"expected a backend with training kernels of its own, got {backend!r}{because}; call "
            f"torch.ops.{NAMESPACE}.{op}, which lets autograd record what that backend does"
        )
    return choice


def _empty(x: Tensor, shape: tuple[int, ...], dtype: torch.dtype, layout: str = "") -> Tensor:
    nhwc = torch.channels_last if layout == "nhwc" else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=nhwc)
