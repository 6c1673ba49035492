"""The build backend in pyproject.toml: scikit-build-core's, after a check that the build tools are installed.

``pip install --no-build-isolation .`` uses the tools in the environment. If one is missing, this check prints one line
that says what to install, where pip would print a traceback.
"""

from __future__ import annotations

import re
from importlib import metadata

TOOLS = ("scikit-build-core[setuptools]>=1.0", "setuptools>=77", "pybind11>=2.13", "ninja", "cmake>=3.25")
"""The tools that a build without isolation needs. The first two run the build; the others compile the native parts."""

INSTALL = f"pip install torch {' '.join(tool if tool.isalnum() else repr(tool) for tool in TOOLS)}"
"""With torch, which stays: torch 2.11 needs a setuptools before 82, and pip by itself would take the newest."""


def numbers(version: str) -> tuple[int, ...]:
    """Return the first three numbers of a version."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def lacking(requirement: str) -> str:
    """Return what is wrong with the installed distribution of ``requirement``, or an empty string."""
    name, _, minimum = requirement.partition(">=")
    name = name.partition("[")[0]
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return f"no {name}"
    return f"{name} {version}" if minimum and numbers(version) < numbers(minimum) else ""


def check() -> None:
    """Exit with one line if the tools that run the build are missing or too old."""
    if found := [reason for tool in TOOLS[:2] if (reason := lacking(tool))]:
        raise SystemExit(
            f"expected the build tools of resnet_fast, got {' and '.join(found)}; run `{INSTALL}` first, or leave out "
            "--no-build-isolation for the package without its native library"
        )


check()

from scikit_build_core.setuptools.build_meta import *  # noqa: E402, F403 - pip calls the hooks by their names
