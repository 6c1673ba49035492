"""The sharded layout: files of torch.distributed.checkpoint, read without running any code in them.

Its own reader trusts the files: ``.metadata`` is a pickle, each plain value such as a learning rate is another one, and
both may name any Python function. Here ``.metadata`` may name only the classes that the writer uses, plain values are
read with ``weights_only=True``, and every entry must be in a file that the checkpoint's ``meta.json`` lists.
"""

from __future__ import annotations

import io
import pathlib
import pickle
import warnings
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import filesystem, metadata
from torch.serialization import _get_layout

METADATA = ".metadata"

_CLASSES = (
    metadata.Metadata,
    metadata.MetadataIndex,
    metadata.StorageMeta,
    metadata.TensorStorageMetadata,
    metadata.BytesStorageMetadata,
    metadata.ChunkStorageMetadata,
    metadata.TensorProperties,
    metadata._MEM_FORMAT_ENCODING,
    filesystem._StorageInfo,
)
ADMITTED: dict[tuple[str, str], Any] = {
    **{(cls.__module__, cls.__qualname__): cls for cls in _CLASSES},
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): _get_layout,
    # Where the writer was, which nobody reads; the module's name depends on Python's version.
    ("pathlib", "PosixPath"): pathlib.PurePosixPath,
    ("pathlib._local", "PosixPath"): pathlib.PurePosixPath,
}
"""The names that a ``.metadata`` may contain and what each becomes. torch's dtypes are allowed as well."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in ADMITTED:
            return ADMITTED[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint does, and could run code")


def read_metadata(folder: Path, files: Collection[str]) -> metadata.Metadata:
    """Return the metadata of the sharded checkpoint in ``folder``.

    Args:
        folder: The folder of the shards.
        files: The names of the files in it that entries may be stored in.

    Raises:
        pickle.UnpicklingError: The file names something that no checkpoint names.
        ValueError: The file is not such metadata, or an entry is stored elsewhere.
    """
    found = _Unpickler(io.BytesIO((folder / METADATA).read_bytes())).load()
    if not isinstance(found, metadata.Metadata) or not isinstance(found.storage_data, dict):
        raise ValueError("it is not the metadata of torch.distributed.checkpoint")
    for index, info in found.storage_data.items():
        if not isinstance(index, metadata.MetadataIndex) or not isinstance(info, filesystem._StorageInfo):
            raise ValueError("an entry is of another kind")
        if info.relative_path not in files:
            raise ValueError(f"{index.fqn} is stored in {info.relative_path!r}, which is no file of this checkpoint")
        if info.transform_descriptors or min(info.offset, info.length) < 0:
            raise ValueError(f"{index.fqn} is stored in another way")
    return found


class _Reader(dcp.FileSystemReader):
    """torch's reader, given metadata that was read and checked before."""

    def __init__(self, folder: Path, found: metadata.Metadata):
        super().__init__(folder)
        self.found = found

    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        self.found.storage_meta = metadata.StorageMeta(load_id=self.load_id)
        return self.found


class _Planner(dcp.DefaultLoadPlanner):
    """torch's planner, given plain values that were read with ``weights_only=True`` and written again."""

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        again = io.BytesIO()
        with zipfile.ZipFile(value) as archive:  # torch.save compresses nothing
            if sum(info.file_size for info in archive.infolist()) > len(value.getbuffer()):
                raise ValueError(f"{read_item.dest_index.fqn} unpacks to more than there is")
        value.seek(0)
        torch.save(torch.load(value, map_location="cpu", weights_only=True), again)
        again.seek(0)
        super().load_bytes(read_item, again)


def save_shards(folder: Path, parts: dict[str, Any]) -> None:
    """Write this process's shards of ``parts``. Every process calls it.

    Raises:
        OSError: A process cannot write.
    """
    try:
        dcp.save(parts, checkpoint_id=str(folder))
    except dcp.CheckpointException as error:  # not an Exception; the same in every process
        raise OSError(_first(error)) from error


def load_shards(folder: Path, files: Collection[str], parts: dict[str, Any]) -> None:
    """Read a checkpoint of any number of processes into ``parts`` in place. Every process calls it.

    Raises:
        ValueError: The files hold something else. torch raises other errors as well.
    """
    reader = _Reader(folder, read_metadata(folder, files))
    alone = not torch.distributed.is_initialized()
    try:
        with warnings.catch_warnings():  # loading in a single process is intended
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            dcp.load(parts, storage_reader=reader, planner=_Planner(), no_dist=alone)
    except dcp.CheckpointException as error:
        raise ValueError(_first(error)) from error


def _first(error: dcp.CheckpointException) -> str:
    """Return the reason of the first process that failed."""
    rank, (cause, _) = min(error.failures.items())
    return f"{getattr(cause, 'strerror', None) or cause}, in process {rank}"
