"""What the machine raises when a launch does what no GPU promises to survive."""

from __future__ import annotations

from typing import Any


class PtxFault(RuntimeError):
    """A launch read or wrote what it must not, or did something that PTX leaves undefined.

    Attributes:
        kernel: name of the kernel.
        line: line of the PTX text.
        source: file and line of the kernel's source, or empty if the PTX does not say.
        block, warp, lane: where in the grid; None if the fault belongs to no single one.
        what: what happened.
    """

    def __init__(self, found: Any, launched: str):
        self.kernel: str = found.kernel
        self.line: int = found.line
        self.source: str = getattr(found, "source", "") or ""
        self.block = getattr(found, "block", None)
        self.warp = getattr(found, "warp", None)
        lane = getattr(found, "lane", None)
        self.lane = None if lane == -1 else lane  # the engine's -1: all lanes of the warp
        self.what: str = getattr(found, "what", "") or str(found)
        place = ", ".join(
            f"{name} {value}"
            for name, value in (("block", self.block), ("warp", self.warp), ("lane", self.lane))
            if value is not None
        )
        at = f"{self.kernel}, PTX line {self.line}" + (f" ({self.source})" if self.source else "")
        super().__init__(f"{at}{': ' + place if place else ''}: {self.what}; launched as {launched}")
