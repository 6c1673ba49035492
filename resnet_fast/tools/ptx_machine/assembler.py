"""What the machine cannot see: PTX that is right, and that ptxas makes wrong machine code of.

One construct is known (docs/notes/eight-warps.md). A constant that is added to packed 16-bit integers becomes 0 where
only one half of the sum is used. ptxas 12.8.93, 12.9.86, 13.0.88 and 13.1.80 do so, 13.3.33 does not.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

import triton

_ADDS = re.compile(r"^\s*(?:@!?%\w+\s+)?add\.[su]16x2\s+%\w+,\s*([^,]+),\s*([^;]+);")
_CONSTANT = re.compile(r"^\s*mov\.[bus](?:16|32)\s+(%\w+),\s*-?\w+;")
_PACKED = re.compile(r"^\s*mov\.b32\s+(%\w+),\s*\{([^}]+)\};")
_DROPPED = re.compile(r"VIADD\.16x2\s+\w+,\s*\w+,\s*-?0x0\b")


def packed_constants(text: str) -> list[int]:
    """Return the lines of PTX that add a constant to packed 16-bit integers."""
    constants: set[str] = set()
    found = []

    def is_constant(operand: str) -> bool:
        return operand in constants or not operand.startswith(("%", "_"))

    for number, line in enumerate(text.split("\n"), 1):
        if moved := _CONSTANT.match(line):
            constants.add(moved[1])
        if (packed := _PACKED.match(line)) and any(is_constant(half.strip()) for half in packed[2].split(",")):
            constants.add(packed[1])
        if (added := _ADDS.match(line)) and any(is_constant(operand.strip()) for operand in added.groups()):
            found.append(number)
    return found


def dropped_constants(text: str, ptxas: str | None = None) -> int:
    """Return how many of these constants are 0 in the machine code of PTX.

    Args:
        text: PTX.
        ptxas: path of the assembler; by default the one that Triton uses for Ampere and Hopper.

    Raises:
        RuntimeError: the assembler refuses the text.
    """
    if not packed_constants(text):
        return 0
    (target,) = re.findall(r"^\.target\s+(\w+)", text, re.MULTILINE)
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(text)
        assembled = subprocess.run(
            [ptxas or triton.knobs.nvidia.ptxas.path, f"-arch={target}", "-o", str(binary), str(source)],
            capture_output=True, text=True,
        )  # fmt: skip
        if assembled.returncode:
            raise RuntimeError(f"ptxas: {assembled.stderr.strip()[:300]}")
        listed = subprocess.run([triton.knobs.nvidia.nvdisasm.path, "-c", str(binary)], capture_output=True, text=True)
    return len(_DROPPED.findall(listed.stdout))
