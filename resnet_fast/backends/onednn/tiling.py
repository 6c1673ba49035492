"""How many images of a large batch to send through a whole net at a time.

On a CPU the activations of a large batch fall out of the last-level cache, and blocks above 32 MiB are returned to the
system after each use, so that every layer pays page faults again (docs/notes/batch-tiling.md). A tile whose largest
activation fits twice (input and output of a layer) avoids both.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path


def tile(largest: int, itemsize: int) -> int:
    """Images at a time, where the largest activation of an image has ``largest`` elements of ``itemsize`` bytes.

    At least 4 bytes count per element, for a CPU may run 16-bit tensors in fp32.
    """
    return max(1, last_level_cache() // (2 * largest * max(itemsize, 4)))


@cache
def last_level_cache() -> int:
    """Bytes of the CPU's last-level cache as Linux reports it; 32 MiB where it does not."""
    try:
        sizes = [p.read_text().strip() for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
        return max(int(s[:-1]) * {"K": 1 << 10, "M": 1 << 20}[s[-1]] for s in sizes)
    except (OSError, ValueError, KeyError):
        return 32 << 20
