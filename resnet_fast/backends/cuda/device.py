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
def shared_memory() -> int:
    """Return the bytes of shared memory per block: the minimum over the GPUs here, or an H100's without a GPU."""
    if EMULATED or not torch.cuda.is_available():
        gpu = stands_for().gpu
        assert gpu is not None
        return gpu.shared_per_block
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return min(p.shared_memory_per_block_optin for p in properties)  # type: ignore[attr-defined]
