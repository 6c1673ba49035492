"""Describe the GPUs of this machine, or the emulated one, to choose kernels."""

from __future__ import annotations

from functools import cache

import torch

from ... import devices, flags

EMULATED = flags.EMULATE.enabled()
"""Whether this process runs the kernels in the emulator. Read when the backend is loaded."""


def stands_for() -> devices.Device:
    """Return the GPU that the emulator simulates."""
    return devices.gpu("h100")


@cache
def shared_memory(device: torch.device) -> int:
    """Return the bytes of shared memory per block of a device; an H100's for the emulator."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]
    gpu = stands_for().gpu
    assert gpu is not None
    return gpu.shared_per_block


@cache
def least_shared_memory() -> int:
    """Return the minimum over the GPUs here, or an H100's without a GPU: what a problem may need on any of them."""
    count = 0 if EMULATED or not torch.cuda.is_available() else torch.cuda.device_count()
    here = [torch.device("cuda", i) for i in range(count)] or [torch.device("cpu")]
    return min(map(shared_memory, here))
