"""``resnet-fast``: the table of commands, and the handling of their errors.

A command is a plain function in its own file. Only the file of the requested command is imported, so a command that
cannot be imported does not break the others.
"""

from __future__ import annotations

import importlib
import itertools
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .. import flags
from .._version import __version__
from ..errors import UserError, printable
from .failures import BROKEN_PIPE, INTERRUPTED, PROGRAM, describe_failure, did_you_mean, option_names
from .output import accept_any_text, fill_closed_streams, silence

COMMANDS = {
    "demo": "resnet_fast.cli.demo:demo",
    "predict": "resnet_fast.cli.predict:predict",
    "validate": "resnet_fast.cli.validate:validate",
    "export": "resnet_fast.cli.export:export",
    "train": "resnet_fast.cli.train:train",
    "reproduce": "resnet_fast.cli.reproduce:reproduce",
    "bench": "resnet_fast.cli.bench:bench",
    "report": "resnet_fast.cli.report:report",
    "explain": "resnet_fast.cli.explain:explain",
    "tune": "resnet_fast.cli.tune:tune",
    "warm": "resnet_fast.cli.warm:warm",
    "models": "resnet_fast.cli.models:models",
    "summary": "resnet_fast.cli.summary:summary",
    "roofline": "resnet_fast.cli.roofline:roofline",
    "env": "resnet_fast.cli.env:env",
}
"""Command -> module and function, in the order of ``--help``."""


def _load(name: str) -> Callable[..., Any]:
    """Return the function of a command, or one that raises if the module cannot be imported."""
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
            if cmd_name.startswith("-"):
                return None  # an option, which typer refuses
            close = did_you_mean(cmd_name, list(COMMANDS))
            todo = close.removeprefix("; ") or f"`{PROGRAM} --help` describes them"
            raise UserError(f"a command among {', '.join(COMMANDS)}", repr(cmd_name), todo)
        # An app with a single command is that command: typer's public way from a function to a command.
        single = typer.Typer(add_completion=False, context_settings=HELP)
        single.command(name=cmd_name)(_load(cmd_name))
        return typer.main.get_command(single)


HELP = {"help_option_names": ["-h", "--help"]}

app = typer.Typer(name=PROGRAM, cls=_LazyGroup, add_completion=False, context_settings=HELP)


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
    if ctx.invoked_subcommand is None:
        if text := ctx.get_help():  # empty where rich has printed it already
            print(text)
    elif ctx.invoked_subcommand != "env":  # it reports every switch itself
        _check_switches()


def _check_switches() -> None:
    """Warn of variables with our prefix that are no switch, and raise for a value that cannot be read."""
    if os.environ.get("RANK", "0") == "0":  # under torchrun, once
        for name, todo in flags.unknown().items():
            _complain(f"warning: the environment sets {name}, which is no switch; {todo}")
    for flag in flags.TABLE:
        flag.read()


def _check_given(arguments: Sequence[str]) -> None:
    """Raise for an empty argument: often an unset shell variable, which Python would take for the current folder."""
    for before, word in itertools.pairwise(arguments):
        option, equals, value = word.partition("=")
        if word == "" or (equals and not value and option.startswith("--")):
            raise UserError(f"something after {option or before}", "an empty text", "give a value, or leave it out")


def _complain(message: str) -> None:
    print(printable(f"{PROGRAM}: {' '.join(message.split())}"), file=sys.stderr)


def _show_traceback(error: Exception) -> bool:
    try:
        return flags.DEBUG.enabled()
    except UserError as unreadable:
        if str(unreadable) != str(error):  # which is said anyway
            _complain(str(unreadable))
        return False


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (``sys.argv`` if None) and return the exit code.

    Returns:
        0: done. 1: an error in the program. 2: a request that cannot be served, explained in one line on stderr. 130:
        interrupted. 141: the reader of the output closed it. ``RESNET_FAST_DEBUG=1`` prints the traceback as well.
    """
    fill_closed_streams()
    accept_any_text()
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        _check_given(given)
        with warnings.catch_warnings():
            # Pillow prints source lines when it warns of damaged metadata. A picture it cannot read is our own error.
            warnings.filterwarnings("ignore", module=r"PIL\.")
            result = typer.main.get_command(app).main(args=given, prog_name=PROGRAM, standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except (BrokenPipeError, SystemExit) as error:  # typer turns a broken pipe into an exit
        if isinstance(error, SystemExit) and not isinstance(error.__context__, BrokenPipeError):
            raise
        silence()
        return BROKEN_PIPE
    except Exception as error:
        if _show_traceback(error):
            traceback.print_exc()
        found = describe_failure(error, *_requested(given))
        _complain(found.line)
        return found.code


def _requested(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """Return the requested command and its options."""
    name = next((word for word in arguments if not word.startswith("-")), None)
    if name not in COMMANDS:
        return PROGRAM, option_names(typer.main.get_command(app))
    return f"{PROGRAM} {name}", option_names(_LazyGroup().get_command(None, name))


if __name__ == "__main__":
    sys.exit(main())
