"""Clean environments: an interpreter, torch as its index has it, and nothing of this machine's settings."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

from tests.release.artifacts import ReleaseError, run, tool

OWN = re.compile(r"torch|triton|nvidia|cuda")
"""Distributions that a user chose with care, and that no install of this package may add or change."""

Frozen = dict[str, str]
"""Version of each distribution, by name."""


def clean() -> dict[str, str]:
    """Return this process's environment without what changes Python, pip or the package. Certificates stay."""
    of_python = re.compile(r"PIP_(?!CERT$)|PYTHON|VIRTUAL_ENV|RESNET_FAST_|TRITON_|TORCH|CUDA|C(XX|MAKE)")
    kept = {name: value for name, value in os.environ.items() if not of_python.match(name)}
    # No file of pip's settings: a constraint of this machine would choose versions that a user does not get.
    return {**kept, "PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


def interpreters() -> dict[str, Path]:
    """Return the Python interpreters of this machine by minor version, ``3.12``: those on PATH and those of pyenv."""
    found: dict[str, Path] = {}
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    places = [path for minor in range(9, 20) if (path := shutil.which(f"python3.{minor}"))]
    for path in [*sorted(pyenv.glob("3.*/bin/python"), reverse=True), *map(Path, places)]:
        code = "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])"
        # A launcher of pyenv for a version that is not chosen, or a Python without venv, ends with an error.
        done = subprocess.run([str(path), "-c", code], capture_output=True, text=True)
        if done.returncode == 0:
            found.setdefault(done.stdout.strip(), path)
    return found


class Environment:
    """A virtual environment with one Python and one torch. ``pip`` is the one that Python brings.

    Args:
        folder: where it is created; what is there is removed.
        python: the interpreter.
        torch: version of torch, or empty for none. torchvision and Triton are those that belong to it.

    Raises:
        ReleaseError: the environment or torch cannot be installed.
    """

    def __init__(self, folder: Path, python: Path, torch: str = ""):
        shutil.rmtree(folder, ignore_errors=True)
        self.folder = folder
        run([python, "-m", "venv", folder], env=clean())
        self.python = folder / "bin" / "python"
        if torch:
            # uv links the files of its cache: a second environment with this torch costs no download and no disk.
            wanted = [f"torch=={torch}", "torchvision"]
            run([tool("uv"), "pip", "install", "--no-config", "--quiet", "--python", self.python, *wanted], env=clean())

    def pip(self, *arguments: object, **switches: str) -> str:
        """Run pip and return what it printed.

        Raises:
            ReleaseError: pip failed.
        """
        return run([self.python, "-m", "pip", *arguments], env={**clean(), **switches}, cwd=self.folder)

    def frozen(self) -> Frozen:
        """Return what is installed, as ``pip freeze`` would, from the environment's folder."""
        (site,) = self.folder.glob("lib/python3*/site-packages")
        return {found.name: found.version for found in metadata.distributions(path=[str(site)])}

    def remove(self) -> None:
        shutil.rmtree(self.folder)


def added(before: Frozen, after: Frozen) -> list[str]:
    """Return the distributions that an install added, sorted, without resnet_fast.

    Raises:
        ReleaseError: it removed or replaced one, or added one that belongs to torch.
    """
    changed = [
        f"{name} {version} became {after.get(name, 'nothing')}"
        for name, version in before.items()
        if after.get(name) != version and name != "resnet_fast"
    ]
    new = sorted(after.keys() - before.keys() - {"resnet_fast"})
    if unwanted := changed + [f"{name} {after[name]} was added" for name in new if OWN.match(name)]:
        raise ReleaseError(f"expected an install that leaves torch as it is, got {'; '.join(unwanted)}")
    if "resnet_fast" not in after:
        raise ReleaseError("expected resnet_fast to be installed, got an environment without it")
    return new
