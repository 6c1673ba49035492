"""Functions of the CUDA driver's signatures for the native library, which submits planned passes (csrc/ops/submit.cpp).

``cuLaunchKernelEx`` and ``cuTensorMapEncodeTiled`` come here. An exception cannot cross the library: it is kept for
:meth:`resnet_fast.stand_in.StandIn.fault`, and the function returns an error code.
"""

from __future__ import annotations

import ctypes
import struct
from typing import Any, Protocol

from ... import native
from . import arguments, driver
from .memory import Memory

FAILED = 999  # CUDA_ERROR_UNKNOWN


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("attribute_count", ctypes.c_uint),
    )


_Sizes, _Boxes = ctypes.POINTER(ctypes.c_uint64), ctypes.POINTER(ctypes.c_uint32)
_LaunchType = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(_Config), ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p
)
_EncodeType = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, ctypes.c_void_p, _Sizes, _Sizes, _Boxes, _Boxes,
    ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int,
)  # fmt: skip


class Executor(Protocol):
    """What executes a launch whose parameters are packed: :class:`resnet_fast.tools.ptx_machine.PtxMachine`."""

    engine: Any

    @property
    def memory(self) -> Memory: ...

    def declared(self, kernel: driver.LoadedKernel) -> Any: ...

    def run(
        self,
        kernel: driver.LoadedKernel,
        grid: tuple[int, int, int],
        threads: int,
        shared: int,
        packed: list[bytes],
        words: str,
    ) -> None: ...


class NativeLaunches:
    """Have the native library submit to a machine. ``caught``: the exception of the launch that failed last."""

    def __init__(self, machine: Executor) -> None:
        self._machine = machine
        self.caught: Exception | None = None
        self._functions = _LaunchType(self._launch), _EncodeType(self._encode)  # alive as long as the library has them

    def install(self, library: Any) -> None:
        """Give ``library`` the addresses."""
        library.stand_in(*[ctypes.cast(f, ctypes.c_void_p).value for f in self._functions])

    @staticmethod
    def remove(library: Any) -> None:
        """Have ``library`` submit to the CUDA driver again."""
        library.stand_in(0)

    def _launch(self, config: Any, handle: int, given: Any, extra: Any) -> int:
        try:
            about, kernel = config.contents, driver.loaded(handle)
            declared = self._machine.declared(kernel)
            packed = [ctypes.string_at(given[i], one[2]) for i, one in enumerate(declared)]
            words = self._words(kernel, declared, packed)
            for i, (_, is_pointer) in enumerate(driver.names_of(kernel)):
                if is_pointer:
                    packed[i] = struct.pack("<Q", self._machine.memory.device(struct.unpack("<Q", packed[i])[0]))
            self._machine.run(kernel, tuple(about.grid), about.block[0], about.shared, packed, words)
            self._machine.memory.next_launch()
        except Exception as error:
            self.caught = error
            return FAILED
        return 0

    def _words(self, kernel: driver.LoadedKernel, declared: Any, packed: list[bytes]) -> str:
        """Return the arguments of a launch in words, from their bytes."""
        found = []
        for (name, _), (_, kind, _, _), value in zip(driver.names_of(kernel), declared, packed, strict=False):
            if len(value) == 128:
                found.append(f"{name}=a tensor map")
            elif len(value) == 8:
                found.append(f"{name}={self._machine.memory.name_of(struct.unpack('<Q', value)[0])}")
            else:
                floating = len(value) == 4 and kind == "f32"
                number = struct.unpack("<f", value)[0] if floating else int.from_bytes(value, "little", signed=True)
                found.append(f"{name}={number}")
        return ", ".join(found)

    def _encode(
        self, out: int, kind: int, rank: int, address: int, shape: Any, strides: Any, box: Any, steps: Any,
        interleave: int, swizzle: int, promotion: int, fill: int,
    ) -> int:  # fmt: skip
        try:
            engine, sizes = self._machine.engine, (shape[:rank], strides[: rank - 1], box[:rank])
            at = self._machine.memory.device(address or 0)
            packed = arguments.tensor_map(engine, at, kind, *sizes, swizzle, fill == 1)
        except Exception as error:
            self.caught = error
            return FAILED
        ctypes.memmove(out, packed, len(packed))
        return 0


def library() -> Any:
    """Return the native library if it can submit passes; None if not, and their launchers run one by one."""
    found = native.submitter()
    return None if isinstance(found, str) else found
