"""The build. What is compiled is defined in CMakeLists.txt; this file decides whether anything is.

Switches, all environment variables (default first):

``RESNET_FAST_BUILD_NATIVE=auto|0|1``  the native library ``resnet_fast._C``. auto builds it where torch, a C++
                                       compiler and Python's headers are present, 1 fails where they are not
``RESNET_FAST_BUILD_CUDA=auto|0|1``    its CUDA half. auto builds it where nvcc and libtorch_cuda are found
``RESNET_FAST_CUDA_ARCHS``             architectures of that half, as CMAKE_CUDA_ARCHITECTURES spells them
``RESNET_FAST_BUILD_HOST=0|auto|1``    the torch-free module ``resnet_fast._host``, for one version of Python

torch is no build requirement: an isolated build would fetch gigabytes of a torch that is not the user's. So ``pip
install .`` gives the pure package, and ``pip install --no-build-isolation .`` the one with the native library.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
import sysconfig
from importlib import metadata
from pathlib import Path
from typing import Any

import setuptools
from packaging.specifiers import SpecifierSet
from scikit_build_core import program_search
from scikit_build_core.setuptools import wrapper

TORCH_MINIMUM = (2, 11)  # the stable ABI that CMakeLists.txt targets
CMAKE = SpecifierSet(">=3.25")
COMPILERS = ("c++", "g++", "clang++")


def switch(name: str, *choices: str) -> str:
    """The switch's value; the first of ``choices`` where the variable is not set."""
    value = os.environ.get(name) or choices[0]
    if value not in choices:
        raise SystemExit(
            f"expected {name} to be one of {', '.join(choices)}, got {value!r}; unset it for {choices[0]!r}"
        )
    return value


def torch_folder() -> tuple[Path | None, str]:
    """Where the torch of the building environment lies, and why not where it cannot be used. torch is not imported."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None, "no torch in the building environment (pip install --no-build-isolation uses yours)"
    version = metadata.version("torch")
    release = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if release < TORCH_MINIMUM:
        return None, f"torch {version} is older than {'.'.join(map(str, TORCH_MINIMUM))}"
    return Path(spec.origin).parent, ""


def no_toolchain() -> str:
    """Why C++ extension modules cannot be compiled here; empty where they can."""
    if not os.environ.get("CXX") and not any(map(shutil.which, COMPILERS)):
        return f"no C++ compiler (looked for {', '.join(COMPILERS)}; CXX names another)"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return f"no Python.h in {sysconfig.get_path('include')} (Debian: apt-get install python3-dev)"
    return ""


def require_cmake() -> None:
    """Exit with one line where CMake, or a tool that runs its build, is missing: pip can install both."""
    missing = []
    if program_search.best_program(program_search.get_cmake_programs(), version=CMAKE) is None:
        missing.append(f"no CMake {CMAKE}")
    if not any(program_search.get_ninja_programs()) and not any(program_search.get_make_programs()):
        missing.append("no ninja and no make")
    if missing:
        raise SystemExit(
            f"expected the tools that compile resnet_fast, got {' and '.join(missing)}; run `pip install cmake ninja`, "
            "or set RESNET_FAST_BUILD_NATIVE=0 (and RESNET_FAST_BUILD_HOST=0) to build without compiled parts"
        )


def refuse_or_say(what: str, reason: str, demanded: bool) -> None:
    if demanded:
        raise SystemExit(
            f"expected to build {what}, got {reason}; unset the RESNET_FAST_BUILD_* switch that asks for it"
        )
    print(f"resnet_fast is built without {what}: {reason}", file=sys.stderr)


def native_folder() -> Path | None:
    """torch's folder if ``_C`` is to be built, else None. Says on stderr why not."""
    choice = switch("RESNET_FAST_BUILD_NATIVE", "auto", "0", "1")
    cuda = switch("RESNET_FAST_BUILD_CUDA", "auto", "0", "1")
    if choice == "0":
        if cuda == "1":
            raise SystemExit(
                "expected RESNET_FAST_BUILD_NATIVE=1 or auto with RESNET_FAST_BUILD_CUDA=1, got 0; unset one"
            )
        return None
    folder, reason = torch_folder()
    if reason := reason or no_toolchain():
        refuse_or_say("its native library", reason, "1" in (choice, cuda))
        return None
    return folder


def host_wanted() -> bool:
    """Whether ``_host`` is to be built. Says on stderr why not where it was asked for."""
    choice = switch("RESNET_FAST_BUILD_HOST", "0", "auto", "1")
    if choice == "0":
        return False
    if reason := no_toolchain():
        refuse_or_say("its host module", reason, choice == "1")
    return not reason


def cmake_arguments(torch: Path | None, host: bool) -> list[str]:
    arguments = [f"-DRESNET_FAST_NATIVE={'ON' if torch else 'OFF'}", f"-DRESNET_FAST_HOST={'ON' if host else 'OFF'}"]
    if torch is not None:
        arguments += [
            f"-DRESNET_FAST_TORCH_DIR={torch}",
            f"-DRESNET_FAST_CUDA={os.environ.get('RESNET_FAST_BUILD_CUDA') or 'auto'}",
        ]
    if archs := os.environ.get("RESNET_FAST_CUDA_ARCHS"):
        arguments.append(f"-DRESNET_FAST_CUDA_ARCHS={archs}")
    return arguments


def packages() -> list[str]:
    """resnet_fast, and benchmarks/ as its subpackage; in a checkout, resnet_fast/benchmarks is a link to it."""
    own = setuptools.find_packages(include=["resnet_fast", "resnet_fast.*"], exclude=["resnet_fast.benchmarks*"])
    return own + [f"resnet_fast.{name}" for name in setuptools.find_packages(include=["benchmarks", "benchmarks.*"])]


def main() -> None:
    arguments: dict[str, Any] = {"packages": packages(), "package_dir": {"resnet_fast.benchmarks": "benchmarks"}}
    torch = native_folder()
    host = host_wanted()
    if torch is None and not host:
        setuptools.setup(**arguments)  # nothing to compile: a py3-none-any wheel
        return
    # Not where only metadata is asked for: with build isolation pip installs CMake after it has those.
    if not {"egg_info", "dist_info", "sdist"} & set(sys.argv):
        require_cmake()
    # _C is built against Python's limited API and torch's stable one, so one wheel serves every Python from 3.10;
    # _host is not (pybind11 needs the full API) and ties the wheel to the Python that built it.
    options: dict[str, Any] = {} if host else {"options": {"bdist_wheel": {"py_limited_api": "cp310"}}}
    wrapper.setup(cmake_source_dir=".", cmake_args=cmake_arguments(torch, host), **options, **arguments)


if __name__ == "__main__":
    main()
