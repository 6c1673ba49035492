"""The compiled parts, loaded on first use: ``_C`` (ops over libtorch), ``_host`` (facts about the CPU, no torch) and
``_emulator`` (the CUDA kernels compiled for the CPU, no torch).

The package works without any. Where one is absent or does not load, the cause is kept as a :class:`Verdict`, and
the same sentence serves :func:`require`, ``explain()`` and the environment report. Nothing is loaded or compiled when
this module is imported.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import os
from functools import cache
from types import ModuleType
from typing import Any

from . import flags
from .errors import BackendError
from .spec import Verdict

LIBRARY = "resnet_fast._C"
HOST = "resnet_fast._host"
EMULATOR = "resnet_fast._emulator"

_HOW_TO_BUILD = {
    LIBRARY: "run `pip install --no-build-isolation .` in a clone, beside torch 2.11 or newer and a C++ compiler",
    **dict.fromkeys((HOST, EMULATOR), "run `RESNET_FAST_BUILD_HOST=1 pip install --no-build-isolation .` in a clone"),
}


def _import(name: str) -> ModuleType:
    """The module, or the one in the file that RESNET_FAST_LIBRARY names."""
    named = os.environ.get(flags.LIBRARY)
    if name != LIBRARY or not named:
        return importlib.import_module(name)
    loader = importlib.machinery.ExtensionFileLoader(name, named)
    spec = importlib.util.spec_from_file_location(name, named, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@cache
def _load(name: str) -> tuple[ModuleType | None, Verdict]:
    named = name == LIBRARY and os.environ.get(flags.LIBRARY)
    if not named and importlib.util.find_spec(name) is None:
        return None, Verdict.no(f"the compiled module {name}", "a package built without it", _HOW_TO_BUILD[name])
    try:
        # Its symbols are resolved against the libtorch that is already in the process.
        if name == LIBRARY:
            importlib.import_module("torch")
        return _import(name), Verdict.yes()
    except Exception as error:  # whatever the loader says is the cause that the report must show
        cause = " ".join(str(error).split())
        got = f"one that cannot be loaded ({type(error).__name__}: {cause})"
        return None, Verdict.no(
            f"the compiled module {name}", got, f"it may belong to another torch: {_HOW_TO_BUILD[name]}"
        )


def status() -> Verdict:
    """Whether the native library is loaded, or the sentence that says why it is not. Loads it on the first call."""
    return _load(LIBRARY)[1]


def require() -> Any:
    """The namespace ``torch.ops.resnet_fast_native``. Raises BackendError with the cause where there is no library."""
    verdict = status()
    if not verdict:
        raise BackendError(verdict.reason)
    import torch

    return torch.ops.resnet_fast_native


def build_info() -> dict[str, str]:
    """With what the library was built: compiler, cxx_standard, torch_headers, torch_target, python_api, cuda_toolkit,
    cuda_archs; the last two are ``none`` without CUDA code. Raises BackendError where there is no library."""
    text: str = require().build_info()
    return dict(line.split("=", 1) for line in text.splitlines())


def host_status() -> Verdict:
    """Whether the host module is loaded, or why it is not."""
    return _load(HOST)[1]


def host_build_info() -> dict[str, str]:
    """With what the host module was built: compiler and cxx_standard. Raises BackendError where there is none."""
    return dict(_require_host().build_info())


def host_isa() -> dict[str, bool]:
    """Instruction set -> whether CPU and operating system let a program use it: avx2, avx512f, avx512_bf16, amx_bf16,
    avx_ne_convert; empty on other architectures than x86-64. Raises BackendError where there is no host module."""
    return dict(_require_host().isa())


def _require_host() -> Any:
    return _require(HOST)


def _require(name: str) -> Any:
    module, verdict = _load(name)
    if module is None:
        raise BackendError(verdict.reason)
    return module


def emulator() -> Any:
    """The emulator's module, whose kernels native ops on CPU tensors run in from the first call on. Raises BackendError
    where it or the native library is missing."""
    module, ops = _require(EMULATOR), require()
    _install(ops, module.kernels_address())
    return module


@cache
def _install(ops: Any, address: int) -> None:
    ops.emulator(address)


def emulator_status() -> Verdict:
    """Whether the emulator is installed, or why it cannot be. Loads it on the first call."""
    verdict = _load(EMULATOR)[1]
    if not verdict or not status():
        return verdict and status()
    emulator()
    return Verdict.yes("in the emulator, on CPU tensors")
