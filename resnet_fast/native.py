"""Load the compiled modules on first use.

- ``_C``: ops over libtorch.
- ``_host``: facts about the CPU, without torch.
- ``_emulator``: the CUDA kernels compiled for the CPU, without torch.
- ``_ptx``: the machine that runs compiled kernels on the CPU, without torch.
- ``_sass``: the walker of machine code, without torch.
- ``_sm``: one multiprocessor of the cycle model, without torch.

The package works without any of them. If one is missing or does not load, the cause is kept as a :class:`Verdict`;
:func:`require`, ``explain()`` and the environment report give the same sentence. Importing this module loads nothing.
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
from .locks import load
from .spec import Verdict

LIBRARY = f"{__package__}._C"
HOST = f"{__package__}._host"
EMULATOR = f"{__package__}._emulator"
PTX = f"{__package__}._ptx"
SASS = f"{__package__}._sass"
SM = f"{__package__}._sm"

SUBMIT = "submit(program, addresses, numbers, device, stream)"
"""What the library's function says of itself. One that takes other arguments belongs to another version."""

_HOW_TO_BUILD = {
    LIBRARY: "run `pip install --no-build-isolation .` in a clone, with torch 2.11 or newer and a C++ compiler",
    **dict.fromkeys(
        (HOST, EMULATOR, PTX, SASS, SM), "run `RESNET_FAST_BUILD_HOST=1 pip install --no-build-isolation .` in a clone"
    ),
}


def _import(name: str) -> ModuleType:
    """Import a module, from the file that RESNET_FAST_LIBRARY names if it is the library."""
    named = os.environ.get(flags.LIBRARY)
    if name != LIBRARY or not named:
        return load(name)
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
        # The library's symbols are resolved against the libtorch that is already in the process.
        if name == LIBRARY:
            importlib.import_module("torch")
        return _import(name), Verdict.yes()
    except Exception as error:  # the report shows whatever the loader says
        cause = " ".join(str(error).split())
        got = f"one that cannot be loaded ({type(error).__name__}: {cause})"
        return None, Verdict.no(
            f"the compiled module {name}", got, f"it may belong to another torch: {_HOW_TO_BUILD[name]}"
        )


def status() -> Verdict:
    """Return whether the native library is loaded, or why it is not. The first call loads it."""
    return _load(LIBRARY)[1]


def require() -> Any:
    """Return the namespace ``torch.ops.resnet_fast_native``.

    Raises:
        BackendError: the library is missing or does not load; the message gives the cause.
    """
    verdict = status()
    if not verdict:
        raise BackendError(verdict.reason)
    import torch

    return torch.ops.resnet_fast_native


def submitter() -> Any:
    """Return the library's module with ``program`` and ``submit`` (csrc/ops/submit.cpp), or the reason against it."""
    module, verdict = _load(LIBRARY)
    if module is None:
        return verdict.reason
    if SUBMIT not in (getattr(getattr(module, "submit", None), "__doc__", None) or ""):
        return f"expected {LIBRARY} of this version, got an older one; {_HOW_TO_BUILD[LIBRARY]}"
    return module


def build_info() -> dict[str, str]:
    """Return how the library was built.

    Returns:
        compiler, cxx_standard, torch_headers, torch_target, python_api, cuda_toolkit and cuda_archs; the last two are
        ``none`` without CUDA code.

    Raises:
        BackendError: there is no library.
    """
    text: str = require().build_info()
    return dict(line.split("=", 1) for line in text.splitlines())


def host_status() -> Verdict:
    """Return whether the host module is loaded, or why it is not."""
    return _load(HOST)[1]


def host_build_info() -> dict[str, str]:
    """Return how the host module was built: compiler and cxx_standard.

    Raises:
        BackendError: there is no host module.
    """
    return dict(_require_host().build_info())


def host_isa() -> dict[str, bool]:
    """Return which instruction sets CPU and operating system let a program use.

    Returns:
        Values for avx2, avx512f, avx512_bf16, amx_bf16 and avx_ne_convert; empty on architectures other than x86-64.

    Raises:
        BackendError: there is no host module.
    """
    return dict(_require_host().isa())


def _require_host() -> Any:
    return _require(HOST)


def _require(name: str) -> Any:
    module, verdict = _load(name)
    if module is None:
        raise BackendError(verdict.reason)
    return module


def emulator() -> Any:
    """Return the emulator's module; from the first call, native ops on CPU tensors run its kernels.

    Raises:
        BackendError: the module or the native library is missing.
    """
    module, ops = _require(EMULATOR), require()
    _install(ops, module.kernels_address())
    return module


def multiprocessor() -> Any:
    """Return the module of the cycle model's multiprocessor.

    Raises:
        BackendError: the package was built without it.
    """
    return _require(SM)


def ptx_status() -> Verdict:
    """Return whether the module of the PTX machine is loaded, or why it is not."""
    return _load(PTX)[1]


def ptx() -> Any:
    """Return the module of the PTX machine; :mod:`resnet_fast.tools.ptx_machine` describes it.

    Raises:
        BackendError: there is no such module.
    """
    return _require(PTX)


def sass_status() -> Verdict:
    """Return whether the module that walks machine code is loaded, or why it is not."""
    return _load(SASS)[1]


def sass() -> Any:
    """Return the module that walks machine code; :mod:`resnet_fast.simulation.walk` calls it.

    Raises:
        BackendError: there is no such module.
    """
    return _require(SASS)


@cache
def _install(ops: Any, address: int) -> None:
    ops.emulator(address)


def emulator_status() -> Verdict:
    """Return whether the emulator runs native ops on CPU tensors, or why it cannot. The first call loads it."""
    verdict = _load(EMULATOR)[1]
    if not verdict or not status():
        return verdict and status()
    emulator()
    return Verdict.yes("in the emulator, on CPU tensors")
