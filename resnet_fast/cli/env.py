"""``resnet-fast env``."""

from __future__ import annotations

from typing import Annotated

import typer

from ..io.safe_files import json_text
from .output import terminal_width


def env(as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False) -> None:
    """Versions, devices, backends and why each can or cannot run here, and every environment switch."""
    from ..env import collect, render, to_json

    report = collect()
    # Plain lines where the report goes into a file or a bug report, folded ones where a person reads them.
    print(json_text(to_json(report), indent=2) if as_json else render(report, terminal_width()))
