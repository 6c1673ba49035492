"""Published data sets from their own files, as arrays: Fashion-MNIST's idx and CIFAR's batches.

A file may come from anywhere. It is read once, up to a limit, and nothing in it is executed: CIFAR's batches are
pickles, so their MD5 sums must be the published ones, and the unpickler knows only NumPy's arrays.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import os
import pickle
import struct
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import UserError

MOST_BYTES = 2**28
"""The most that an unpacked file may hold. The largest published one has 155 MB."""


class _Foreign(Exception):
    """A file of something else; the message says what is wrong with it."""


def _content(path: Path) -> bytes:
    """Return the content of a plain or gzipped file. At most :data:`MOST_BYTES` of it are in memory."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise _Foreign(f"more than {MOST_BYTES:,} bytes")
    return content


def idx_file(folder: Path, stem: str) -> Path | None:
    """Return the path of ``stem`` in ``folder``, plain or gzipped; None if there is no such file."""
    return next((p for p in (folder / stem, folder / f"{stem}.gz") if os.path.isfile(p)), None)


def read_idx(path: Path) -> Tensor:
    """Read an idx file of bytes.

    Returns:
        uint8 (N, H, W) if the name of the file says idx3, else (N).

    Raises:
        UserError: It is not such a file.
    """
    dimensions = 3 if "idx3" in path.name else 1
    try:
        content = _content(path)
        zero, kind, found = struct.unpack_from(">HBB", content)
        if (zero, kind, found) != (0, 8, dimensions):  # 8: unsigned bytes
            raise _Foreign(f"kind {kind} in {found} dimensions")
        shape = struct.unpack_from(f">{dimensions}I", content, 4)
        values = content[4 + 4 * dimensions :]
        if not values or math.prod(shape) != len(values):
            raise _Foreign(f"{len(values):,} values, not {' x '.join(map(str, shape))}")
    except (OSError, EOFError, zlib.error, struct.error, _Foreign) as error:
        raise UserError("an idx file of Fashion-MNIST", f"{path} ({error})", "fetch it again") from error
    return torch.frombuffer(bytearray(values), dtype=torch.uint8).reshape(shape)


_ARRAYS = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),  # NumPy 1
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy.core.numeric", "_frombuffer"),  # protocol 5
    ("numpy._core.numeric", "_frombuffer"),
    ("_codecs", "encode"),  # bytes in protocols before 3
}
"""The names that a pickle of arrays, lists, text and numbers refers to."""


class _ArrayUnpickler(pickle.Unpickler):
    """Reads arrays and plain values. A reference to anything else is an error before the name is looked up."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ARRAYS:
            raise _Foreign(f"it refers to {module}.{name} and could run code when read")
        import numpy as np

        if hasattr(np, "_core"):  # NumPy 2 warns of the old name
            module = module.replace("numpy.core", "numpy._core")
        return super().find_class(module, name)


def genuine(content: bytes, md5: str) -> bool:
    """Return whether ``content`` has the published MD5 sum."""
    return hashlib.md5(content, usedforsecurity=False).hexdigest() == md5


def _unpickle(path: Path, md5: str) -> dict[str, Any]:
    if not os.path.isfile(path):
        raise _Foreign(f"no file {path}")
    content = _content(path)
    if not genuine(content, md5):
        raise _Foreign(f"{path} is corrupted or another file: its MD5 sum is not the published {md5}")
    try:
        found = _ArrayUnpickler(io.BytesIO(content), encoding="latin1").load()
    except Exception as error:  # a pickle can be wrong in every way that Python has
        raise _Foreign(f"{path}: {error or type(error).__name__}") from error
    if not isinstance(found, dict):
        raise _Foreign(f"{path} holds a {type(found).__name__}")
    return found


def _cifar_part(entries: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    """Join batches: images uint8 (N, 3, 32, 32) and labels int64 (N)."""
    import numpy as np

    rows, labels = [], []
    for entry in entries:
        pixels, numbers = entry.get("data"), entry.get("labels", entry.get("fine_labels"))
        if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[1:] != (3072,):
            raise _Foreign("a batch without rows of 3072 bytes")
        if not isinstance(numbers, list) or len(numbers) != len(pixels) or {type(n) for n in numbers} != {int}:
            raise _Foreign(f"a batch without {len(pixels)} labels")
        rows.append(pixels)
        labels += numbers
    return torch.from_numpy(np.concatenate(rows)).reshape(-1, 3, 32, 32), torch.tensor(labels)


def read_cifar(root: Path, hundred: bool) -> tuple[Any, Any, list[str]]:
    """Read CIFAR-10, or CIFAR-100 with its fine labels, as torchvision unpacks it.

    Args:
        root: The folder that holds ``cifar-10-batches-py`` or ``cifar-100-python``.
        hundred: Whether to read CIFAR-100.

    Returns:
        (images, labels) to train on, (images, labels) to validate on, and the class names. Images are uint8
        (N, 3, 32, 32), labels int64 (N).

    Raises:
        UserError: A file is absent, has another MD5 sum than the published one, or holds anything other than arrays
            and plain values.
    """
    from torchvision import datasets

    published = datasets.CIFAR100 if hundred else datasets.CIFAR10
    folder, meta = root / published.base_folder, published.meta
    try:
        train, val = (
            _cifar_part([_unpickle(folder / name, md5) for name, md5 in files])
            for files in (published.train_list, published.test_list)
        )
        names = _unpickle(folder / meta["filename"], meta["md5"]).get(meta["key"])
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise _Foreign(f"{folder / meta['filename']} names no classes")
    except (OSError, _Foreign) as error:
        raise UserError(
            f"torchvision's {published.__name__} files below {root}",
            " ".join(str(error).split()),
            f"fetch {published.url.rpartition('/')[2]}, unpack it there, and give that folder with --data-path",
        ) from error
    return train, val, names
