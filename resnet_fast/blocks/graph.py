"""Calls of a net from CUDA graphs, for ``accelerate(model, cuda_graph=True)``: which calls, and what the others do.

A small batch leaves a GPU waiting for Python between launches; a replay submits all of them at once. A graph repeats
addresses, not meaning, so it may only run while everything that Python would read is as it was at the recording:

* parameters, buffers: :mod:`.inference_graph` says which changes are seen;
* layers: :class:`~.snapshot.Layers` compares their types, the forwards of the types, order, attributes and modes;
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

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..dispatch import record
from ..errors import BackendError
from . import inference_graph, recorder
from .fused import Fused
from .inference_graph import forget
from .obstacles import untraceable

__all__ = ["FLAG", "forget", "run"]

FLAG = "_resnet_fast_cuda_graph"
"""Set in the ``__dict__`` of a net whose inference is replayed."""


def run(net: Fused, x: Tensor, eager: recorder.Forward) -> Tensor:
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
    device = recorder.Recorder.device_type
    if x.device.type != device:
        raise BackendError(
            f"cuda_graph=True was asked for: expected an input on {device}, got one on {x.device}; "
            "move the model and its input there, or call accelerate(model) without cuda_graph"
        )
    quiet = _normal_course(x)
    found: inference_graph.Graph | str = quiet or _call_obstacle(net, x)
    if not found:
        if recorder.Recorder.is_recording():
            return eager(x)
        found = inference_graph.find(net, x, eager)
    if isinstance(found, inference_graph.Graph):
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
