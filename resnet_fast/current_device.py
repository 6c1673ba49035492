"""Make the GPU of a call's tensors the thread's current device while a backend works on the call.

Triton's launches, streams, events and handles of libraries belong to CUDA's current device, not to that of the tensors
that a kernel reads. PyTorch's own operators enter the device of their tensors; whoever launches anything else must.
:mod:`resnet_fast.impl` wraps every function of a backend in :func:`on_device_of_call`, so backends need not.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any

import torch


def on_device_of_call(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function``, whose first argument is a call, so that it runs with the device of ``call.x`` current.

    The previous device is current again afterwards, also if the function raises. A call on the CPU, and one on the
    device that is current already, cost one look at the tensor and no change of device.
    """

    @wraps(function)
    def run(call: Any, *arguments: Any) -> Any:
        index = call.x.get_device()
        if index < 0:  # the CPU, or a tensor without memory
            return function(call, *arguments)
        before = torch.cuda._exchange_device(index)
        if before == index:
            return function(call, *arguments)
        try:
            return function(call, *arguments)
        finally:
            torch.cuda._maybe_exchange_device(before)  # makes no context on a device that has none

    return run


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which ``device`` is the thread's current device; one that does nothing for a CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def numbered(device: torch.device) -> torch.device:
    """Return ``device`` with its index: ``cuda`` means the device that is current now, and may mean another later."""
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device())
