"""``resnet-fast env``: a report of the installation."""

from __future__ import annotations

from typing import Annotated

import typer

from ..io.safe_files import json_text
from .output import terminal_width


def env(as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False) -> None:
    """Print versions, devices, which backends can run here and why not the others, and every environment switch."""
    from ..env import collect, render, to_json

    report = collect()
    # Lines are wrapped for a terminal only, not for a file or a bug report.
    print(json_text(to_json(report), indent=2) if as_json else render(report, terminal_width()))
