"""Define every environment switch: name, choices, default, meaning. An invalid value is an error, never the default.

Switches are read at the time of use, so that a test or a notebook may change ``os.environ`` after the import. A
variable with our prefix that is no switch is probably a typo: :func:`unknown` finds it, the command line reports it.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import UserError

BACKENDS = ("auto", "reference", "onednn", "triton", "cuda")
"""Names of backends to request; ``auto`` lets dispatch choose."""


@dataclass(frozen=True)
class Flag:
    """One environment switch. ``choices`` are the accepted values in lower case; if empty, any text is accepted.

    ``_key`` is the name as CPython's ``os.environ`` keeps it. ``os.environ.get`` raises and catches an error for an
    absent name, which takes eight thousand instructions. Most switches are absent, and each call of an op reads one.
    It is no cached property: until Python 3.11 these take a lock at their first use, which no compiler traces.
    """

    name: str
    default: str
    choices: tuple[str, ...]
    meaning: str
    _key: Any = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        key = os.fsencode(self.name) if os.name == "posix" else self.name.upper()
        object.__setattr__(self, "_key", key)

    def read(self) -> str:
        """Return the current value.

        Raises:
            UserError: the value is not among ``choices``, or names a file or folder of the wrong kind.
        """
        environ: Any = os.environ
        if self._key not in getattr(environ, "_data", (self._key,)):
            return self.default
        raw = environ.get(self.name)
        if raw is None or raw == "":
            return self.default
        if not self.choices:
            return self._path(raw)
        value = raw.strip().lower()
        if value not in self.choices:
            raise UserError(
                f"{self.name} to be one of {', '.join(self.choices)}", repr(raw), f"unset it for {self.default!r}"
            )
        return value

    def _path(self, raw: str) -> str:
        """Return ``raw`` after checking that it can be the expected file or folder."""
        path = Path(raw).expanduser()
        if self is LIBRARY_FILE and not path.is_file():
            raise UserError(f"{self.name} to name a file", repr(raw), "unset it for the package's own library")
        if self is CACHE_FOLDER and path.exists() and not path.is_dir():
            raise UserError(f"{self.name} to name a folder", f"the file {raw!r}", "name a folder, or unset it")
        return raw

    def enabled(self) -> bool:
        """Return whether an on/off switch is ``1``."""
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
BATCH_INVARIANT = Flag(
    "RESNET_FAST_BATCH_INVARIANT",
    "0",
    ("0", "1"),
    "1: in inference an image's result is the same, bit for bit, at any batch size and place in the batch; slower",
)
PROLOGUE = Flag(
    "RESNET_FAST_PROLOGUE",
    "packed",
    ("packed", "exact"),
    "how Triton's training kernels apply BatchNorm to 16-bit inputs: in 16-bit pairs, or in fp32 and slower",
)
PROVE = Flag(
    "RESNET_FAST_PROVE",
    "1",
    ("0", "1"),
    "1: on a GPU, a kernel config that may be wrong there is checked before its first use; 0: it never runs",
)
SUBMIT = Flag(
    "RESNET_FAST_SUBMIT",
    "native",
    ("native", "python"),
    "how planned Triton launches reach the driver: all of a pass in one native call, or one by one by Triton",
)
EMULATE = Flag(
    "RESNET_FAST_EMULATE",
    "0",
    ("0", "1"),
    "1: the CUDA kernels run on CPU tensors in the emulator, checked and slow; set before the first call",
)
COMPILE_WORKERS = Flag(
    "RESNET_FAST_COMPILE_WORKERS",
    "auto",
    ("auto", "0", "1", "2", "4", "8", "16", "32", "64"),
    "Triton kernels to compile at a time before their first launch, auto: one per CPU; 0: each launch compiles its own",
)
DEBUG = Flag("RESNET_FAST_DEBUG", "0", ("0", "1"), "1: the command line shows tracebacks")

ALL = (BACKEND, STRICT, BATCH_TILE, BATCH_INVARIANT, PROLOGUE, PROVE, SUBMIT, COMPILE_WORKERS, EMULATE, DEBUG)

CACHE = "RESNET_FAST_CACHE"
"""Folder of measurements and proofs made here; by default ``resnet_fast`` in XDG_CACHE_HOME, or in ``~/.cache``."""

LIBRARY = "RESNET_FAST_LIBRARY"
"""File of a native library, built out of tree, to load instead of the package's own."""

CACHE_FOLDER = Flag(CACHE, "", (), "folder of what tuning and explain measured, and what was proved on this GPU")
LIBRARY_FILE = Flag(
    LIBRARY, "", (), "file of a native library built out of tree, to load in place of the package's own"
)

_BUILT = ("auto", "0", "1")
BUILD = (
    Flag("RESNET_FAST_BUILD_NATIVE", "auto", _BUILT, "pip install: build the native library; 1 fails where it cannot"),
    Flag("RESNET_FAST_BUILD_CUDA", "auto", _BUILT, "pip install: build its CUDA half"),
    Flag("RESNET_FAST_BUILD_HOST", "0", _BUILT, "pip install: build the module of CPU facts, which needs no torch"),
    Flag("RESNET_FAST_CUDA_ARCHS", "", (), "pip install: architectures of the CUDA half, as CMake spells them"),
)
"""Switches that setup.py reads."""

TABLE = (*ALL, CACHE_FOLDER, LIBRARY_FILE, *BUILD)
"""Every variable with a meaning for this package."""

PREFIX = "RESNET_FAST_"

REMOVED = {"RESNET_FAST_TF32": "torch.backends.cudnn.conv.fp32_precision decides, 'tf32' or 'ieee'"}
"""Variables of earlier versions, and what to do without each."""


def unknown(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return variables with our prefix that are no switch, each with a hint: the close match if there is one.

    Args:
        environment: variables; by default ``os.environ``.
    """
    known = [flag.name.removeprefix(PREFIX) for flag in TABLE]
    found = {}
    for name in sorted(os.environ if environment is None else environment):
        word = name.removeprefix(PREFIX)
        if name in REMOVED:
            found[name] = REMOVED[name]
        elif name.startswith(PREFIX) and word not in known:
            close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
            found[name] = f"did you mean {PREFIX}{close[0]}?" if close else "`resnet-fast env` lists the switches"
    return found


def cache_folder() -> Path:
    """Return the folder that :data:`CACHE` names, or the default; it need not exist.

    Raises:
        UserError: a file has that name.
    """
    named = CACHE_FOLDER.read()
    return Path(named).expanduser() if named else default_cache_folder()


def default_cache_folder() -> Path:
    """Return the cache folder to use if :data:`CACHE` is not set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "resnet_fast"


def check_backend(name: str) -> str:
    """Return ``name`` if it is the name of a backend.

    Raises:
        UserError: it is not.
    """
    if name not in BACKENDS:
        raise UserError(f"a backend among {', '.join(BACKENDS)}", repr(name), "use 'auto' to let dispatch choose")
    return name
