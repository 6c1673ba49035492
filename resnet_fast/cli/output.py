"""Print tables without cutting them, sentences, and a progress bar on stderr."""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import sys
import unicodedata
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from ..errors import printable

if TYPE_CHECKING:
    from rich.console import RenderableType


_PLAIN = {"…": "...", "×": "x", "·": "*", "→": "->", "←": "<-", "≤": "<=", "≥": ">=", "≈": "~", "µ": "u", "μ": "u"}
_PLAIN |= dict.fromkeys("–—−‑", "-") | dict.fromkeys("‘’", "'") | dict.fromkeys("“”„", '"') | dict.fromkeys("•●", "*")


def _plain(character: str) -> str:
    """Return a character in ASCII: a box line as -, | or +, a letter without its accent, else escaped as in Python."""
    if character in _PLAIN:
        return _PLAIN[character]
    name = unicodedata.name(character, "")
    if name.startswith("BOX DRAWINGS"):
        straight = "" if " AND " in name else name.split()[-1]
        return {"HORIZONTAL": "-", "VERTICAL": "|"}.get(straight, "+")
    letters = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
    return letters or character.encode("ascii", "backslashreplace").decode()


def _transliterate(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_plain, error.object[error.start : error.end])), error.end


def accept_any_text() -> None:
    """Let stdout and stderr replace characters that their encoding lacks: one of them must not lose a whole report."""
    codecs.register_error("resnet_fast.plain", _transliterate)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="resnet_fast.plain")


def fill_closed_streams() -> None:
    """Open the null device for standard streams that are closed (``>&-``).

    Otherwise what is printed would go into any file that is opened under the same number.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            try:
                os.fstat(number)
            except OSError:
                os.dup2(os.open(os.devnull, os.O_RDWR), number)
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - as long as the process


def silence() -> None:
    """Discard what is still to be flushed: nobody reads stdout any more."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def show(*parts: RenderableType) -> None:
    """Print to stdout. Tables are fitted to the width of a terminal; otherwise each row is one line, for programs."""
    from rich.console import Console
    from rich.table import Table

    from .fitting import fit

    width = terminal_width()
    console = Console(width=width or 1000)
    for part in parts:
        for one in fit(part, width) if width and isinstance(part, Table) else [part]:
            console.print(one, highlight=False, markup=False)


def terminal_width() -> int | None:
    """Return the width of the terminal in columns; None if stdout is no terminal."""
    from rich.console import Console

    console = Console()
    return console.width if console.is_terminal else None


def say(text: str) -> None:
    """Print a sentence to stderr, flushed, with control characters escaped."""
    print(printable(text), file=sys.stderr, flush=True)


@contextlib.contextmanager
def progress_bar(silent: bool = False, eta: bool = False) -> Iterator[Callable[[int, int, str], None]]:
    """Yield a function ``progress(done, total, what)`` that moves a progress bar on stderr.

    Args:
        silent: Show nothing. Nothing is shown either if stderr is no terminal.
        eta: Show the time that the rest will take at the speed so far.
    """
    if silent:
        yield lambda done, total, what: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    text, percent = TextColumn("{task.description}", markup=False), TextColumn("{task.percentage:>3.0f}%")
    times = (TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn()) if eta else (TimeElapsedColumn(),)
    console = Console(stderr=True)
    bar = Progress(
        *(BarColumn(), percent, *times, text),
        console=console,
        transient=True,
        disable=not console.is_terminal,
        redirect_stdout=sys.stdout.isatty(),  # else what goes to a file or a pipe would land on stderr
    )
    with bar as progress:
        task = progress.add_task("loading", total=None)
        yield lambda done, total, what: progress.update(task, completed=done, total=total, description=what)
