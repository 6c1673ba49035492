"""The GPUs of this machine, or the one that the emulator stands for, as far as kernels are chosen by them."""

from __future__ import annotations

from functools import cache

import torch

from ... import devices, flags

EMULATED = flags.EMULATE.enabled()
"""Does this process run the kernels in the emulator? Decided when the backend is loaded, as it decides on devices."""


def stands_for() -> devices.Device:
    """The GPU that the emulator counts for."""
    return devices.gpu("h100")


@cache
def shared_memory() -> int:
    """Bytes of shared memory that a block may have, on the GPU here that has the fewest; an H100's without a GPU."""
    if EMULATED or not torch.cuda.is_available():
        gpu = stands_for().gpu
        assert gpu is not None
        return gpu.shared_per_block
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return min(p.shared_memory_per_block_optin for p in properties)  # type: ignore[attr-defined]
