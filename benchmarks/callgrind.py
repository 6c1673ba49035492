"""Count the instructions of parts of a Python program under callgrind, a tool of valgrind.

The program calls :class:`Requests` around what it wants counted, in whichever thread; instructions of all threads are
counted. :func:`run` starts it and returns the counts. Unlike a time, a count is nearly the same on each run and on a
loaded machine. Valgrind shows the program a processor of its own with AVX2, whatever the real one has, so libraries
choose the same code everywhere.

callgrind's files (format: valgrind's manual, "Callgrind Format Specification") name each object and function once, and
refer to them by number from then on.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from resnet_fast.benchmarks import extension
from resnet_fast.errors import UserError

SOURCE = Path(__file__).with_name("callgrind.cpp")
HEADER = "valgrind/callgrind.h"
_FOLDERS = (Path("/usr/include"), Path("/usr/local/include"))

_NAMED = re.compile(r"(ob|fn|cob|cfn)=\((\d+)\)(?: (.*))?$")
_COST = re.compile(r"[-+*\d]\S* (\d+)$")
_TRIGGER = "desc: Trigger: Client Request: "


@dataclass
class CountedPart:
    """The instructions between two requests of a program.

    Attributes:
        name: what the program called it.
        functions: instructions by object file and function, without those of the functions that it calls. Code that is
            in no file, such as oneDNN's, has the object ``???``.
    """

    name: str
    functions: Counter[tuple[str, str]] = field(default_factory=Counter)


class Requests:
    """What a program asks of the callgrind that runs it. Outside of callgrind, nothing happens."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(str(extension.built(SOURCE)))

    def start(self) -> None:
        """Count from here on."""
        self._library.callgrind_start()

    def stop(self) -> None:
        """Stop counting."""
        self._library.callgrind_stop()

    def part(self, name: str) -> None:
        """End a part, which began at the part before it. ``name`` has no line breaks."""
        self._library.callgrind_dump(name.encode())


def obstacle() -> str:
    """Return why nothing can be counted on this machine; empty if it can."""
    needs = "valgrind with its headers (apt-get install valgrind, dnf install valgrind valgrind-devel)"
    if shutil.which("valgrind") is None:
        return f"expected {needs}, got no valgrind in PATH"
    if not any((folder / HEADER).exists() for folder in _FOLDERS):
        return f"expected {needs}, got no {HEADER} in {' or '.join(map(str, _FOLDERS))}"
    return ""


def version() -> str:
    """Return valgrind's version; ``none`` without it."""
    if shutil.which("valgrind") is None:
        return "none"
    return subprocess.run(["valgrind", "--version"], capture_output=True, text=True).stdout.strip()


def run(code: str, *arguments: str, timeout: float = 900) -> list[CountedPart]:
    """Run ``python -c code arguments`` under callgrind and return its parts in order.

    The program starts uncounted. Its environment is this process's, without the switches of resnet_fast, Python and
    Triton's interpreter, and with hashes and code paths fixed.

    Raises:
        UserError: there is no valgrind.
        RuntimeError: the program fails, with what it wrote.
    """
    reason = obstacle()
    if reason:
        got, _, rest = reason.partition(", got ")
        raise UserError(got.removeprefix("expected "), rest, "install it")
    extension.built(SOURCE)  # outside of valgrind
    with TemporaryDirectory() as folder:
        out = Path(folder) / "counts"
        command = ["valgrind", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={out}", "-q"]
        python = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(
            [*command, *python], env=_environment(os.environ), capture_output=True, text=True, timeout=timeout
        )
        if done.returncode:
            raise RuntimeError(f"expected {' '.join(python)} to run under valgrind, got\n{done.stdout}{done.stderr}")
        paths = sorted(Path(folder).glob("counts.*"), key=lambda path: int(path.suffix[1:]))
        return [parse(path.read_text().splitlines()) for path in paths]


def _environment(own: Mapping[str, str]) -> dict[str, str]:
    """Return a program's environment: ``own`` without what changes the code that runs, and what fixes it."""
    left_out = re.compile(
        "RESNET_FAST_|PYTHON|TRITON_INTERPRET|OMP_|MKL_|ONEDNN_|DNNL_|ATEN_|GLIBC_TUNABLES|LD_PRELOAD"
    )
    kept = {name: value for name, value in own.items() if not left_out.match(name)}
    fixed = {
        "PYTHONHASHSEED": "0",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    }
    path = own.get("PYTHONPATH")
    return kept | fixed | ({"PYTHONPATH": path} if path else {})


def parse(lines: Iterable[str]) -> CountedPart:
    """Return the part in one of callgrind's files."""
    part = CountedPart("")
    objects: dict[str, str] = {}
    functions: dict[str, str] = {}
    at, called = ["", ""], False
    for line in lines:
        named = _NAMED.match(line)
        if named is not None:
            kind, number, name = named.groups()
            known = objects if kind.endswith("ob") else functions
            if name is not None:
                known[number] = name
            if not kind.startswith("c"):
                at[kind == "fn"] = known[number]
        elif line.startswith("calls="):
            called = True  # the next line has what the called function cost
        elif line.startswith(_TRIGGER):
            part.name = line.removeprefix(_TRIGGER)
        elif (cost := _COST.match(line)) is not None:
            if not called:
                part.functions[at[0], at[1]] += int(cost[1])
            called = False
    return part
