"""Capture a training step of a net: the forward pass as one CUDA graph, the backward pass as another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import parameter_cache
from . import frozen_norms, recorder
from .fused import Fused

NetForward = Callable[[Any, Tensor], Tensor]
"""Runs the net in the first argument, without graphs."""


class Step:
    """The two graphs of a signature.

    Args:
        shared: the recorder that the net's steps share.
        forward: launches the forward pass.
        backward: launches the backward pass.
        x: the static input.
        y: the static output.
        dy: the static gradient of the output.
        grads: the static gradients.
        written: buffers that the forward pass writes to.
        reads: what else the launches read.
    """

    def __init__(
        self,
        shared: recorder.Recorder,
        forward: Callable[[], None],
        backward: Callable[[], None],
        x: Tensor,
        y: Tensor,
        dy: Tensor,
        grads: list[Tensor],
        written: list[Tensor],
        reads: list[Any],
    ):
        self.recorder = shared
        self._forward, self._backward = forward, backward
        self._x, self._y, self._dy, self._grads = x, y, dy, grads
        self._written, self._reads = written, reads

    def forward(self, x: Tensor) -> Tensor:
        """Return the net's output for ``x`` in a new tensor."""
        with self.recorder.turn():
            self._x.copy_(x)
            self._forward()
            y = self._y.clone()
        torch.autograd.graph.increment_version(self._written)
        return y

    def backward(self, dy: Tensor) -> list[Tensor]:
        """Return the gradients in new tensors, for the gradient of the last output."""
        grads = [torch.empty_like(g) for g in self._grads]
        with self.recorder.turn():
            self._dy.copy_(dy)
            self._backward()
            torch._foreach_copy_(grads, self._grads)
        return grads

    def __del__(self) -> None:
        # The memory returns to the stream that allocated it, while replays may still run on other streams.
        self.recorder.drain()


class NetError(Exception):
    """The net's own error for an input."""

    def __init__(self, cause: Exception):
        super().__init__(str(cause))
        self.cause = cause


class _Shadow:
    """Copies of a net's modules whose parameters are leaves of their own, in the same memory.

    A capture through the net itself would run the hooks of its parameters, and its gradients would reach them.
    """

    def __init__(self) -> None:
        self._parameters: dict[int, nn.Parameter] = {}

    def parameter(self, p: Tensor) -> nn.Parameter:
        """Return the copies' parameter in the place of ``p``."""
        if id(p) not in self._parameters:
            self._parameters[id(p)] = nn.Parameter(p.detach(), requires_grad=p.requires_grad)
        return self._parameters[id(p)]

    def copy(self, net: nn.Module, scratch: bool) -> nn.Module:
        """Return a copy of the net. ``scratch``: running statistics that training updates have memory of their own."""
        modules: dict[int, nn.Module] = {}
        buffers: dict[int, Tensor] = {}

        def buffer(m: nn.Module, b: Tensor | None) -> Tensor | None:
            if b is None or not scratch or _is_still(m):
                return b
            return buffers.setdefault(id(b), b.detach().clone())

        def copied(m: nn.Module) -> nn.Module:
            if id(m) not in modules:
                modules[id(m)] = found = m.__new__(type(m))
                found.__dict__ = m.__dict__ | {
                    "_parameters": {k: None if p is None else self.parameter(p) for k, p in m._parameters.items()},
                    "_buffers": {k: buffer(m, b) for k, b in m._buffers.items()},
                    "_modules": {k: None if child is None else copied(child) for k, child in m._modules.items()},
                }
            return modules[id(m)]

        return copied(net)


def _is_still(m: nn.Module) -> bool:
    """Return whether training does not write to this layer's buffers."""
    return not m.training or frozen_norms.is_frozen(m)


def capture(
    net: Fused,
    x: Tensor,
    layout: torch.memory_format,
    forward: NetForward,
    shared: recorder.Recorder,
    sources: tuple[Tensor | None, ...],
) -> tuple[Step, list[int], list[int]]:
    """Capture a step for inputs like ``x``.

    Returns:
        The step; which of ``sources`` it has gradients for; and which it must not be used after a write to.
    """
    shadow = _Shadow()
    scratch, live = shadow.copy(net, scratch=True), shadow.copy(net, scratch=False)
    trained = [i for i in _unique(sources) if (t := sources[i]) is not None and t.requires_grad]
    leaves: list[Tensor] = [shadow.parameter(t) for i in trained if (t := sources[i]) is not None]

    def inputs(static: Tensor) -> list[Tensor]:
        return [static, *leaves] if x.requires_grad else leaves

    def warm_up(static: Tensor) -> None:
        static.requires_grad_(x.requires_grad)
        try:
            y = forward(scratch, static)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise NetError(error) from error
        if not isinstance(y, Tensor) or not y.requires_grad:
            raise TypeError(f"expected the net to return a tensor that requires a gradient, got {type(y).__name__}")
        _gradients(y, torch.zeros_like(y), inputs(static))

    counted = [t for t in sources if t is not None and not isinstance(t, nn.Parameter) and not t.is_inference()]
    with recorder.no_autocast_cache(), shared.same_random_numbers():
        static = shared.warm_up(warm_up, x.detach(), layout)
        versions = [t._version for t in counted]
        launch, y = shared.capture(lambda static: forward(live, static), static)
        written = [t for t, version in zip(counted, versions, strict=True) if t._version != version]
        dy = torch.zeros_like(y)
        launch_backward, grads = shared.capture(lambda dy: _gradients(y, dy, inputs(static)), dy)
    if x.requires_grad and grads[0] is None:
        raise TypeError("expected an output that depends on the input, which requires a gradient")
    trained = [i for i, grad in zip(trained, grads[len(grads) - len(trained) :], strict=True) if grad is not None]
    still, reads = _derived(net, live, sources)
    reads += [t.untyped_storage() for t in sources if t is not None]  # a backward pass may come after model.to()
    there = [grad for grad in grads if grad is not None]
    return Step(shared, launch, launch_backward, static.detach(), y.detach(), dy, there, written, reads), trained, still


def _unique(sources: tuple[Tensor | None, ...]) -> list[int]:
    """Return the places of the different tensors."""
    first: dict[int, int] = {}
    for i, t in enumerate(sources):
        if t is not None:
            first.setdefault(id(t), i)
    return list(first.values())


def _gradients(y: Tensor, dy: Tensor, inputs: list[Tensor]) -> list[Tensor | None]:
    """Return the gradients of ``inputs``, each in the layout of its input; None for one that ``y`` does not depend on.

    A backward pass runs outside of autocast.
    """
    with torch.autocast(y.device.type, enabled=False):
        grads = torch.autograd.grad(y, inputs, dy, allow_unused=True)
        return [None if g is None else _laid_out(g, t) for g, t in zip(grads, inputs, strict=True)]


def _laid_out(grad: Tensor, like: Tensor) -> Tensor:
    """Return the gradient in the layout that autograd gives ``like.grad``."""
    if grad.stride() == like.stride():
        return grad
    return torch.empty_like(like, dtype=grad.dtype, requires_grad=False).copy_(grad)


def _derived(net: nn.Module, live: nn.Module, sources: tuple[Tensor | None, ...]) -> tuple[list[int], list[Any]]:
    """Return which of ``sources`` something was derived from, so that they may not change, and what was derived.

    Only from frozen parameters and from buffers that training does not write to is anything derived.
    """
    tensors = [t for m in live.modules() for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]
    derived = [value for t in tensors for value in parameter_cache.values_of(t)]
    if not derived:
        return [], []
    still = {id(b) for m in net.modules() if _is_still(m) for b in m._buffers.values()}
    frozen = [
        i
        for i, t in enumerate(sources)
        if t is not None and (id(t) in still or (isinstance(t, nn.Parameter) and not t.requires_grad))
    ]
    return frozen, derived
