"""A GPU that computes nothing, to measure what a net costs the host on a machine without a GPU.

:func:`install` makes this process see one H100. All Python, PyTorch's dispatcher and autograd run as they would with
one; memory has addresses but no bytes, ATen's kernels are empty (``null_gpu.cpp``), and a launch of a Triton kernel is
counted (:func:`launches`). Results have no values: only shapes, dtypes and layouts mean something.

What a real GPU adds on the host is left out: cuDNN's and cuBLAS's own code, and the driver's part of each launch. Stock
PyTorch spends most of its host time there, so a ratio to it is an upper bound.
"""

from __future__ import annotations

import ctypes
import itertools
import os
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from resnet_fast import native
from resnet_fast.benchmarks import extension

SOURCE = Path(__file__).with_name("null_gpu.cpp")
NAME = "NVIDIA H100 80GB HBM3"
CAPABILITY = (9, 0)

_PROPERTIES = SimpleNamespace(
    name=NAME,
    major=CAPABILITY[0],
    minor=CAPABILITY[1],
    multi_processor_count=132,
    total_memory=80 << 30,
    shared_memory_per_multiprocessor=233472,
    shared_memory_per_block_optin=232448,
    L2_cache_size=50 << 20,
    warp_size=32,
)
_MAP = {"swizzle": 3, "elem_size": 2, "elem_type": 10, "block_size": [1, 1], "fp4_padded": False}
_names: dict[int, str] = {}  # handle of a loaded kernel -> its name
_counted: Counter[str] = Counter()
_library: ctypes.CDLL | None = None


def install(compile_kernels: bool = False) -> None:
    """Give this process the GPU, until it ends. Call it before a CUDA tensor or a Triton kernel is used.

    Args:
        compile_kernels: compile Triton's kernels for sm_90, which takes minutes at first. Otherwise a kernel only has
            what a launch needs: name, number of warps, shared memory.

    Raises:
        RuntimeError: the library cannot be built, for want of a C++ compiler or ninja.
    """
    global _library
    if _library is not None:
        return
    if torch.cuda.is_available():
        raise RuntimeError("expected a machine without a GPU, got one with; hide it by CUDA_VISIBLE_DEVICES=")
    # Autograd's thread for the device outlives the interpreter; to wait for it at exit ends the process by abort().
    os.environ["RESNET_FAST_PROVE"] = "0"  # kernels that compute nothing prove nothing
    os.environ["TORCH_AUTOGRAD_SHUTDOWN_WAIT_LIMIT"] = "0"
    _replace_queries()
    _library = ctypes.CDLL(str(extension.built(SOURCE)))
    _replace_driver(compile_kernels)
    submitter = native.submitter()
    if not isinstance(submitter, str):
        submitter.stand_in(launch_address())


def launches() -> Counter[str]:
    """Return the launches of each kernel since the last call."""
    assert _library is not None
    for handle, name in _names.items():
        _counted[name] += _library.null_gpu_take_launches(ctypes.c_void_p(handle))
    found = +_counted
    _counted.clear()
    return found


def launch_address() -> int:
    """Return the address of a C function that stands for the driver's ``cuLaunchKernelEx``, for native launches."""
    assert _library is not None
    return ctypes.cast(_library.null_gpu_launch, ctypes.c_void_p).value or 0


def _replace_queries() -> None:
    """Make ``torch.cuda`` answer for one idle H100."""
    stream = SimpleNamespace(cuda_stream=0, device=torch.device("cuda", 0), wait_stream=lambda other: None)
    answers: dict[str, Any] = {
        "_lazy_init": None,
        "is_available": True,
        "is_initialized": True,
        "device_count": 1,
        "current_device": 0,
        "set_device": None,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
        "get_device_name": NAME,
        "get_device_capability": CAPABILITY,
        "get_device_properties": _PROPERTIES,
        "current_stream": stream,
        "is_current_stream_capturing": False,
        "synchronize": None,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *args, answer=answer, **kwargs: answer)


# ------------------------------------------------------------------------------------------------------------ Triton


class _Utils:
    """The functions of Triton's driver that are C."""

    _handles = itertools.count(1)

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        """Return module, function, registers, spills and the most threads of a block."""
        handle = next(self._handles)
        _names[handle] = name
        return handle, handle, 0, 0, 1024

    def unload_module(self, module: int) -> None:
        pass

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": _PROPERTIES.shared_memory_per_block_optin,
            "multiprocessor_count": _PROPERTIES.multi_processor_count,
            "warpSize": _PROPERTIES.warp_size,
            "max_num_regs": 65536,
        }

    def build_signature_metadata(self, signature: list[str]) -> bytes:
        return b""

    def launch(self, grid_x: int, grid_y: int, grid_z: int, stream: int, function: int, *rest: Any) -> None:
        _counted[_names[function]] += 1

    def fill_tma_descriptor_tiled(self, *args: Any) -> object:
        return args

    fill_tma_descriptor = fill_tma_descriptor_tiled  # its name before Triton 3.7


def _replace_driver(compile_kernels: bool) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import driver as nvidia

    class Driver(nvidia.CudaDriver):
        """Triton's CUDA driver with its Python launcher, around functions that do nothing."""

        def __init__(self) -> None:
            self.utils = _Utils()
            self.launcher_cls = nvidia.CudaLauncher
            self.get_device_capability = lambda device=0: CAPABILITY
            self.get_current_stream = lambda device=0: 0
            self.get_current_device = lambda: 0
            self.set_current_device = lambda device: None

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", 10 * CAPABILITY[0] + CAPABILITY[1], 32)

    driver = Driver()
    _replace_launch(nvidia, driver.utils)
    triton.runtime.driver.set_active(driver)
    if not compile_kernels:
        os.environ["RESNET_FAST_COMPILE_WORKERS"] = "0"
        triton.compiler.compile = _uncompiled


def _replace_launch(nvidia: Any, utils: _Utils) -> None:
    """Have Triton's launcher call ``utils.launch``.

    Until Triton 3.6 it compiles a C function for each signature, against the driver's library. Since then it calls one
    function of the driver's, with types that are C.
    """
    if hasattr(nvidia, "make_launcher"):
        nvidia.library_dirs = list
        nvidia.compile_module_from_src = lambda *args, **kwargs: SimpleNamespace(launch=utils.launch)
    else:
        nvidia.PyKernelArg = lambda nested_tuple, type: (nested_tuple, type)
        nvidia.ARG_CONSTEXPR, nvidia.ARG_KERNEL, nvidia.ARG_TUPLE = range(3)


def _uncompiled(src: Any, target: Any = None, options: Any = None, **kwargs: Any) -> Any:
    """Return a kernel that has no code, in place of ``triton.compiler.compile``."""
    import triton
    from triton.compiler.compiler import CompiledKernel

    kernel = CompiledKernel.__new__(CompiledKernel)
    kernel.metadata = SimpleNamespace(
        name=src.fn.fn.__name__,
        target=target,
        shared=0,
        tmem_size=None,
        num_warps=options["num_warps"],
        num_ctas=options.get("num_ctas", 1),
        global_scratch_size=0,
        global_scratch_align=1,
        profile_scratch_size=0,
        profile_scratch_align=1,
        launch_cooperative_grid=False,
        launch_pdl=False,
        tensordesc_meta=[dict(_MAP) for kind in src.signature.values() if str(kind).startswith("tensordesc")],
        instrumentation_mode="",
        cluster_dims=(1, 1, 1),
    )
    kernel.packed_metadata = triton.compiler.make_backend(target).pack_metadata(kernel.metadata)
    kernel.src, kernel.hash, kernel.name, kernel.asm, kernel.kernel = src, "", kernel.metadata.name, {}, b""
    kernel.metadata_group = {}
    kernel.module = kernel.function = kernel._run = None
    return kernel
