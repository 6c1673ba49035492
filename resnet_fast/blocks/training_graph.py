"""A net's training step as two CUDA graphs per signature: its forward pass, and its backward pass.

    x  --copy--> static x  --[ every launch of the forward pass  ]--> static y     --clone--> y
    dy --copy--> static dy --[ every launch of the backward pass ]--> static grads --clone--> gradients

Both are one node of autograd's graph (:class:`_Replayed`), whose inputs are x and the parameters. The loss, what
accumulates and exchanges gradients (hooks, DDP, a gradient scaler), and the optimizer run outside, so a loss may wait
for the GPU. Gradients are copies: ``.grad`` never shares memory with a graph. DDP gets all gradients of the net at
once: it exchanges them after the backward pass instead of during it.

The launches update running statistics and draw random numbers as the net does. The warm-up before a capture runs on
copies of the running statistics, and the random state is put back after it.

A graph reads parameters and buffers where they are, so their values may change, but not their addresses, shapes and
dtypes (:class:`~resnet_fast.parameter_cache.Places`). What the net computes from frozen weights and keeps (folded,
packed) makes a new capture when one of them was written.

The backward pass reuses the memory of what the forward pass saved, and every graph of a net shares one pool. So one
forward pass waits for its backward pass at a time: until then other calls of the net run eagerly. A second backward
pass (``retain_graph``) and a second derivative are errors.
"""

from __future__ import annotations

import sys
import weakref
from operator import attrgetter
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .. import flags, parameter_cache
from ..dispatch import catalog, record, select
from ..errors import BackendError
from ..locks import ForkSafeLock
from . import recorder
from .fused import Fused
from .snapshot import Layers, autocast_dtype, switches
from .training_step import NetError, NetForward, Step, capture

_requires_grad = attrgetter("requires_grad")

GRAPHS = 8
"""Steps kept per net. What they save for the backward pass shares memory; each has its own input and gradients."""

IDLE = 100
"""Calls without a use after which a kept step makes room for another. Until then the other runs eagerly: a net whose
input changes its shape at each call would be captured at each call."""


class _Waiting:
    """A forward pass that waits for its backward pass. It lives as long as its node in autograd's graph.

    Attributes:
        begun, done: whether the backward pass has begun, and whether its launches are submitted.
    """

    begun = done = False


class _Kept:
    """A captured step, or why there is none, and the state of the net that it belongs to.

    Attributes:
        trained: which of the net's tensors the step has gradients for, as places among ``layers.sources()``.
        used: the number of the call that used it last.
    """

    def __init__(self, key: Any, layers: Layers, step: Step | str, trained: list[int], still: list[int]):
        self.key, self.layers, self.step, self.trained, self.used = key, layers, step, trained, 0
        self._still = still
        self._stamps = parameter_cache.Stamps(self._frozen(layers.sources())) if still else None

    def _frozen(self, sources: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        return tuple([sources[i] for i in self._still])

    def serves(self, key: Any, sources: tuple[Tensor | None, ...]) -> bool:
        """Return whether a call with this key may use the step, if the layers are as they were."""
        return self.key == key and (self._stamps is None or self._stamps.hold(self._frozen(sources)))


class _Steps:
    """The captured steps of one net with its weights in one place."""

    def __init__(self) -> None:
        self.lock = ForkSafeLock()
        self._kept: list[_Kept] = []
        self._places: parameter_cache.Places | None = None
        self._last = 0  # place of the step that was used last: parts of a batch take turns
        self._calls = 0
        self._full = ""
        self._waiting: weakref.ref[_Waiting] | None = None

    def is_waited_for(self) -> bool:
        """Return whether a forward pass waits for its backward pass."""
        earlier = self._waiting and self._waiting()
        return earlier is not None and not earlier.done

    def wait(self) -> _Waiting:
        """Let a forward pass wait for its backward pass."""
        found = _Waiting()
        self._waiting = weakref.ref(found)
        return found

    def find(self, net: Fused, x: Tensor, forward: NetForward) -> tuple[Step, list[Tensor]] | str:
        """Return the step for ``x`` and the parameters that it trains, captured if there is none; or why there is none.

        Raises:
            Exception: what the net raises for ``x``.
        """
        self._calls += 1
        known = dict.fromkeys(kept.layers for kept in self._in_turn())
        layers = next(filter(Layers.hold, known), None) or Layers(net, training=True)
        if layers.obstacle:
            return layers.obstacle
        sources = layers.sources()
        tensors = [t for t in sources if t is not None]
        if self._places is None or not self._places.hold(tensors):
            self._drop()
            self._places = parameter_cache.Places(tensors)
        if self._full:
            return self._full
        layout = _layout(net, x)
        needs = tuple(map(_requires_grad, tensors))
        if not x.requires_grad and not any(needs):
            return "nothing requires a gradient"
        key = (needs, *_key(net, x, layout))
        kept = next((k for k in self._in_turn() if k.layers is layers and k.serves(key, sources)), None)
        if kept is None:
            refusal = self._make_room()
            if refusal:
                return refusal
            kept = self._capture(net, x, layout, forward, key, layers)
        kept.used, self._last = self._calls, self._kept.index(kept)
        if isinstance(kept.step, str):
            return kept.step
        return kept.step, [t for i in kept.trained if (t := sources[i]) is not None]

    def retry(self) -> None:
        """Forget which captures failed."""
        with self.lock:
            self._full, self._last = "", 0
            self._kept = [k for k in self._kept if isinstance(k.step, Step)]

    def _in_turn(self) -> list[_Kept]:
        return self._kept[self._last :] + self._kept[: self._last]

    def _drop(self) -> None:
        self._kept, self._last, self._full = [], 0, ""

    def _make_room(self) -> str:
        """Drop a step that is no longer used where too many are kept; return why another cannot be captured."""
        if len(self._kept) < GRAPHS:
            return ""
        oldest = min(self._kept, key=lambda kept: kept.used)
        if self._calls - oldest.used <= IDLE:
            return f"{GRAPHS} training steps are kept for other input shapes and settings of the net"
        self._kept.remove(oldest)
        self._last = 0
        return ""

    def _capture(
        self, net: Fused, x: Tensor, layout: torch.memory_format, forward: NetForward, key: Any, layers: Layers
    ) -> _Kept:
        steps = [k.step for k in self._kept if isinstance(k.step, Step)]
        shared = steps[0].recorder if steps else recorder.Recorder(x.device)
        handled = sys.exc_info()[1]  # the caller may run the net in an except clause
        sources = layers.sources()
        trained: list[int] = []
        still: list[int] = []
        step: Step | str
        try:
            step, trained, still = capture(net, x, layout, forward, shared, sources)
            record.count("cuda_graph", "capture")
        except NetError as error:
            raise error.cause from None
        except Exception as error:
            step = f"capturing the training step failed: {recorder.cause(error, handled)}"
            if _is_memory(error, handled):
                self._drop()
                self._full = f"{step}; call accelerate(model, cuda_graph=True) to try again"
        kept = _Kept(key, layers, step, trained, still)
        self._kept.append(kept)
        if self._full:
            del steps, shared
            recorder.Recorder.give_back()
        return kept


_anchors: WeakKeyDictionary[nn.Module, Tensor] = WeakKeyDictionary()
_lock = ForkSafeLock()


def _steps(net: nn.Module) -> _Steps:
    """Return the net's steps. They are in the cache, so that ``clear_derived`` and ``tune`` drop them."""
    with _lock:
        anchor = _anchors.setdefault(net, torch.empty(0))
    return parameter_cache.get((anchor,), "training steps", lambda _: _Steps())


def forget(net: nn.Module) -> None:
    """Drop the net's steps. The memory of each is freed once its last backward pass has ended."""
    _anchors.pop(net, None)


def retry(net: nn.Module) -> None:
    """Let the net's next calls try again what could not be captured."""
    if net in _anchors:
        _steps(net).retry()


def call(net: Fused, x: Tensor, forward: NetForward) -> Tensor | str:
    """Return the output of a replayed forward pass, captured if need be, or why there is none.

    Args:
        net: the net, in training mode.
        x: images (N, C, H, W) on the recorder's device.
        forward: runs the net in its first argument without graphs.
    """
    steps = _steps(net)
    with steps.lock:
        if steps.is_waited_for():
            return "the output of an earlier call still waits for its backward pass, which needs the graph's memory"
        found = steps.find(net, x, forward)
        if isinstance(found, str):
            return found
        waiting = steps.wait()
    step, parameters = found
    y: Tensor = _Replayed.apply(step, waiting, x, *parameters)
    return y


class _Replayed(torch.autograd.Function):
    """The node of a replayed training step in autograd's graph."""

    @staticmethod
    def forward(ctx: Any, step: Step, waiting: _Waiting, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.step, ctx.waiting = step, waiting
        # They are read where they are. Saving them makes autograd report a change between the passes, as for any layer.
        ctx.save_for_backward(*parameters)
        return step.forward(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        parameters = ctx.saved_tensors
        if ctx.waiting.begun:
            raise BackendError(
                "expected one backward pass for each forward pass of a training step in CUDA graphs, got a second "
                "(retain_graph=True); add the losses before backward(), or call accelerate(model) without cuda_graph"
            )
        ctx.waiting.begun = True
        try:
            with torch.no_grad():
                grads: Any = ctx.step.backward(dy)
        finally:  # not earlier: a capture locks the recorder and waits for the thread that this may run in
            ctx.waiting.done = True
        if torch.is_grad_enabled():
            grads = _once(grads)
        return (None, None, *([None] if len(grads) == len(parameters) else []), *grads)


def _once(grads: list[Tensor]) -> tuple[Tensor, ...]:
    """Return gradients that cannot be differentiated again (``create_graph=True``)."""
    text = (
        b"expected a first derivative of a training step in CUDA graphs, got a request to differentiate it again "
        b"(double backward); call accelerate(model) without cuda_graph"
    )
    found = torch._C._functions.DelayedError(text, len(grads))(*[g.requires_grad_() for g in grads])
    return found if isinstance(found, tuple) else (found,)


def _layout(net: Fused, x: Tensor) -> torch.memory_format:
    """Return the layout of the static input: where the net would convert its input to NHWC, the copy does so."""
    comes_nhwc = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    nhwc = comes_nhwc or select.trains_nhwc(x.device, x.dtype, net.backend)
    return torch.channels_last if nhwc else torch.contiguous_format


def _key(net: Fused, x: Tensor, layout: torch.memory_format) -> tuple[Any, ...]:
    """Return what a step depends on, apart from the net."""
    call = (x.shape, layout, x.dtype, x.device, x.requires_grad, autocast_dtype(x))
    return (*call, select.requested(net.backend), catalog.fingerprint(), flags.PROLOGUE.read(), switches())


def _is_memory(error: BaseException | None, handled: BaseException | None) -> bool:
    """Return whether the GPU's memory did not suffice."""
    while error is not None and error is not handled:
        if isinstance(error, torch.OutOfMemoryError):
            return True
        error = error.__context__
    return False
