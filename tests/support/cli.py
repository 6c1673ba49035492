"""One command of the command line, in this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer
from typer.testing import CliRunner, Result


def invoke(command: Callable[..., Any], *arguments: object) -> Result:
    """Run ``command`` on these arguments and keep its output, exit code and exception."""
    app = typer.Typer()
    app.command()(command)
    return CliRunner().invoke(app, [str(a) for a in arguments])
