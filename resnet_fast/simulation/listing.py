"""Read NVIDIA machine code as ``cuobjdump -sass`` prints it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from ..errors import missing_package
from .instruction import Instruction

_LINE = re.compile(
    r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P[0-9T]+)\s+)?([A-Z][A-Za-z0-9_.]*)\s*(.*?)\s*;"
    r"(?:\s*/\* 0x([0-9a-f]{16}) \*/)?"
)
_UPPER = re.compile(r"^\s+/\* 0x([0-9a-f]{16}) \*/")


def cuobjdump(*arguments: str | Path, folder: Path | None = None) -> str:
    """Return what the cuobjdump of Triton's package prints.

    Args:
        arguments: its arguments.
        folder: where it writes what it extracts; by default the present one.

    Raises:
        UserError: there is no Triton.
        subprocess.CalledProcessError: cuobjdump refuses its arguments.
    """
    try:
        import triton
    except ImportError as error:
        raise missing_package("triton", "whose package has cuobjdump", error) from None
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True, cwd=folder).stdout


def parse(text: str, function: str) -> tuple[Instruction, ...]:
    """Return the instructions of one function in a ``cuobjdump -sass`` listing, without the padding at its end.

    Raises:
        ValueError: the listing has no such function.
    """
    out: list[Instruction] = []
    here = False
    for line in text.splitlines():
        if "Function :" in line:
            here = line.split("Function :")[1].strip() == function
        elif here and (m := _LINE.match(line)):
            out.append(Instruction(int(m[1], 16), m[2] or "", m[3], m[4], (int(m[5] or "0", 16), 0)))
        elif here and out and (m := _UPPER.match(line)):
            last = out[-1]
            words = last.words[0], int(m[1], 16)
            out[-1] = Instruction(last.address, last.predicate, last.opcode, last.operands, words)
    if not out:
        raise ValueError(f"no code of {function!r} in this listing")
    while out and (out[-1].name == "NOP" or (out[-1].target == out[-1].address)):
        out.pop()
    return tuple(out)
