"""``resnet-fast env``."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def env(as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False) -> None:
    """Versions, devices and backends, and why each backend can or cannot run here."""
    from ..env import collect, render, to_json

    report = collect()
    print(json.dumps(to_json(report), indent=2) if as_json else render(report))
