"""Run the CUDA ops in the PTX machine, as nvcc compiles their kernels.

    with ptx_machine(arch=90) as machine, compiled_cuda.launched(machine, sms=4):
        y = torch.ops.resnet_fast_native.bottleneck_fwd(...)      # on CPU tensors

The host's half is the emulator's build of csrc/kernels: its launchers choose kernel and grid as on a GPU, and fill the
kernel's parameter, which has the layout that nvcc gives it. The emulator hands each launch over
(csrc/emulator/include/emulator/runtime.h, ``Executor``) with the tensors that the launch names: those are the memory
that it may touch, the inputs read-only, the outputs written by nobody. Where the parameter holds tensor maps, the
emulator's are replaced by the machine's.

PTX is kept in build/ptx under the hash of all that it was made from.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from resnet_fast.errors import UserError
from resnet_fast.tools.ptx_machine import PtxFault, PtxMachine
from resnet_fast.tools.ptx_machine.driver import LoadedKernel
from resnet_fast.tools.ptx_machine.memory import Memory

from . import checkout, emulation

KEPT = checkout.ROOT / "build" / "ptx"
FLAGS = ("-ptx", "-std=c++17", "-O3", "-DNDEBUG", "-lineinfo", "-DRESNET_FAST_SM_90A")
VIRTUAL = {80: "compute_80", 90: "compute_90a"}
"""The machine's architecture -> nvcc's name of it. The whole-block kernel of Hopper needs 90a."""

_MAP = struct.Struct("<Q4Q4Q4I?7x2i2i2I?3xI")
"""The emulator's TensorMap: start, sizes, strides, box, swizzle, the fields of im2col, whether it is one, a mark."""
_MARK = 0x70616D74


@contextmanager
def launched(machine: PtxMachine, sms: int = 4) -> Iterator[None]:
    """Have ``torch.ops.resnet_fast_native`` take CPU tensors inside the ``with``, and launch in ``machine``.

    Args:
        machine: one that is entered.
        sms: multiprocessors of the GPU that launchers believe to be on: few, so that a block loops over its tiles.

    Raises:
        PtxFault: of a launch, in place of the op's error.
        UserError: no nvcc, or no checkout.
    """
    emulator = emulation.load(emulation.build())
    caught: list[PtxFault] = []

    def execute(kernel: str, grid: tuple[int, int, int], parameters: bytes, tensors: list[Any]) -> str | None:
        try:
            _run(machine, kernel, grid, parameters, tensors)
        except PtxFault as fault:
            caught.append(fault)
            return str(fault)
        return None

    shared = (163 if machine.arch == 80 else 227) << 10
    emulator.configure(arch=machine.arch, sms=sms, shared=shared)
    emulator.divert(execute)
    try:
        with emulation.Emulator(emulator, arch=machine.arch, sms=sms, shared=shared):
            yield
    except RuntimeError:
        if caught:
            raise caught[0] from None
        raise
    finally:
        emulator.divert(None)


def _run(machine: PtxMachine, name: str, grid: tuple[int, int, int], parameters: bytes, tensors: list[Any]) -> None:
    blocks, threads, shared = grid
    kernel = kernel_named(name, machine.arch)
    memory = Memory(machine.engine)
    for tensor, address, nbytes, written in tensors:
        memory.add_range(address, nbytes, f"{tensor} ({nbytes} bytes)", written=not written, writable=written)
    words = ", ".join(f"{tensor} of {nbytes} bytes" for tensor, _, nbytes, _ in tensors)
    packed = [with_maps(parameters, machine.engine)]
    machine.run(kernel, (blocks, 1, 1), threads, shared, packed, words, memory)


def with_maps(parameters: bytes, engine: Any) -> bytes:
    """Return a kernel's parameter with the machine's tensor maps in place of the emulator's."""
    found = bytearray(parameters)
    for at in range(0, len(parameters) - _MAP.size + 1, 64):
        start, *rest, mark = _MAP.unpack_from(parameters, at)
        if mark != _MARK:
            continue
        sizes, strides, box, (swizzle, *_, im2col) = rest[:4], rest[4:8], rest[8:12], rest[12:]
        if im2col:
            raise UserError("tiled tensor maps", "one of im2col", "the PTX machine has no such maps")
        found[at : at + _MAP.size] = engine.tensor_map(
            start, "u16", sizes, strides[1:], box, swizzle=128 if swizzle else 0, fill="zero"
        )
    return bytes(found)


# ------------------------------------------------------------------------------------------------------------- nvcc


def kernel_named(name: str, arch: int) -> LoadedKernel:
    """Return a kernel as compiled for ``arch``; ``name`` with its template arguments, as the emulator calls it.

    Raises:
        UserError: no source has it.
    """
    base = name.partition("<")[0]
    path = next((p for p in emulation.sources() if p.suffix == ".cu" and f"{base}(" in p.read_text()), None)
    if path is None:
        raise UserError("the name of a CUDA kernel", repr(name), "see csrc/kernels")
    text = compiled(path, arch)
    mangled = _names(text).get(_plain(name))
    if mangled is None:
        raise UserError(f"a kernel of {path.name}", repr(name), f"its PTX has {', '.join(_names(text))}")
    return LoadedKernel(mangled, text, ("parameters",), ("struct",), None, (0, 0), (1, 1, 1), name)


@cache
def compiled(path: Path, arch: int) -> str:
    """Return the PTX of a file of csrc/kernels for ``arch``.

    Raises:
        UserError: there is no nvcc, or it reports errors.
    """
    nvcc = _nvcc()
    headers = hashlib.sha256(b"".join(p.read_bytes() for p in sorted((emulation.KERNELS / "include").rglob("*.h"))))
    command = [nvcc, *FLAGS, f"-arch={VIRTUAL[arch]}", f"-I{emulation.KERNELS / 'include'}", str(path)]
    key = hashlib.sha256(repr((_version(), command[1:], path.read_bytes(), headers.digest())).encode()).hexdigest()[:32]
    target = KEPT / f"{path.stem}-{key}.ptx"
    if not target.exists():
        _make(target, command, f"{path.name} to compile")
    return target.read_text()


@cache
def assembled(text: str, arch: int) -> bytes:
    """Return the cubin of a PTX text, as nvcc's assembler makes it.

    Raises:
        UserError: there is no nvcc, or it reports errors.
    """
    command = [_nvcc(), "-cubin", f"-arch={VIRTUAL[arch].replace('compute', 'sm')}"]
    target = KEPT / f"{hashlib.sha256(repr((_version(), command[1:], text)).encode()).hexdigest()[:32]}.cubin"
    if not target.exists():
        with tempfile.NamedTemporaryFile("w", suffix=".ptx") as source:
            source.write(text)
            source.flush()
            _make(target, [*command, source.name], "PTX to assemble")
    return target.read_bytes()


def _make(target: Path, command: list[str], what: str) -> None:
    """Let nvcc write a file that is kept, whole or not at all."""
    KEPT.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(f".{os.getpid()}.tmp")
    done = subprocess.run([*command, "-o", str(partial)], capture_output=True, text=True)
    if done.returncode:
        raise UserError(what, done.stderr[-2000:], "mend it")
    partial.replace(target)


def _nvcc() -> str:
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc")
    if nvcc is None:
        raise UserError("nvcc, to compile CUDA kernels", "none on PATH", "install it, or set CUDACXX")
    return nvcc


@cache
def _version() -> str:
    return subprocess.run([_nvcc(), "--version"], capture_output=True, text=True, check=True).stdout


@cache
def _names(text: str) -> dict[str, str]:
    """Return the kernels of a PTX text: name with template arguments -> mangled name."""
    mangled = re.findall(r"\.entry\s+(\w+)", text)
    readable = subprocess.run(["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True).stdout
    return dict(zip(map(_plain, readable.splitlines()), mangled, strict=True))


def _plain(name: str) -> str:
    """Return a kernel's name without namespaces, result, arguments and blanks."""
    for part in ("(anonymous namespace)::", "resnet_fast::", "void "):
        name = name.replace(part, "")
    return name.partition("(")[0].replace(" ", "")
