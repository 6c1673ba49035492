"""What the sdist and the wheels hold: exactly the files that are listed here, from the list of the sources."""

from __future__ import annotations

import subprocess
import tarfile
import zipfile
from pathlib import Path

import resnet_fast
from tests.support import ROOT

LIBRARY = "resnet_fast/_C.abi3.so"
LINK = "resnet_fast/benchmarks"
"""In a checkout a link to benchmarks/, which setup.py installs under this name."""

NOT_PACKED = {".gitignore", LINK}
"""Sources that belong to a checkout alone."""

RESULTS = "benchmarks/results/"
"""What was measured: for the documentation, which a wheel does not hold either."""

EGG_INFO = ("PKG-INFO", "SOURCES.txt", "dependency_links.txt", "entry_points.txt", "requires.txt", "top_level.txt")
DIST_INFO = ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt")


def sources() -> set[str]:
    """Return the files of the checkout as git lists them, new ones too, without those that it ignores.

    Raises:
        FileNotFoundError: git is not installed.
        subprocess.CalledProcessError: this is no checkout, but for example an unpacked sdist.
    """
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {name for name in listed.split("\0") if name and (ROOT / name).exists()}


def of_wheel(names: set[str], native: bool) -> set[str]:
    """Return what a wheel of these sources holds, with or without the native library."""
    own = {name for name in names if name.startswith("resnet_fast/") and name != LINK}
    own |= {f"resnet_fast/{n}" for n in names if n.startswith("benchmarks/") and not n.startswith(RESULTS)}
    about = {f"resnet_fast-{resnet_fast.__version__}.dist-info/{name}" for name in DIST_INFO}
    return own | about | ({LIBRARY} if native else set())


def of_sdist(names: set[str]) -> set[str]:
    """Return what the sdist of these sources holds, below its own folder: all that it is built and tested from."""
    made = {"PKG-INFO", "setup.cfg", *(f"resnet_fast.egg-info/{name}" for name in EGG_INFO)}
    return (names - NOT_PACKED) | made


def in_wheel(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


def in_sdist(sdist: Path) -> set[str]:
    with tarfile.open(sdist) as archive:
        return {member.name.partition("/")[2] for member in archive.getmembers() if not member.isdir()}


def differences(held: set[str], expected: set[str]) -> list[str]:
    """Return a sentence for each file that is missing or that does not belong; none if the two are equal."""
    return [f"{name} is missing" for name in sorted(expected - held)] + [
        f"{name} does not belong" for name in sorted(held - expected)
    ]
