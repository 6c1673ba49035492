"""Build the emulator, whole, sanitized or broken on purpose, and run the native ops through it.

    module = build()                                           # the sources as they are
    module = build(edits=[Edit("bottleneck_fwd.cu", "sync_block();", "", count=2)])   # the third barrier is gone
    with Emulator(module, seed=3) as emulator:
        y = torch.ops.resnet_fast_native.bottleneck_fwd(...)   # on CPU tensors
        launch = emulator.launches()[0]                        # what it counted

Objects are kept in build/emulator under the hash of all that they were made from: an edit costs one compilation.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.machinery
import importlib.util
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from . import checkout
from .checkout import ROOT

KERNELS = ROOT / "csrc" / "kernels"
EMULATOR = ROOT / "csrc" / "emulator"
KEPT = ROOT / "build" / "emulator"
INCLUDES = (KERNELS / "include", EMULATOR / "include", EMULATOR)
CUDA_ONLY = ("device.cu", "device_build.cu")

NAME = "emulator_{}"

OPTIMISED = ("-O2",)
QUICK = ("-O0",)  # to compile: for kernels that are broken on purpose and run once
SANITIZED = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")


@dataclass(frozen=True)
class Edit:
    """Put ``new`` in place of ``old`` in the file of this name, at its ``count``-th occurrence (from 0).

    An edited header is seen by the sources that name it in an include.
    """

    file: str
    old: str
    new: str
    count: int = 0

    def apply(self, text: str) -> str:
        parts = text.split(self.old)
        if len(parts) <= self.count + 1:
            raise ValueError(f"{self.file} has {len(parts) - 1} times {self.old!r}, asked for number {self.count}")
        return self.old.join(parts[: self.count + 1]) + self.new + self.old.join(parts[self.count + 1 :])


def sources() -> list[Path]:
    """Return the files that the emulator is compiled from."""
    return [*sorted(EMULATOR.glob("*.cpp")), *(p for p in sorted(KERNELS.glob("*.cu")) if p.name not in CUDA_ONLY)]


@cache
def _headers() -> bytes:
    digest = hashlib.sha256()
    for folder in INCLUDES:
        for path in sorted(folder.rglob("*.h")):
            digest.update(path.read_bytes())
    return digest.digest()


def _compile(text: str, path: Path, flags: Sequence[str]) -> Path:
    command = [os.environ.get("CXX", "c++"), "-x", "c++", "-std=c++17", "-fPIC", "-fvisibility=hidden", *flags]
    command += [f"-I{folder}" for folder in INCLUDES] + [f"-I{_pybind()}", f"-I{sysconfig.get_path('include')}"]
    key = hashlib.sha256(_headers() + "\0".join([*command, path.name, text]).encode()).hexdigest()[:32]
    target = KEPT / f"{path.stem}-{key}.o"
    KEPT.mkdir(parents=True, exist_ok=True)
    with target.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process that wants the same object waits for it
        if target.exists():
            return target
        partial = target.with_suffix(f".{os.getpid()}.tmp")
        # Through a pipe, with the file's own name in messages and reports.
        text = f'#line 1 "{path.name}"\n{text}'
        done = subprocess.run(
            [*command, f"-I{path.parent}", "-c", "-", "-o", str(partial)], input=text, capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{path.name} does not compile:\n{done.stderr[-4000:]}")
        partial.replace(target)
    return target


def _pybind() -> str:
    import pybind11

    return pybind11.get_include()


def build(flags: Sequence[str] = (), edits: Iterable[Edit] = ()) -> Path:
    """Compile the emulator.

    Args:
        flags: of the compiler; ``OPTIMISED`` by default, and ``QUICK`` with edits.
        edits: changes to the sources.

    Returns:
        The shared object; the module's name is the file's up to the first dot.

    Raises:
        RuntimeError: with the compiler's output, if a file does not compile.
    """
    checkout.require("building the emulator")
    edits = list(edits)
    flags = flags or (QUICK if edits else OPTIMISED)
    texts = {path: path.read_text() for path in sources()}
    headers: dict[Path, str] = {}
    for edit in edits:
        if path := next((p for p in texts if p.name == edit.file), None):
            texts[path] = edit.apply(texts[path])
        else:
            path = next(p for folder in INCLUDES for p in folder.rglob(edit.file))
            headers[path] = edit.apply(headers.get(path) or path.read_text())
    key = hashlib.sha256(repr((flags, edits, _headers(), sorted(texts.items()))).encode()).hexdigest()[:16]
    name = NAME.format(key)
    target = KEPT / f"{name}.so"
    if target.exists():
        return target

    for header, text in headers.items():
        edited = KEPT / name / header.parent.name / header.name
        edited.parent.mkdir(parents=True, exist_ok=True)
        edited.write_text(text)

    def one(path: Path) -> Path:
        sees_edit = any(f"/{header.name}>" in texts[path] for header in headers)
        own = [f"-I{KEPT / name}"] if sees_edit else []
        if path.name != "module.cpp":
            return _compile(texts[path], path, [*flags, *own])
        # Every build has a name of its own, so that several can live in one process; the bindings, which take the
        # longest, are compiled once all the same: under a name as long, which is then replaced in the object.
        any_name = NAME.format("0" * len(key))
        compiled = _compile(texts[path], path, [*flags, *own, f"-DEMULATOR_MODULE={any_name}"])
        named = KEPT / f"{name}.module.o"
        named.write_bytes(compiled.read_bytes().replace(any_name.encode(), name.encode()))
        return named

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(one, texts))
    partial = target.with_suffix(f".{os.getpid()}.tmp")
    linker = [os.environ.get("CXX", "c++"), "-shared", *flags, *map(str, objects), "-o", str(partial)]
    subprocess.run(linker, check=True)
    partial.replace(target)
    return target


def load(path: Path) -> ModuleType:
    """Import the built module, once."""
    name = path.name.partition(".")[0]
    if name not in sys.modules:
        loader = importlib.machinery.ExtensionFileLoader(name, str(path))
        spec = importlib.util.spec_from_file_location(name, path, loader=loader)
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
        sys.modules[name] = module
    return sys.modules[name]


class Emulator:
    """Run native ops on CPU tensors in ``module`` inside the ``with``, on a device of ``arch, sms, shared``."""

    def __init__(self, module: ModuleType | Path, seed: int = 0, **device: int) -> None:
        self.module = load(module) if isinstance(module, Path) else module
        self.settings = {"seed": seed, **device}

    def __enter__(self) -> Emulator:
        import resnet_fast._C  # noqa: F401  (registers the ops)

        self.module.configure(**self.settings)
        self.module.take_counters()
        torch.ops.resnet_fast_native.emulator(self.module.kernels_address())
        return self

    def __exit__(self, *error: object) -> None:
        torch.ops.resnet_fast_native.emulator(0)
        self.module.configure()

    def launches(self) -> list[dict[str, Any]]:
        """Return the counts of the launches since the last call: see runtime.h, Counters."""
        return self.module.take_counters()


A100 = {"arch": 80, "sms": 108, "shared": 163 << 10}
H100 = {"arch": 90, "sms": 132, "shared": 227 << 10}
B200 = {"arch": 100, "sms": 148, "shared": 227 << 10}


def conflicts(launch: dict[str, Any]) -> dict[str, int]:
    """Return bank conflicts by source line: wavefronts beyond the least."""
    shared = [s for s in launch["sites"] if not s["kind"].startswith("global")]
    return {s["where"]: s["units"] - s["least"] for s in shared if s["units"] > s["least"]}
