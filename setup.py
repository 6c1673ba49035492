"""The build. CMakeLists.txt defines what is compiled; this file decides whether to compile it.

Environment variables (default first):

``RESNET_FAST_BUILD_NATIVE=auto|0|1``  the native library ``resnet_fast._C``. auto builds it where torch, a C++
                                       compiler and Python's headers are present, 1 fails if they are not
``RESNET_FAST_BUILD_CUDA=auto|0|1``    its CUDA half. auto builds it where nvcc and libtorch_cuda are found
``RESNET_FAST_CUDA_ARCHS``             architectures of that half, as CMAKE_CUDA_ARCHITECTURES spells them. Without it
                                       ``TORCH_CUDA_ARCH_LIST``, as torch's own extensions spell them
``RESNET_FAST_BUILD_HOST=0|auto|1``    the modules without torch, ``resnet_fast._host``, the emulator
                                       ``resnet_fast._emulator``, the PTX machine ``resnet_fast._ptx``, and the cycle
                                       model's ``resnet_fast._sass`` and ``resnet_fast._sm``, for one version of Python

``MAX_JOBS`` limits the compilers that run at the same time, as for torch's own extensions.

torch is not a build requirement: an isolated build would download gigabytes of a torch that is not the user's. So ``pip
install .`` installs the pure Python package, and ``pip install --no-build-isolation .`` adds the native library.
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
from scikit_build_core.errors import FailedLiveProcessError
from scikit_build_core.setuptools import wrapper
from setuptools.command.build import build

TORCH_MINIMUM = (2, 11)  # the stable ABI that CMakeLists.txt targets
CMAKE = SpecifierSet(">=3.25")
COMPILERS = ("c++", "g++", "clang++")
OLDEST_ARCH = 80  # the kernels use instructions of compute capability 8.0
TORCH_ARCHS = {"ampere": "8.0;8.6+PTX", "ada": "8.9+PTX", "hopper": "9.0+PTX", "blackwell": "10.0;10.3;12.0;12.1+PTX"}


def switch(name: str, *choices: str) -> str:
    """Return the value of an environment variable, by default the first of ``choices``."""
    value = os.environ.get(name) or choices[0]
    if value not in choices:
        raise SystemExit(
            f"expected {name} to be one of {', '.join(choices)}, got {value!r}; unset it for {choices[0]!r}"
        )
    return value


def torch_folder() -> tuple[Path | None, str]:
    """Return the directory of the build environment's torch, or None and why not. Does not import torch."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None, "no torch in the building environment (pip install --no-build-isolation uses yours)"
    version = metadata.version("torch")
    release = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if release < TORCH_MINIMUM:
        return None, f"torch {version} is older than {'.'.join(map(str, TORCH_MINIMUM))}"
    return Path(spec.origin).parent, ""


def no_toolchain() -> str:
    """Return why C++ extension modules cannot be compiled here, or an empty string."""
    if not os.environ.get("CXX") and not any(map(shutil.which, COMPILERS)):
        return f"no C++ compiler (looked for {', '.join(COMPILERS)}; set CXX to use another)"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return f"no Python.h in {sysconfig.get_path('include')} (Debian: apt-get install python3-dev)"
    return ""


def require_cmake() -> None:
    """Exit with one line if CMake or a tool that runs its build is missing; pip can install both."""
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


def refuse_or_warn(what: str, reason: str, required: bool) -> None:
    """Exit if ``what`` is required but cannot be built for ``reason``, else print a line to stderr."""
    if required:
        raise SystemExit(
            f"expected to build {what}, got {reason}; unset the RESNET_FAST_BUILD_* variable that asks for it"
        )
    print(f"resnet_fast is built without {what}: {reason}", file=sys.stderr)


def native_folder() -> Path | None:
    """Return torch's directory if ``_C`` is to be built, else None. Prints to stderr why not."""
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
        refuse_or_warn("its native library", reason, "1" in (choice, cuda))
        return None
    return folder


def host_wanted() -> bool:
    """Return whether ``_host`` is to be built. Prints to stderr why not if it was requested."""
    choice = switch("RESNET_FAST_BUILD_HOST", "0", "auto", "1")
    if choice == "0":
        return False
    if reason := no_toolchain():
        refuse_or_warn("its host module", reason, choice == "1")
    return not reason


def archs_of_torch(listed: str) -> list[str]:
    """Return the architectures of TORCH_CUDA_ARCH_LIST as CMake spells them; prints to stderr those that are too old.

    ``8.0;9.0a 12.0+PTX``, or names such as ``Hopper``: numbers with a suffix of their own, and PTX where asked for.
    """
    found, old = [], []
    for name in filter(None, re.split(r"[;,\s]+", listed)):
        for text in TORCH_ARCHS.get(name.lower(), name).split(";"):
            number = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", text)
            if number is None:
                raise SystemExit(
                    f"expected TORCH_CUDA_ARCH_LIST like '8.0;9.0a;12.0+PTX' or the names {', '.join(TORCH_ARCHS)}, "
                    f"got {name!r}; correct it, or set RESNET_FAST_CUDA_ARCHS"
                )
            major, minor, suffix, ptx = number.groups()
            arch = f"{major}{minor}"
            if int(arch) < OLDEST_ARCH:
                old.append(text)
            else:
                found.append(f"{arch}{suffix}" + ("" if ptx else "-real"))
    if old:
        refuse_or_warn(f"kernels for {', '.join(old)} of TORCH_CUDA_ARCH_LIST", "8.0 is the oldest", not found)
    return list(dict.fromkeys(found))


def cuda_archs() -> str:
    """Return the architectures that the environment asks for, or an empty string."""
    if own := os.environ.get("RESNET_FAST_CUDA_ARCHS"):
        return own
    return ";".join(archs_of_torch(os.environ.get("TORCH_CUDA_ARCH_LIST", "")))


def limit_jobs() -> None:
    """Pass MAX_JOBS on to CMake, which has a variable of its own for it."""
    jobs = os.environ.get("MAX_JOBS")
    if not jobs:
        return
    if not jobs.isdigit() or int(jobs) < 1:
        raise SystemExit(
            f"expected MAX_JOBS to be a number of compilers, 1 or more, got {jobs!r}; unset it for all cores"
        )
    os.environ.setdefault("CMAKE_BUILD_PARALLEL_LEVEL", jobs)


def cmake_arguments(torch: Path | None, host: bool) -> list[str]:
    arguments = [f"-DRESNET_FAST_NATIVE={'ON' if torch else 'OFF'}", f"-DRESNET_FAST_HOST={'ON' if host else 'OFF'}"]
    if torch is not None:
        arguments += [
            f"-DRESNET_FAST_TORCH_DIR={torch}",
            f"-DRESNET_FAST_CUDA={os.environ.get('RESNET_FAST_BUILD_CUDA') or 'auto'}",
        ]
    if torch is not None and (archs := cuda_archs()):
        arguments.append(f"-DRESNET_FAST_CUDA_ARCHS={archs}")
    return arguments


def packages() -> list[str]:
    """resnet_fast, and benchmarks/ as its subpackage; in a checkout, resnet_fast/benchmarks is a link to it."""
    own = setuptools.find_packages(include=["resnet_fast", "resnet_fast.*"], exclude=["resnet_fast.benchmarks*"])
    return own + [f"resnet_fast.{name}" for name in setuptools.find_packages(include=["benchmarks", "benchmarks.*"])]


class FreshBuild(build):
    """setuptools' build, without the files of an earlier one: the wheel would hold them too.

    A module that was removed since could still be imported, and a pure wheel would hold an old native library.
    """

    def run(self) -> None:
        if Path(self.build_base) in Path(self.build_lib).parents:  # not a folder that --build-lib names
            shutil.rmtree(self.build_lib, ignore_errors=True)
        try:
            super().run()
        except FailedLiveProcessError as error:  # its traceback would push what CMake said out of sight
            raise SystemExit(
                f"expected to build the compiled parts of resnet_fast, got '{error}' for the reason above; "
                "RESNET_FAST_BUILD_NATIVE=0 builds the package without them"
            ) from None


def main() -> None:
    arguments: dict[str, Any] = {
        "packages": packages(),
        "package_dir": {"resnet_fast.benchmarks": "benchmarks"},
        "cmdclass": {"build": FreshBuild},
    }
    torch = native_folder()
    host = host_wanted()
    if torch is None and not host:
        setuptools.setup(**arguments)  # nothing to compile: a py3-none-any wheel
        return
    limit_jobs()
    # Not if only metadata is requested: with build isolation pip installs CMake after it has the metadata.
    if not {"egg_info", "dist_info", "sdist"} & set(sys.argv):
        require_cmake()
    # _C uses Python's limited API and torch's stable one, so one wheel works with every Python from 3.10. _host uses
    # pybind11, which needs the full API, and ties the wheel to the Python that built it.
    options: dict[str, Any] = {} if host else {"options": {"bdist_wheel": {"py_limited_api": "cp310"}}}
    wrapper.setup(cmake_source_dir=".", cmake_args=cmake_arguments(torch, host), **options, **arguments)


if __name__ == "__main__":
    main()
