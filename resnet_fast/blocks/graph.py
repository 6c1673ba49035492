"""A net's inference as one CUDA graph per input shape, for ``accelerate(model, cuda_graph=True)``.

    x --copy--> static x --[ every launch of the net, recorded once ]--> static y --clone--> y

A small batch leaves a GPU waiting for Python between launches; a replay submits all of them at once. A graph repeats
addresses, not meaning, so it may only run while everything that Python would read is as it was at the recording:

* parameters, buffers: the graphs are kept in :mod:`resnet_fast.parameter_cache`, whose stamps see every change that
  PyTorch counts, ``load_state_dict``, ``.to()``. On the GPU a write through ``.data`` is not detected, and BatchNorm's
  update of its statistics is detected by its batch counter only;
* layers: :class:`Layers` compares their types, the forwards of the types, order, attributes and modes;
* the call: shape, dtype, layout, device, backend and torch's numerical switches are the key of a graph.

After any change the next call records again. Every call returns a tensor of its own.

==============================================  =====================================================================
call of a net with ``cuda_graph=True``          what happens
==============================================  =====================================================================
eval, no autograd, CUDA input                   a replay; the first with this key warms up and records before it
training mode                                   eager; the graphs are dropped, because training needs the memory
torch.compile, export, trace, script, fx, meta  eager: a tracer sees the layers
dispatch mode, ``explain``, ``tune``            eager: they observe each operation
inside a capture of the caller's                eager: the launches become part of the caller's graph
autograd on in eval, torch.func, forward AD,    eager, counted as a fallback (logged as information)
global hook, empty batch
an inner layer with a hook or a replaced        eager, counted as a fallback (logged as a warning); a class of the
forward, in training mode, or of a class that   user's own might behave differently at each call
no library defines
autocast, function mode, Tensor subclass,       eager, counted as a fallback (logged as a warning)
replica of DataParallel, failed capture
input that is not on a GPU                      BackendError
==============================================  =====================================================================

A failed capture is not repeated for the same key until something changes. Parts of a net (a stage,
``forward_features``) that are called by themselves run eagerly. Only a flag is stored on the module.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from operator import attrgetter, itemgetter
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from .. import parameter_cache
from ..dispatch import catalog, record, select
from ..errors import BackendError
from ..locks import ForkSafeLock
from . import pristine
from .fused import Fused
from .obstacles import is_altered, untraceable

FLAG = "_resnet_fast_cuda_graph"
"""Set in the ``__dict__`` of a net whose inference is replayed."""

GRAPHS = 8
"""Graphs kept per net; the least recently used is dropped first. Their intermediate tensors share memory."""

WARM_UPS = 3
"""Eager runs before a capture, during which nothing may compile, load a kernel or choose an algorithm."""

Forward = Callable[[Tensor], Tensor]

_LIBRARIES = ("torch.nn.modules.", "torchvision.", "timm.", "resnet_fast.")
"""Modules with layers that, in eval, compute the same from the same tensors and attributes."""

_forward = attrgetter("forward")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_PLAIN = (bool, int, float, str, tuple, type(None))


class Recorder:
    """The CUDA side of the graphs of one net with one set of weights.

    The graphs share a memory pool: a replay overwrites what another left in it, so replays take turns.
    """

    device_type: ClassVar[str] = "cuda"

    def __init__(self, device: torch.device):
        self.device = device
        self._stream = torch.cuda.Stream(device)
        self._pool: Any = None
        self._last_use = torch.cuda.Event()
        self._lock = ForkSafeLock()

    @staticmethod
    def is_recording() -> bool:
        """Return whether the current stream is being captured."""
        return torch.cuda.is_current_stream_capturing()

    def warm_up(self, fn: Forward, x: Tensor, layout: torch.memory_format) -> Tensor:
        """Run ``fn`` on a side stream, as a capture requires, and return its static input (N, C, H, W)."""
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                # Not during the capture: in deterministic mode filling new memory would become part of the graph.
                static = torch.empty_like(x, memory_format=layout)
                static.copy_(x)
                for _ in range(WARM_UPS):
                    fn(static)
        finally:
            current.wait_stream(self._stream)
        return static

    def capture(self, fn: Forward, x: Tensor) -> tuple[Callable[[], None], Tensor]:
        """Record ``fn(x)``. Return the function that launches it and the tensor that receives its result."""
        graph = torch.cuda.CUDAGraph()
        try:
            with self._recording(graph):
                # cuBLAS keeps a workspace per stream. Eager work on the same stream would write to it during a replay,
                # and any caller may free it. If it is cleared, cuBLAS allocates a new one from the pool.
                torch._C._cuda_clearCublasWorkspaces()
                try:
                    y = fn(x)
                finally:
                    torch._C._cuda_clearCublasWorkspaces()
        except Exception:
            # After a failed capture torch 2.11 still records random numbers, and every later torch.rand on the GPU
            # raises. A capture that succeeds resets that state.
            with self._recording(torch.cuda.CUDAGraph()):
                torch.zeros(1, device=self.device)
            raise
        self._pool = graph.pool()
        return graph.replay, y

    @contextmanager
    def _recording(self, graph: torch.cuda.CUDAGraph) -> Iterator[None]:
        # The outer context restores the caller's stream, which a failed capture does not. thread_local: a data loader
        # or another request may allocate at the same time.
        with (
            torch.cuda.stream(self._stream),
            torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
        ):
            yield

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Inside the ``with``, only this thread uses the static buffers, and its stream waits for their last use."""
        with self._lock:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(self._last_use)
            try:
                yield
            finally:
                self._last_use.record(stream)

    def drain(self) -> None:
        """Wait for the last replay on any stream."""
        if not sys.is_finalizing() and not self.is_recording():  # a capture may not wait
            self._last_use.synchronize()


class Graph:
    """A recorded graph, its static input (N, C, H, W) and output, and what else its launches read."""

    def __init__(self, recorder: Recorder, launch: Callable[[], None], x: Tensor, y: Tensor, reads: list[Any]):
        self.recorder = recorder
        self._launch, self._x, self._y, self._reads = launch, x, y, reads

    def replay(self, x: Tensor) -> Tensor:
        """Return the net's output for ``x`` in a new tensor."""
        with self.recorder.turn():
            self._x.copy_(x)
            self._launch()
            return self._y.clone()

    def __del__(self) -> None:
        # The memory returns to the stream that allocated it, while replays may still run on other streams.
        self.recorder.drain()


class Layers:
    """A snapshot of a net's inner layers. Graphs belong to a snapshot and are dropped with it when a layer changes.

    The net's own hooks run around its forward, and its own attributes decide nothing in eval, so neither is included.

    Attributes:
        obstacle: why such a net cannot be recorded; empty if it can.
    """

    def __init__(self, net: nn.Module):
        named = [(name, m) for name, m in net.named_modules() if m is not net]
        self.obstacle = next(
            filter(None, (_layer_obstacle(name, m) for name, m in named)), _function_of("the net", net)
        )
        self._own = net.__dict__
        self._modules = [m for _, m in named]
        self._types = list(map(type, self._modules))
        self._classes = list(dict.fromkeys(self._types))
        self._forwards = list(map(_forward, self._classes))
        self._fields = [m.__dict__ for m in self._modules]
        self._sizes = list(map(len, self._fields))
        self._hooks = [fields[kind] for fields in self._fields for kind in _HOOKS]
        plain = [[name for name, value in fields.items() if type(value) in _PLAIN] for fields in self._fields]
        self._getters = [(itemgetter(*names), fields) for names, fields in zip(plain, self._fields, strict=True)]
        self._values = [getter(fields) for getter, fields in self._getters]
        self._children = [fields["_modules"] for fields in (net.__dict__, *self._fields)]
        self._members = [dict(children) for children in self._children]
        self._tensors = [
            fields[kind] for fields in (net.__dict__, *self._fields) for kind in ("_parameters", "_buffers")
        ]
        # The first source in the cache: no other call's sources start with it, and the graphs are dropped with it.
        self._anchor = torch.empty(0)

    def hold(self) -> bool:
        """Return whether the layers are unchanged. Compare lists: this runs for every layer at every call."""
        try:
            values = [getter(fields) for getter, fields in self._getters]
        except KeyError:
            return False
        return (
            values == self._values
            and not any(self._hooks)
            and list(map(len, self._fields)) == self._sizes  # a new attribute, for example a replaced forward
            and self._own["_modules"].keys().isdisjoint(self._own)  # a plain attribute hides a child of its name
            and list(map(type, self._modules)) == self._types
            and list(map(_forward, self._classes)) == self._forwards
            and self._children == self._members
        )

    def sources(self) -> tuple[Tensor | None, ...]:
        """Return the anchor and all current parameters and buffers."""
        return (self._anchor, *chain.from_iterable([tensors.values() for tensors in self._tensors]))


_layers: WeakKeyDictionary[nn.Module, Layers] = WeakKeyDictionary()
_lock = ForkSafeLock()


def forget(net: nn.Module) -> None:
    """Drop the net's graphs. Their memory is freed once the last replay has ended."""
    _layers.pop(net, None)


def run(net: Fused, x: Tensor, eager: Forward) -> Tensor:
    """Return ``eager(x)``, replayed from a graph where the table above allows it.

    Args:
        net: the net that ``eager`` runs.
        x: images (N, C, H, W).
        eager: the net's forward without graphs.

    Raises:
        BackendError: ``x`` is not on a GPU, or strict mode met a call that cannot be replayed.
    """
    if net.training:
        forget(net)
        return eager(x)
    observed = torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack() or record.watched()
    if observed or not isinstance(x, Tensor) or x.is_meta or x.dim() != 4:
        return eager(x)
    if x.device.type != Recorder.device_type:
        raise BackendError(
            f"cuda_graph=True was asked for: expected an input on {Recorder.device_type}, got one on {x.device}; "
            "move the model and its input there, or call accelerate(model) without cuda_graph"
        )
    quiet = _normal_course(x)
    found: Graph | str = quiet or _call_obstacle(net, x)
    if not found:
        if Recorder.is_recording():
            return eager(x)
        found = _graph(net, x, eager)
    if isinstance(found, Graph):
        record.count("cuda_graph", "replay")
        return found.replay(x)
    record.fall_back(f"the net runs without its CUDA graph: {found}", quiet=bool(quiet))
    return eager(x)


def _normal_course(x: Tensor) -> str:
    """Return why a call runs eagerly that is not expected to be replayed; empty if it may be replayed."""
    if torch.is_grad_enabled():
        return "autograd is on; wrap inference in torch.inference_mode()"
    if forward_ad._current_level >= 0:
        return "forward-mode autograd is on"
    return untraceable(x) or ("" if x.numel() else "the batch is empty")


def _call_obstacle(net: Fused, x: Tensor) -> str:
    """Return why a call that looks like inference cannot be replayed; empty if it can."""
    if type(x) is not Tensor:
        return f"expected a plain Tensor, got {type(x).__name__}"
    if torch.is_autocast_enabled(x.device.type):
        return "autocast is on, which casts by Python's state at each call; convert the model and its input instead"
    if torch._C._len_torch_function_stack():
        return "a torch function mode is on (torch.set_default_device sets one), which a replay would skip"
    if "_is_replica" in net.__dict__:
        return "DataParallel makes a new copy of the net for each call; use a process per GPU"
    if net.has_other_methods():
        return "a method of the net was replaced, which a replay would not run"
    return net.watched.changed()


def _layer_obstacle(name: str, m: nn.Module) -> str:
    """Return why a net with this layer cannot be recorded; empty if it can."""
    cls = type(m)
    if is_altered(m):
        return f"{name} has a hook or a replaced forward, which a replay would not run"
    if cls.forward is not nn.Module.forward and not pristine.is_own(cls, "forward", cls.forward):
        return f"the forward of {name}'s class was replaced, which a replay would not run"
    if m.training:
        return f"{name} is in training mode; call eval() on the whole net"
    if not cls.__module__.startswith(_LIBRARIES):
        return f"{name} is a {cls.__module__}.{cls.__qualname__}, whose Python code a replay would not run"
    return _function_of(name, m) if isinstance(m, Fused) else ""


def _function_of(name: str, m: nn.Module) -> str:
    """Return the sentence for a function in place of a child, which may change undetected; empty if there is none."""
    for attribute, value in m.__dict__.items():
        if attribute != "forward" and callable(value) and not isinstance(value, type):
            return f"{attribute} of {name} is a function, which a replay would not run"
    return ""


def _graph(net: Fused, x: Tensor, eager: Forward) -> Graph | str:
    """Return the graph for ``x`` and the current net, recorded if there is none, or why it cannot be recorded."""
    with _lock:
        layers = _layers.get(net)
        if layers is None or not layers.hold():
            layers = Layers(net)
            if layers.obstacle:
                forget(net)
                return layers.obstacle
            _layers[net] = layers
    sources = layers.sources()
    # Where the net would convert its input to NHWC, the copy into the static input does so.
    comes_nhwc = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    nhwc = comes_nhwc or select.prefers_nhwc(x.device.type, net.backend)
    layout = torch.channels_last if nhwc else torch.contiguous_format
    key = (x.shape, layout, x.dtype, x.device, select.requested(net.backend), catalog.fingerprint(), _switches())
    return parameter_cache.get(sources, key, lambda kept: _record(x, layout, eager, sources, kept), GRAPHS)


def _switches() -> tuple[Any, ...]:
    """Return torch's process-wide settings that decide which kernels its own layers use."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    return (
        cudnn.enabled,
        cudnn.benchmark,
        cudnn.deterministic,
        cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
        matmul.fp32_precision,
        matmul.allow_fp16_reduced_precision_reduction,
        matmul.allow_bf16_reduced_precision_reduction,
        torch.are_deterministic_algorithms_enabled(),
    )


def _record(
    x: Tensor, layout: torch.memory_format, eager: Forward, sources: tuple[Tensor | None, ...], kept: dict[Any, Any]
) -> Graph | str:
    """Return a graph of ``eager`` for inputs like ``x``, or why the capture failed. Raise errors of the warm-up."""
    recorders = [graph.recorder for graph in kept.values() if isinstance(graph, Graph)]
    recorder = recorders[0] if recorders else Recorder(x.device)
    handled = sys.exc_info()[1]  # the caller may run the net in an except clause
    # A later call under no_grad could not write to inference tensors.
    with torch.inference_mode(False), torch.no_grad():
        static = recorder.warm_up(eager, x, layout)
        try:
            launch, y = recorder.capture(eager, static)
        except Exception as error:
            return f"capturing it failed: {_cause(error, handled)}"
    if not isinstance(y, Tensor):
        return f"expected the net to return a tensor, got {type(y).__name__}"
    record.count("cuda_graph", "capture")
    return Graph(recorder, launch, static, y, _read_by_net(sources[1:]))


def _read_by_net(tensors: tuple[Tensor | None, ...]) -> list[Any]:
    """Return the memory of parameters and buffers, and everything derived from them.

    The cache may drop a plan for one input size with its tensors while a graph still reads them.
    """
    found: list[Any] = []
    for t in tensors:
        if t is not None:
            found.append(t.untyped_storage())
            found += parameter_cache.values_of(t)
    return found


def _cause(error: BaseException, handled: BaseException | None) -> str:
    """Return the first error after ``handled`` in one line. The error of ending a failed capture says little."""
    while error.__context__ is not None and error.__context__ is not handled:
        error = error.__context__
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
