"""A driver for Triton whose GPU is the PTX machine: it compiles for the machine's architecture and launches there.

Triton asks its driver for the target, loads each kernel through ``utils.load_binary``, and launches through an object
of ``launcher_cls``, made with the kernel's signature. A launch needs no more of a driver, in Triton 3.6 and later.

Triton hands over the assembler's output. The PTX that it was assembled from is beside it in Triton's cache, under the
hash in the kernel's metadata. Loaded kernels are kept for the process, as Triton keeps them.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver as active_driver
from triton.runtime.cache import get_cache_manager

from ... import devices
from ...errors import UserError
from . import arguments

Launch = Callable[["LoadedKernel", tuple[int, int, int], int, int, Sequence[Any]], None]
"""``launch(kernel, grid, threads, shared, arguments)``."""


@dataclass(frozen=True)
class LoadedKernel:
    """A compiled kernel as the machine launches it.

    Attributes:
        name: of the kernel in ``text``.
        text: PTX.
        names, kinds: its arguments and Triton's type of each.
        maps: Triton's description of the tensor maps among its parameters, or None.
        scratch: bytes of scratch memory per block: global, and of a profiler.
        cluster: blocks of a cluster along each axis.
        title: its name for people; empty if that is ``name``.
        binary: the cubin that was assembled from ``text``; empty where nobody assembled it.
    """

    name: str
    text: str
    names: tuple[str, ...]
    kinds: tuple[Any, ...]
    maps: Any
    scratch: tuple[int, int]
    cluster: tuple[int, int, int]
    title: str = ""
    binary: bytes = b""


_handles = itertools.count(1)
_of_binary: dict[str, tuple[int, LoadedKernel]] = {}
_of_handle: dict[int, LoadedKernel] = {}


def loaded(handle: int) -> LoadedKernel:
    """Return the kernel that Triton or the native library knows by this handle."""
    return _of_handle[handle]


def _key(binary: bytes) -> str:
    return hashlib.sha256(binary).hexdigest()


def _register(src: Any, about: Any) -> LoadedKernel:
    """Find the PTX of a compiled kernel, and keep it for the launches by its handle."""
    group = get_cache_manager(about.hash).get_group(f"{src.name[:150]}.json") or {}
    files = {Path(name).suffix: Path(path) for name, path in group.items()}
    if ".ptx" not in files or ".cubin" not in files:
        raise UserError(
            f"the PTX of {about.name} in Triton's cache",
            ", ".join(sorted(files)) or "nothing",
            "unset TRITON_STORE_BINARY_ONLY, and let TRITON_CACHE_DIR name a folder that can be written",
        )
    clusters = getattr(about, "cluster_dims", None) or (getattr(about, "num_ctas", 1), 1, 1)
    binary = files[".cubin"].read_bytes()
    kernel = LoadedKernel(
        about.name,
        files[".ptx"].read_text(),
        tuple(src.signature),
        tuple(src.signature.values()),
        getattr(about, "tensordesc_meta", None) or None,
        (about.global_scratch_size, about.profile_scratch_size),
        tuple(clusters),
        binary=binary,
    )
    key = _key(binary)
    if key not in _of_binary:
        handle = next(_handles)
        _of_binary[key], _of_handle[handle] = (handle, kernel), kernel
    return _of_binary[key][1]


class _Utils:
    """The functions of Triton's driver that are C."""

    def __init__(self, name: str) -> None:
        gpu = devices.gpu(name).gpu
        assert gpu is not None
        self._properties = {
            "max_shared_mem": gpu.shared_per_block,
            "multiprocessor_count": gpu.sms,
            "warpSize": 32,
            "max_num_regs": gpu.registers_per_sm,
        }

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[None, int, int, int, int]:
        """Return module, function, registers, spills and the most threads of a block.

        No module: Triton unloads one when it deletes the kernel, which may be after the machine was left.
        """
        return None, _of_binary[_key(binary)][0], 0, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return self._properties


class MachineDriver(DriverBase):
    """Triton's driver inside ``with ptx_machine(...)``: for ``arch``, with the resources of ``gpu``."""

    def __init__(self, arch: int, gpu: str, launch: Launch) -> None:
        self.arch, self.launch = arch, launch
        self.utils = _Utils(gpu)
        # Triton keeps compiled kernels by the number of the device. So each architecture has a number of its own.
        self.get_current_device: Callable[[], int] = lambda: arch
        self.set_current_device: Callable[[int], None] = lambda device: None
        self.get_current_stream: Callable[[int], int] = lambda device: 0
        self.get_device_capability: Callable[[int], tuple[int, int]] = lambda device: divmod(arch, 10)

    def launcher_cls(self, src: Any, about: Any) -> _Launcher:
        """Return what launches a compiled kernel."""
        return _Launcher(_register(src, about))

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        todo = "give triton.autotune one config here, and measure on a GPU; the machine counts"
        raise UserError("a launch in the PTX machine", "a benchmark", todo)

    get_device_interface = get_benchmarker  # of triton.testing.do_bench

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise UserError("a launch in the PTX machine", "Triton's C launcher", "use another driver")

    @classmethod
    def is_active(cls) -> bool:
        return False  # only ``with ptx_machine(...)`` makes it the active one


class _Launcher:
    """Launch one compiled kernel in the machine that is entered, with arguments as Triton's own launcher takes them."""

    def __init__(self, kernel: LoadedKernel) -> None:
        self._kernel = kernel

    def __call__(self, x: int, y: int, z: int, stream: int, handle: int, *rest: Any) -> None:
        (warps, _, shared, *_), about, enter, leave, *args = rest
        driver = getattr(active_driver, "_active", None)
        if not isinstance(driver, MachineDriver):
            raise UserError("a launch inside `with ptx_machine(...)`", "one after its end", "enter the machine again")
        if enter is not None:
            enter(about)
        driver.launch(self._kernel, (x, y, z), 32 * warps, shared, args)
        if leave is not None:
            leave(about)


def names_of(kernel: LoadedKernel) -> list[tuple[str, bool]]:
    """Return each parameter that is not scratch memory, as :func:`.arguments.names` has them."""
    return [name for one in zip(kernel.names, kernel.kinds, strict=True) for name in arguments.names(*one, kernel.maps)]
