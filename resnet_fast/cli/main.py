"""``resnet-fast``: the table of commands, and what becomes of their errors.

A command is a plain function in a file of its own. Only the file of the command that was asked for is imported, so
that one which cannot be imported leaves the others working.
"""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .._version import __version__
from ..errors import BackendError, UserError
from ..flags import DEBUG

PROGRAM = "resnet-fast"

COMMANDS = {
    "demo": "resnet_fast.cli.demo:demo",
    "predict": "resnet_fast.cli.predict:predict",
    "train": "resnet_fast.cli.train:train",
    "reproduce": "resnet_fast.cli.reproduce:reproduce",
    "bench": "resnet_fast.cli.bench:bench",
    "explain": "resnet_fast.cli.explain:explain",
    "tune": "resnet_fast.cli.tune:tune",
    "summary": "resnet_fast.cli.summary:summary",
    "roofline": "resnet_fast.cli.roofline:roofline",
    "env": "resnet_fast.cli.env:env",
}
"""Command -> where its function is, in the order of ``--help``."""


def _load(name: str) -> Callable[..., Any]:
    """The command's function, or one that raises where its file cannot be imported."""
    module, _, attribute = COMMANDS[name].partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:
        cause = error

        def unavailable() -> None:
            raise UserError(
                f"the command {name}", f"{type(cause).__name__}: {cause}", "reinstall resnet_fast"
            ) from cause

        unavailable.__doc__ = f"Not available: {type(error).__name__}: {error}"
        return unavailable


class _LazyGroup(TyperGroup):
    """A group whose commands are imported when they are looked up."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        # An app with a single command is that command: typer's public way from a function to a command.
        single = typer.Typer(add_completion=False)
        single.command(name=cmd_name)(_load(cmd_name))
        return typer.main.get_command(single)


app = typer.Typer(name=PROGRAM, cls=_LazyGroup, add_completion=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"{PROGRAM} {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Drop-in ResNets with fused kernels: run them, time them, and see which kernel ran where and why."""
    if ctx.invoked_subcommand is None and (text := ctx.get_help()):  # empty where rich has printed it already
        print(text)


def _complain(message: str) -> None:
    print(f"{PROGRAM}: {' '.join(message.split())}", file=sys.stderr)


def _show_traceback() -> bool:
    try:
        return DEBUG.enabled()
    except UserError as error:
        _complain(str(error))
        return False


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (``sys.argv`` if None) and return the exit code.

    0 done; 1 an error of the program's own; 2 a request that cannot be served, said in one line on stderr; 130
    interrupted. ``RESNET_FAST_DEBUG=1`` prints the traceback before the line.
    """
    command = typer.main.get_command(app)
    try:
        result = command.main(
            args=None if arguments is None else list(arguments), prog_name=PROGRAM, standalone_mode=False
        )
        return result if isinstance(result, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except Exception as error:
        if _show_traceback():
            traceback.print_exc()
        if isinstance(error, (UserError, BackendError)):
            _complain(str(error))
            return 2
        # A command line that cannot be parsed. typer imports or vendors click, depending on its version; the base
        # class of these errors has no public name, their method has.
        if hasattr(error, "format_message"):
            context = getattr(error, "ctx", None)
            path = context.command_path if context is not None else PROGRAM
            _complain(f"expected what '{path} --help' describes, got: {error.format_message()}")
            return 2
        hint = f"an error in {PROGRAM} itself; RESNET_FAST_DEBUG=1 shows where"
        _complain(f"{type(error).__name__}: {error}; {hint}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
