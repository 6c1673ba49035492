"""A net's inference as one CUDA graph per input shape.

    x --copy--> static x --[ every launch of the net, recorded once ]--> static y --clone--> y

The graphs are kept in :mod:`resnet_fast.parameter_cache`, whose stamps see every change of parameters and buffers that
PyTorch counts, ``load_state_dict``, ``.to()``. On the GPU a write through ``.data`` is not detected, and BatchNorm's
update of its statistics is detected by its batch counter only. In autocast a graph contains the casts of the weights
that stock layers read, and none that autocast keeps. :mod:`.graph` lists the calls that are replayed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .. import parameter_cache
from ..dispatch import catalog, record, select
from ..locks import ForkSafeLock
from . import recorder
from .frozen import is_frozen
from .fused import Fused
from .snapshot import Layers, autocast_dtype, switches

GRAPHS = 8
"""Graphs kept per net; the least recently used is dropped first. Their intermediate tensors share memory."""


class Graph:
    """A recorded graph, its static input (N, C, H, W) and output, and what else its launches read."""

    def __init__(self, shared: recorder.Recorder, launch: Callable[[], None], x: Tensor, y: Tensor, reads: list[Any]):
        self.recorder = shared
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


_layers: WeakKeyDictionary[nn.Module, Layers] = WeakKeyDictionary()
_lock = ForkSafeLock()


def forget(net: nn.Module) -> None:
    """Drop the net's graphs. Their memory is freed once the last replay has ended."""
    _layers.pop(net, None)


def forget_changed(net: nn.Module) -> None:
    """Drop the net's graphs if a layer is not as it was, or a parameter not the object that it was."""
    layers = _layers.get(net)
    if layers is not None and not (layers.hold() and layers.same_tensors()):
        forget(net)


def find(net: Fused, x: Tensor, eager: recorder.Forward) -> Graph | str:
    """Return the graph for ``x`` and the current net, recorded if there is none, or why it cannot be recorded."""
    frozen = is_frozen(net)
    with _lock:
        layers = _layers.get(net)
        if layers is None or not (frozen or (layers.hold() and layers.same_tensors())):
            layers = Layers(net)
            if layers.obstacle:
                forget(net)
                return layers.obstacle
            _layers[net] = layers
    # Where the net would convert its input to NHWC, the copy into the static input does so.
    comes_nhwc = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    backend, fingerprint = select.requested(net.backend), catalog.fingerprint()
    nhwc = comes_nhwc or _prefers_nhwc(x.device, backend, fingerprint)
    layout = torch.channels_last if nhwc else torch.contiguous_format
    key = (x.shape, layout, x.dtype, x.device, autocast_dtype(x), backend, fingerprint, switches())
    make = partial(_record, x, layout, eager, layers.kept_sources)
    return parameter_cache.get(layers.kept_sources, key, make, GRAPHS, layers.entry(), frozen)


@lru_cache
def _prefers_nhwc(device: torch.device, backend: str, fingerprint: tuple[bool, ...]) -> bool:
    return select.prefers_nhwc(device, backend)


def _record(
    x: Tensor,
    layout: torch.memory_format,
    eager: recorder.Forward,
    sources: tuple[Tensor | None, ...],
    kept: dict[Any, Any],
) -> Graph | str:
    """Return a graph of ``eager`` for inputs like ``x``, or why the capture failed. Raise errors of the warm-up."""
    others = [graph.recorder for graph in kept.values() if isinstance(graph, Graph)]
    shared = others[0] if others else recorder.Recorder(x.device)
    handled = sys.exc_info()[1]  # the caller may run the net in an except clause
    # A later call under no_grad could not write to inference tensors.
    with torch.inference_mode(False), torch.no_grad(), recorder.no_autocast_cache():
        static = shared.warm_up(eager, x, layout)
        try:
            launch, y = shared.capture(eager, static)
        except Exception as error:
            return f"capturing it failed: {recorder.cause(error, handled)}"
    if not isinstance(y, Tensor):
        return f"expected the net to return a tensor, got {type(y).__name__}"
    record.count("cuda_graph", "capture")
    return Graph(shared, launch, static, y, _read_by_net(sources[1:]))


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
