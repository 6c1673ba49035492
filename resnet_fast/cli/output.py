"""What the commands print with: tables that nothing cuts, a progress bar on stderr."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType


def show(*parts: RenderableType) -> None:
    """Print to stdout; where that is no terminal there is no width, so nothing wraps or is cut."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=1000)
    for part in parts:
        console.print(part, highlight=False, markup=False)


@contextlib.contextmanager
def progress_bar(silent: bool = False, eta: bool = False) -> Iterator[Callable[[int, int, str], None]]:
    """A rich progress bar on stderr as a ``progress(done, total, what)`` function; one that does nothing if silent, or
    where stderr is no terminal.

    ``eta``: with the time that the rest will take at the speed so far.
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
