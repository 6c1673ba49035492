"""Find the ceilings and the tuning table of a torch device."""

from __future__ import annotations

from functools import cache

import torch

from ... import devices
from ...devices import Device
from ...tuning import tables
from .launch import INTERPRETED


@cache
def device_of(device: torch.device) -> Device:
    """Return the ceilings of ``device``: a known GPU's, or the H100's scaled to the multiprocessors of an unknown one.

    The interpreter gets the plans of an H100, so that tests run what an H100 would run.
    """
    if INTERPRETED:
        return devices.gpu("h100")
    properties = torch.cuda.get_device_properties(device)
    known = devices.detect(properties.name)
    return known or devices.unknown_gpu(
        properties.name,
        arch=10 * properties.major + properties.minor,
        sms=properties.multi_processor_count,
        shared_per_sm=properties.shared_memory_per_multiprocessor,
        shared_per_block=properties.shared_memory_per_block_optin,  # type: ignore[attr-defined]
        l2_bytes=properties.L2_cache_size,
    )


@cache
def table_of(device: torch.device) -> tables.Table:
    """Return what was measured on ``device``; an empty table in the interpreter."""
    if INTERPRETED:
        return tables.Table("Triton interpreter")
    return tables.load(torch.cuda.get_device_name(device))
