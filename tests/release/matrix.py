"""Install the files of a release into clean environments, run them there, and write docs/tables/wheels.{json,md}.

    make release
    .venv/bin/python -m tests.release.matrix --python 3.12 --torch 2.11.0

For each Python and torch, in one environment:

1. the native wheel: the library loads, results equal stock's, Triton's kernels run in its interpreter, the command
   line answers, ``pip check`` finds nothing.

In one environment of each torch (:func:`builds`), after that:

2. the pure wheel in its place;
3. the sdist, built in isolation: a pure package, and no torch is fetched to build it;
4. the sdist without isolation, with a compiler and the torch that is there: a native package.

After each install, what was there before has kept its version. An environment is removed after its checks. Its outcome
is kept in the folder, so that a second call does the others; the table is written when all of the wanted ones are
there.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from resnet_fast.benchmarks.markdown import LEFT, RIGHT, table
from tests.release import artifacts
from tests.release.artifacts import Artifacts, ReleaseError, run
from tests.release.environments import Environment, added, clean, interpreters
from tests.support import ROOT

PYTHONS = ("3.10", "3.11", "3.12", "3.13")
TORCHES = ("2.11.0", "2.14.1", "2.15.0")
"""The oldest torch that is supported, and the newest two."""

ABSENT = {("3.10", "2.15.0"): "torch 2.15 has no wheel for Python 3.10."}
"""Pairs that nobody can install, and why."""

JSON, PAGE = (ROOT / "docs" / "tables" / f"wheels.{kind}" for kind in ("json", "md"))
BUILD_TOOLS = re.compile(r"^BUILD_TOOLS := (.*)$", re.MULTILINE)
FETCHED = re.compile(r"^\s*(?:Collecting|Downloading|Using cached) (?:torch|nvidia|triton)\S*", re.MULTILINE)
WAYS = ("native wheel", "pure wheel", "sdist", "sdist, no isolation")
INTERPRETED = "Triton's interpreter"
"""A column beside those of the ways: the native wheel's Triton kernels."""

Outcome = dict[str, Any]
"""Of one environment: its versions, the error of each way in units of stock's, and what an install added."""


def probe(environment: Environment, expected: str, **switches: str) -> Outcome:
    """Run probe.py with the environment's interpreter, and return what it found."""
    command = [environment.python, "-I", Path(__file__).with_name("probe.py"), expected]
    out = run(command, env={**clean(), **switches}, cwd=environment.folder)
    found: Outcome = json.loads(out.splitlines()[-1])
    return found


def answers(environment: Environment) -> None:
    """Run the command line as a user would, and ask pip whether all requirements are met."""
    program = environment.folder / "bin" / "resnet-fast"
    out = run([program, "explain", "resnet18", "--image", "64"], env=clean(), cwd=environment.folder)
    if "layer4.1" not in out:
        raise ReleaseError(f"expected resnet-fast explain to name each layer, got:\n{out[-2000:]}")
    environment.pip("check")


def build_tools() -> list[str]:
    """Return what docs/install.md has the reader install before a build without isolation."""
    line = BUILD_TOOLS.search((ROOT / "Makefile").read_text())
    assert line is not None
    return re.findall(r"[^\s\"]+", line[1])


def builds(python: str, torch: str) -> bool:
    """Return whether all files are tried in this pair: one for each torch, from the oldest pair to the newest.

    A build depends on the headers of either, each by itself, and takes most of a pair's time. What is not in the table
    is built too.
    """
    if python not in PYTHONS or torch not in TORCHES:
        return True
    return PYTHONS[TORCHES.index(torch) * (len(PYTHONS) - 1) // (len(TORCHES) - 1)] == python


def check(environment: Environment, files: Artifacts, others: bool) -> Outcome:
    """Install the native wheel, and the other files if ``others``, and return the outcome.

    Raises:
        ReleaseError: one of the checks failed.
    """
    before = environment.frozen()
    environment.pip("install", files.native)
    new = added(before, environment.frozen())
    outcome = probe(environment, "native")
    errors = {WAYS[0]: outcome.pop("error")}
    errors[INTERPRETED] = probe(environment, "interpret", TRITON_INTERPRET="1")["error"]
    answers(environment)
    if others:
        errors |= check_others(environment, files)
    return {**outcome, "errors": errors, "added": new}


def check_others(environment: Environment, files: Artifacts) -> dict[str, float]:
    """Install the other files, where the native wheel is now, and return the error of each.

    Raises:
        ReleaseError: one of the checks failed.
    """
    errors = {}

    def install(way: str, expected: str, *arguments: object, **switches: str) -> str:
        environment.pip("uninstall", "--yes", "resnet_fast")
        before = environment.frozen()
        said = environment.pip("install", *arguments, **switches)
        if more := added(before, environment.frozen()):
            raise ReleaseError(f"expected resnet_fast alone to be installed, got {', '.join(more)}")
        errors[way] = probe(environment, expected)["error"]
        return said

    install(WAYS[1], "pure", files.pure)
    said = install(WAYS[2], "pure", "--verbose", files.sdist)
    if fetched := FETCHED.search(said):
        raise ReleaseError(f"expected a build that fetches no torch, got {fetched[0].strip()!r}")
    environment.pip("install", "torch", *build_tools())
    switches = {"RESNET_FAST_BUILD_NATIVE": "1", "RESNET_FAST_BUILD_CUDA": "0"}
    install(WAYS[3], "native", "--no-build-isolation", files.sdist, **switches)
    environment.pip("check")
    return errors


def short(version: str) -> str:
    return version.partition("+")[0]


def page(files: dict[str, Any], outcomes: list[Outcome]) -> str:
    """Return the table as a page: one row for each environment."""
    others = sorted({name for outcome in outcomes for name in outcome["added"]})
    ways = [WAYS[0], INTERPRETED, *WAYS[1:]]
    rows = [
        [outcome["python"], *(short(outcome[name]) for name in ("torch", "torchvision", "triton", "pip"))]
        + [f"{error:.2f}" if (error := outcome["errors"].get(way)) is not None else "" for way in ways]
        for outcome in outcomes
    ]
    parts = [
        "# Wheels and versions",
        "Each row is a clean environment on Linux x86_64, without a GPU. Each number is an error against float64 in "
        "units of stock PyTorch's own, counted: 1 is as good as stock. The net is ResNet-18, in Triton's interpreter "
        "two small blocks. A number stands there only if the checks of its column passed: the package was installed, "
        "its native library loaded (in both native columns), `resnet-fast explain` answered, `pip check` found "
        "nothing, and the install neither changed what was there nor added a distribution of torch's. Written by "
        "tests/release/matrix.py.",
        table(["Python", "torch", "torchvision", "Triton", "pip", *ways], rows, [RIGHT] * (5 + len(ways))),
        *ABSENT.values(),
        "The pure wheel and the sdist were tried once with each torch, and with the oldest and the newest Python. "
        "In isolation the sdist becomes the pure package. Without isolation and with a C++ compiler it has the native "
        "library, here without CUDA kernels.",
        f"Beside torch and torchvision, pip adds what is missing of {', '.join(others)}.",
        table(["file", "bytes"], files["bytes"].items(), [LEFT, RIGHT]),
        table(["the native wheel needs", "found by"], files["audit"].items()),
    ]
    return "\n\n".join(parts) + "\n"


def read() -> dict[str, Any]:
    """Return the table: ``bytes`` of each file, ``audit``, and ``environments``."""
    found: dict[str, Any] = json.loads(JSON.read_text())
    return found


def made(folder: Path) -> Artifacts:
    """Return the files of the release in the folder, built on the first call."""
    record = folder / "artifacts.json"
    if not record.exists():
        files = artifacts.make(folder / "files")
        record.write_text(json.dumps([*map(str, files[:3]), files.audit]))
    sdist, native, pure, audit = json.loads(record.read_text())
    return Artifacts(Path(sdist), Path(native), Path(pure), audit)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.release.matrix", description=__doc__.partition("\n")[0])
    parser.add_argument("--python", action="append", help=f"minor version, may be repeated; default {PYTHONS}")
    parser.add_argument("--torch", action="append", help=f"version, may be repeated; default {TORCHES}")
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "build" / "release", help="of files, outcomes, environments"
    )
    given = parser.parse_args(arguments)
    pythons, torches = given.python or PYTHONS, given.torch or TORCHES
    here = interpreters()
    if missing := [python for python in pythons if python not in here]:
        return refuse(
            f"expected interpreters of Python {', '.join(pythons)} on PATH or in pyenv's folder, got none of "
            f"{', '.join(missing)}; install them, or name those that are here with --python ({', '.join(here)})"
        )
    given.folder.mkdir(parents=True, exist_ok=True)
    outcomes, failed = [], []
    try:
        files = made(given.folder)
    except ReleaseError as error:
        return refuse(str(error))
    for torch in torches:
        for python in pythons:
            if (python, torch) in ABSENT:
                continue
            kept = given.folder / f"python-{python}-torch-{torch}.json"
            if not kept.exists():
                print(f"Python {python}, torch {torch} ...", flush=True)
                try:
                    environment = Environment(given.folder / "environment", here[python], torch)
                    kept.write_text(json.dumps(check(environment, files, builds(python, torch))))
                    environment.remove()
                except ReleaseError as error:
                    failed.append(f"Python {python}, torch {torch}")
                    print(f"{failed[-1]}: {error}\n", file=sys.stderr, flush=True)
                    continue
            outcomes.append(json.loads(kept.read_text()))
    if failed:
        return refuse(f"expected every check to pass, got errors with {'; '.join(failed)}; they stand above")
    if (given.python, given.torch) == (None, None):
        write(files, outcomes)
    return 0


def refuse(said: str) -> int:
    print(said, file=sys.stderr)
    return 1


def write(files: Artifacts, outcomes: list[Outcome]) -> None:
    """Write the table and its page."""
    size = {path.name: path.stat().st_size for path in files[:3]}
    about = {"bytes": size, "audit": files.audit}
    lines = ",\n".join(f"  {json.dumps(outcome)}" for outcome in outcomes)
    head = "".join(f" {json.dumps(key)}: {json.dumps(value)},\n" for key, value in about.items())
    JSON.write_text(f'{{\n{head} "environments": [\n{lines}\n ]\n}}\n')
    PAGE.write_text(page(about, outcomes))


if __name__ == "__main__":
    raise SystemExit(main())
