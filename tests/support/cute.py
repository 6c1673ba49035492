"""Layouts that CuTe's headers give: an independent source for those of tensor cores."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from resnet_fast.benchmarks.emulation import EMULATOR


def cutlass_headers() -> Path:
    spec = importlib.util.find_spec("cutlass_library")
    if spec is None or spec.origin is None:
        pytest.skip("no CuTe headers here (pip install --no-deps nvidia-cutlass)")
    return Path(spec.origin).parent / "source" / "include"


def toolkit_headers() -> Path:
    """Return the include folders of a CUDA toolkit: CuTe needs its runtime API and its C++ standard library."""
    roots = [os.environ.get("CUDA_HOME", "")]
    if nvcc := shutil.which("nvcc"):
        said = subprocess.run(
            [nvcc, "--dryrun", "-x", "cu", "-c", "-"], input="", capture_output=True, text=True
        ).stderr
        roots += [line.partition("TOP=")[2].strip() for line in said.splitlines() if "TOP=" in line]
    for root in filter(None, [*roots, "/usr/local/cuda"]):
        if (Path(root) / "include" / "cccl" / "cuda" / "std" / "utility").exists():
            return Path(root) / "include"
    pytest.skip("no CUDA toolkit with cccl here (looked at CUDA_HOME, nvcc, /usr/local/cuda)")


def printed(source: str, folder: Path) -> dict[str, list[int]]:
    """Compile a program of csrc/emulator/cute in ``folder`` and run it: the numbers that it prints, by name.

    CuTe's headers come from the PyPI package nvidia-cutlass and compile on the host, in a few seconds.
    """
    toolkit = toolkit_headers()
    program = folder / "program"
    folders = [cutlass_headers(), toolkit, toolkit / "cccl"]
    command = ["c++", "-std=c++17", "-w", *(f"-I{f}" for f in folders), str(EMULATOR / "cute" / source)]
    subprocess.run([*command, "-o", str(program)], check=True)
    out = {}
    for line in subprocess.run([program], capture_output=True, text=True, check=True).stdout.splitlines():
        name, *numbers = line.split()
        if name != "ERROR:":  # CuTe says that addresses of shared memory are none on the host
            out[name] = [int(number) for number in numbers]
    return out
