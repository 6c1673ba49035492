"""Machine code out of a compiled library: PyTorch's own kernels, as they are installed.

    name, = kernels(torch_library(), 90, "CUDAFunctor_add<c10::BFloat16>", "vectorized_elementwise_kernel<8")
    kernel = read_library_kernel(torch_library(), 90, name)

A library keeps its kernels in the section ``.nv_fatbin``: for each source file a container with a cubin for each
architecture, compressed by zstd. ``cuobjdump`` would unpack all of them into files. Here the containers are walked in
place, and the cubins of one architecture are unpacked once to read which kernels they have. That index is kept in
the cache folder (``RESNET_FAST_CACHE``) under the library's path, size and time; a kernel then costs one cubin.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import hashlib
import mmap
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

from .. import flags
from ..errors import UserError
from ..io import safe_files
from .cubin import CubinFile
from .kernel import Kernel, read_kernel

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_CONTAINER = struct.Struct("<IHHQ")  # mark, version, bytes of the header, bytes of what follows
_ENTRY = struct.Struct("<H2xIQI8xI24xQ")  # kind, bytes of the header, bytes stored, packed; architecture; unpacked
_MARK = 0xBA55ED50
_CUBIN = 2  # the kind of an entry
_ZSTD = b"\x28\xb5\x2f\xfd"


class PackedCubin(NamedTuple):
    """A cubin in a library: where its bytes are, how many, and how many there are once unpacked."""

    start: int
    size: int
    unpacked: int


def torch_library() -> Path:
    """Return the library with PyTorch's CUDA kernels.

    Raises:
        UserError: PyTorch was installed without CUDA.
    """
    import torch

    path = Path(torch.__file__).parent / "lib" / "libtorch_cuda.so"
    if not path.exists():
        raise UserError("a PyTorch with CUDA kernels", f"no {path.name}", "install a build of PyTorch for CUDA")
    return path


def kernels(library: Path, arch: int, *parts: str) -> list[str]:
    """Return the mangled names of a library's kernels for ``arch`` whose readable names contain all ``parts``.

    Raises:
        UserError: no library with kernels of this architecture, or no zstd to unpack them.
    """
    index = _index(library, arch)
    readable = _readable(tuple(index))
    return [name for name, text in zip(index, readable, strict=True) if all(part in text for part in parts)]


def read_library_kernel(library: Path, arch: int, name: str) -> Kernel:
    """Return a kernel of a library by its mangled name.

    Raises:
        UserError: the library has none of this name.
    """
    place = _index(library, arch).get(name)
    if place is None:
        raise UserError(f"a kernel of {library.name} for sm_{arch}", repr(name), "find it with kernels(...)")
    with _mapped(library) as content:
        return read_kernel(_unpacked(content, place), name)


def _index(library: Path, arch: int) -> dict[str, PackedCubin]:
    """Name of each kernel -> the cubin that has it."""
    about = library.stat()
    key = hashlib.sha256(repr((str(library), about.st_size, about.st_mtime_ns, arch)).encode()).hexdigest()[:32]
    return _kept(library, arch, flags.cache_folder() / "machine_code" / f"{library.stem}-{key}.json")


@cache
def _kept(library: Path, arch: int, path: Path) -> dict[str, PackedCubin]:
    if path.exists():
        return {name: PackedCubin(*place) for name, place in safe_files.json_value(path.read_bytes()).items()}
    found = {}
    with _mapped(library) as content:
        for place in _cubins(content, library, arch):
            for name in CubinFile(_unpacked(content, place)).kernels:
                found[name] = place
    if not found:
        raise UserError(f"kernels for sm_{arch} in {library.name}", "none", "name another architecture or library")
    path.parent.mkdir(parents=True, exist_ok=True)
    safe_files.write_whole(path, safe_files.json_text(found).encode())
    return found


@contextmanager
def _mapped(library: Path) -> Iterator[mmap.mmap]:
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        yield content


def _cubins(content: mmap.mmap, library: Path, arch: int) -> Iterator[PackedCubin]:
    """Yield the cubins for an architecture in the containers of a library."""
    start, size = _fatbin(content, library)
    at, end = start, start + size
    while at + _CONTAINER.size <= end:
        mark, _, header, length = _CONTAINER.unpack_from(content, at)
        if mark != _MARK:  # containers are aligned to 8 bytes
            at += 8
            continue
        entry, stop = at + header, at + header + length
        while entry < stop:
            kind, head, stored, packed, of, unpacked = _ENTRY.unpack_from(content, entry)
            if kind == _CUBIN and of == arch:
                yield PackedCubin(entry + head, packed or stored, unpacked)
            entry += head + stored
        at = stop + -stop % 8


def _fatbin(content: mmap.mmap, library: Path) -> tuple[int, int]:
    """Return start and bytes of the section with kernels."""
    if content[:4] != b"\x7fELF":
        raise UserError("a library for Linux", f"{library.name}, which is no ELF file", "name another")
    *_, sections, _, _, _, _, _, count, names = _HEADER.unpack_from(content)
    raw = [_SECTION.unpack_from(content, sections + n * _SECTION.size) for n in range(count)]
    for one in raw:
        begin = raw[names][4] + one[0]
        if content[begin : content.find(b"\0", begin)] == b".nv_fatbin":
            return one[4], one[5]
    raise UserError("a library with CUDA kernels", f"{library.name} without any", "name another")


def _unpacked(content: mmap.mmap, place: PackedCubin) -> bytes:
    packed = content[place.start : place.start + place.size]
    if packed[:4] == b"\x7fELF":
        return packed
    if packed[:4] != _ZSTD:
        raise UserError("cubins that zstd packed, or none", packed[:4].hex(), "only these can be read")
    out = ctypes.create_string_buffer(place.unpacked)
    got = _zstd().ZSTD_decompress(out, ctypes.c_size_t(place.unpacked), packed, ctypes.c_size_t(len(packed)))
    if got != place.unpacked:
        raise UserError(f"a cubin of {place.unpacked} bytes", f"{got}", "the library may be damaged")
    return out.raw


@cache
def _zstd() -> ctypes.CDLL:
    name = ctypes.util.find_library("zstd")
    if name is None:
        raise UserError("libzstd, which unpacks cubins", "none on this system", "install it (apt install libzstd1)")
    library = ctypes.CDLL(name)
    library.ZSTD_decompress.restype = ctypes.c_size_t
    return library


@cache
def _readable(names: Sequence[str]) -> tuple[str, ...]:
    """Return names as C++ writes them, by the library of this system that throws C++'s exceptions."""
    library = ctypes.CDLL(ctypes.util.find_library("stdc++"))
    demangle, free = library.__cxa_demangle, ctypes.CDLL(None).free
    demangle.restype, free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    out = []
    for name in names:
        status = ctypes.c_int()
        text = demangle(name.encode(), None, None, ctypes.byref(status))
        out.append(ctypes.cast(text, ctypes.c_char_p).value.decode() if text else name)  # type: ignore[union-attr]
        free(text)
    return tuple(out)
