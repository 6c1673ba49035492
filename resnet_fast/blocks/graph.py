"""Calls of a net from CUDA graphs, for ``accelerate(model, cuda_graph=True)``: which calls, and what the others do.

A small batch leaves a GPU waiting for Python between launches; a replay submits all of them at once. A graph repeats
addresses, not meaning, so it may only run while everything that Python would read is as it was at the recording:

* parameters, buffers: :mod:`.inference_graph` and :mod:`.training_graph` say which changes are seen;
* layers: :class:`~.snapshot.Layers` compares their types, the forwards of the types, order, attributes and modes;
* the call: shape, dtype, layout, device, backend, autocast and torch's numerical switches are the key of a graph.

After any change the next call records again. Every call returns a tensor of its own.

==============================================  =====================================================================
call of a net with ``cuda_graph=True``          what happens
==============================================  =====================================================================
eval, no autograd, CUDA input                   a replay; the first with this key warms up and records before it
training mode, autograd on, CUDA input          the same, forward and backward pass; inference's graphs are dropped,
                                                because a step changes what they were made from
torch.compile, export, trace, script, fx, meta  eager: a tracer sees the layers
dispatch mode, ``explain``, ``tune``            eager: they observe each operation
inside a capture of the caller's                eager: the launches become part of the caller's graph
autograd on in eval, torch.func, forward AD,    eager, counted as a fallback (logged as information)
global hook, empty batch
autograd off in training mode, a checkpoint or  eager, counted as a fallback (logged as information)
other saved-tensor hooks, anomaly detection
training while an earlier output waits for its  eager, counted as a fallback (logged as a warning)
backward pass, or with too many input shapes
an inner layer with a hook or a replaced        eager, counted as a fallback (logged as a warning); a class of the
forward, in training mode (in eval), or of a    user's own might behave differently at each call
class that no library defines
SyncBatchNorm or a norm with momentum None in   eager, counted as a fallback (logged as a warning)
training, FSDP2
function mode, subclass, replica of             eager, counted as a fallback (logged as a warning)
DataParallel, failed capture
input that is not on a GPU                      BackendError
==============================================  =====================================================================

A failed capture is not repeated for the same key until something changes. If the memory does not suffice to capture
training, the net's graphs are dropped and it trains eagerly until ``accelerate`` is called again. An evaluation between
training steps leaves the training's graphs as they are, and makes its own once. Parts of a net (a stage,
``forward_features``) that are called by themselves run eagerly. Only a flag is stored on the module.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..dispatch import record
from ..errors import BackendError
from . import inference_graph, recorder, training_graph, training_step
from .fused import Fused
from .obstacles import untraceable

FLAG = "_resnet_fast_cuda_graph"
"""Set in the ``__dict__`` of a net whose calls are replayed."""

_off: ContextVar[bool] = ContextVar("resnet_fast_graphs_off", default=False)


@contextmanager
def off() -> Iterator[None]:
    """Inside the ``with``, this thread runs nets without graphs. Those of training are kept."""
    before = _off.set(True)
    try:
        yield
    finally:
        _off.reset(before)


def forget(net: nn.Module) -> None:
    """Drop the net's graphs. Their memory is freed once the last replay has ended."""
    inference_graph.forget(net)
    training_graph.forget(net)


def run(net: Fused, x: Tensor, forward: training_step.NetForward) -> Tensor:
    """Return ``forward(net, x)``, replayed from a graph where the table above allows it.

    Args:
        net: the net.
        x: images (N, C, H, W).
        forward: runs the net in its first argument without graphs.

    Raises:
        BackendError: ``x`` is not on a GPU, or strict mode met a call that cannot be replayed.
    """
    training = net.training
    if training:
        inference_graph.forget(net)
    observed = _off.get() or torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack() or record.watched()
    if observed or not isinstance(x, Tensor) or x.is_meta or x.dim() != 4:
        return forward(net, x)
    device = recorder.Recorder.device_type
    if x.device.type != device:
        raise BackendError(
            f"cuda_graph=True was asked for: expected an input on {device}, got one on {x.device}; "
            "move the model and its input there, or call accelerate(model) without cuda_graph"
        )
    quiet = _training_course(x) if training else _normal_course(x)
    found: Tensor | str = quiet or _call_obstacle(net, x)
    if not found:
        if recorder.Recorder.is_recording():
            return forward(net, x)
        found = training_graph.call(net, x, forward) if training else _infer(net, x, forward)
    if isinstance(found, Tensor):
        record.count("cuda_graph", "replay")
        return found
    record.fall_back(f"the net runs without its CUDA graph: {found}", quiet=bool(quiet))
    return forward(net, x)


def _infer(net: Fused, x: Tensor, forward: training_step.NetForward) -> Tensor | str:
    """Return the output of a replayed inference, captured if need be, or why there is none."""
    found = inference_graph.find(net, x, lambda x: forward(net, x))
    return found if isinstance(found, str) else found.replay(x)


def _training_course(x: Tensor) -> str:
    """Return why a call in training runs eagerly that is not expected to be replayed; empty if it may be replayed."""
    if not torch.is_grad_enabled():
        return "autograd is off in training mode"
    if torch._C._current_graph_task_id() != -1:
        return "it runs inside a backward pass, as a checkpoint's recomputation does"
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return "saved-tensor hooks are set (checkpointing, save_on_cpu), which a replay would not run"
    if torch.is_anomaly_enabled():
        return "anomaly detection is on, which looks at each operation"
    if x.is_inference():
        return "the input was made in inference mode"
    return _common_course(x)


def _normal_course(x: Tensor) -> str:
    """Return why a call runs eagerly that is not expected to be replayed; empty if it may be replayed."""
    if torch.is_grad_enabled():
        return "autograd is on; wrap inference in torch.inference_mode()"
    return _common_course(x)


def _common_course(x: Tensor) -> str:
    """Return the same for what neither inference nor training is replayed under."""
    if forward_ad._current_level >= 0:
        return "forward-mode autograd is on"
    return untraceable(x) or ("" if x.numel() else "the batch is empty")


def _call_obstacle(net: Fused, x: Tensor) -> str:
    """Return why a call that looks like plain inference or training cannot be replayed; empty if it can."""
    if type(x) is not Tensor:
        return f"expected a plain Tensor, got {type(x).__name__}"
    if torch._C._len_torch_function_stack():
        return "a torch function mode is on (torch.set_default_device sets one), which a replay would skip"
    if "_is_replica" in net.__dict__:
        return "DataParallel makes a new copy of the net for each call; use a process per GPU"
    if net.has_other_methods():
        return "a method of the net was replaced, which a replay would not run"
    return net.watched.changed()
