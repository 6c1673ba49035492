"""Every environment switch: name, type, default, meaning. A value that cannot be read is an error, never a default.

Read at the time of use, so that a test (or a notebook) may change ``os.environ`` after the import.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from .errors import UserError

BACKENDS = ("auto", "reference", "onednn", "triton", "cuda")
"""The names that a backend can be asked for by; ``auto`` lets dispatch choose."""


@dataclass(frozen=True)
class Flag:
    """One environment switch. ``choices`` are the accepted values, in lower case."""

    name: str
    default: str
    choices: tuple[str, ...]
    meaning: str

    def read(self) -> str:
        """The current value. Raises UserError where the variable holds anything but one of ``choices``."""
        raw = os.environ.get(self.name)
        if raw is None or raw == "":
            return self.default
        value = raw.strip().lower()
        if value not in self.choices:
            raise UserError(
                f"{self.name} to be one of {', '.join(self.choices)}", repr(raw), f"unset it for {self.default!r}"
            )
        return value

    def enabled(self) -> bool:
        """For the on/off switches: is it ``1``?"""
        return self.read() == "1"


BACKEND = Flag(
    "RESNET_FAST_BACKEND",
    "auto",
    BACKENDS,
    "backend of every op; a name other than auto succeeds or fails, never degrades",
)
STRICT = Flag(
    "RESNET_FAST_STRICT", "0", ("0", "1"), "1: an automatic fallback to stock PyTorch raises instead of being logged"
)
BATCH_TILE = Flag(
    "RESNET_FAST_BATCH_TILE",
    "1",
    ("0", "1"),
    "1: on the CPU, large eval batches run in tiles that stay in the last-level cache",
)
TF32 = Flag(
    "RESNET_FAST_TF32",
    "0",
    ("0", "1"),
    "1: Triton's float32 convolutions round their operands to TF32 (10 mantissa bits) for the tensor cores",
)
PROLOGUE = Flag(
    "RESNET_FAST_PROLOGUE",
    "packed",
    ("packed", "exact"),
    "how Triton's training kernels apply BatchNorm to 16-bit inputs: in 16-bit pairs, or in fp32 and slower",
)
EMULATE = Flag(
    "RESNET_FAST_EMULATE",
    "0",
    ("0", "1"),
    "1: the CUDA kernels run on CPU tensors in the emulator, checked and slow; set before the first call",
)
DEBUG = Flag("RESNET_FAST_DEBUG", "0", ("0", "1"), "1: the command line shows tracebacks")

ALL = (BACKEND, STRICT, BATCH_TILE, TF32, PROLOGUE, EMULATE, DEBUG)

CACHE = "RESNET_FAST_CACHE"
"""Folder of what tuning measured; by default ``resnet_fast`` in XDG_CACHE_HOME, or in ``~/.cache``."""


LIBRARY = "RESNET_FAST_LIBRARY"
"""File of a native library to load in place of the package's own: one that was built out of tree."""


def cache_folder() -> Path:
    """The folder that :data:`CACHE` names, or the default. It need not exist."""
    named = os.environ.get(CACHE)
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "resnet_fast"


def check_backend(name: str) -> str:
    """``name`` itself if it is a backend's name. Raises UserError otherwise."""
    if name not in BACKENDS:
        raise UserError(f"a backend among {', '.join(BACKENDS)}", repr(name), "use 'auto' to let dispatch choose")
    return name
