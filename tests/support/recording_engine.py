"""In place of ``_ptx``: it executes nothing, and records each launch with the parameters that its PTX declares."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

SCALARS = ("u64", "s64", "b64", "f64", "u32", "s32", "b32", "f32", "u16", "b16", "u8", "b8")
BYTES = {kind: int(kind[1:]) // 8 for kind in SCALARS}
_PARAMETER = re.compile(
    r"\s*\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr\s+\.\w+\s+\.align\s+\d+\s+)?(\w+)(?:\[(\d+)\])?"
)


class Fault(Exception):
    """What ``_ptx`` raises for a finding; nothing here does."""


class Module:
    def __init__(self, text: str, name: str) -> None:
        self.text = text
        head = re.search(rf"\.entry\s+{re.escape(name)}\s*\((.*?)\)\s*\n", text, re.S)
        assert head, f"no kernel {name}"
        params = []
        for line in head[1].splitlines():
            found = _PARAMETER.match(line)
            if found:
                align, kind, label, count = found.groups()
                nbytes = BYTES[kind] * int(count or 1)
                params.append((label, kind, nbytes, int(align or nbytes)))
        self.kernels = {name: {"params": params}}
        self.target = re.findall(r"^\.target\s+(\w+)", text, re.M)[0]

    def check(self, kernel: str) -> None:
        assert kernel in self.kernels

    def launch(self, kernel: str, grid: Any, block: Any, shared: int, params: Any, memory: Any, **options: Any) -> Any:
        return SimpleNamespace(counters={}, memory=memory, options=options)


class Memory:
    def __init__(self) -> None:
        self.added: list[tuple[int, int, str, bool]] = []
        self.hosts: list[int] = []
        self.wrote: list[tuple[int, int]] = []

    def add(
        self, address: int, nbytes: int, name: str, written: bool = True, writable: bool = True,
        host: int | None = None,
    ) -> None:  # fmt: skip
        self.added.append((address, nbytes, name, written))
        self.hosts.append(address if host is None else host)

    def remove(self, address: int) -> None:
        assert any(address == at for at, *_ in self.added)

    def device(self, host: int) -> int:
        """Return a kernel's address of what is at ``host`` here."""
        ranges = zip(self.added, self.hosts, strict=True)
        return next(at + host - first for (at, size, *_), first in ranges if first <= host < first + size)

    def write(self, address: int, nbytes: int) -> None:
        self.wrote.append((address, nbytes))


def tensor_map(address: int, dtype: str, shape: Any, strides: Any, box: Any, swizzle: int, fill: str) -> bytes:
    return repr((address, dtype, list(shape), list(strides), list(box), swizzle, fill)).encode().ljust(128)[:128]
