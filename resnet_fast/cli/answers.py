"""Write the answers of ``resnet-fast predict`` as tables, a JSON array or CSV, each answer at once and flushed."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

from ..errors import UserError, printable
from ..io.safe_files import check_target, json_text
from .output import show

if TYPE_CHECKING:
    from ..tools.classify import Answer

CSV_HEADER = ("image", "rank", "class", "name", "probability", "error")


class Writer(Protocol):
    """Writes some answers and flushes the output."""

    def __call__(self, answers: Sequence[Answer]) -> None: ...


def tables(answers: Sequence[Answer]) -> None:
    """Print a table per picture."""
    from rich.table import Table
    from rich.text import Text

    for answer in answers:
        if answer.top is None:
            continue
        table = Table("class", "name", "probability")
        for likely in answer.top:
            table.add_row(str(likely.number), Text(likely.name), f"{likely.probability:.4f}")
        show(Text(printable(str(answer.image)), no_wrap=True, overflow="ignore"), table)
    sys.stdout.flush()


@contextmanager
def json_array() -> Iterator[Writer]:
    """Yield a writer of one JSON array on stdout, a line per picture. The array is closed even if the program stops."""
    separator = "[\n"

    def write(answers: Sequence[Answer]) -> None:
        nonlocal separator
        for answer in answers:
            sys.stdout.write(separator + json_text(_plain(answer)))
            separator = ",\n"
        sys.stdout.flush()

    try:
        yield write
    except BrokenPipeError:  # nobody is there to read the end
        raise
    except BaseException:
        sys.stdout.write("[]\n" if separator == "[\n" else "\n]\n")
        raise
    else:
        sys.stdout.write("[]\n" if separator == "[\n" else "\n]\n")


def _plain(answer: Answer) -> dict[str, Any]:
    if answer.top is None:
        return {"image": str(answer.image), "error": answer.refused}
    top = [{"class": t.number, "name": t.name, "probability": t.probability} for t in answer.top]
    return {"image": str(answer.image), "top": top}


@contextmanager
def csv_lines(target: str) -> Iterator[Writer]:
    """Yield a writer of a line per picture and class, to the file ``target`` or to stdout for ``-``."""
    with csv_file(target, CSV_HEADER) as lines:

        def write(answers: Sequence[Answer]) -> None:
            rows: list[tuple[Any, ...]] = []
            for answer in answers:
                name = printable(str(answer.image))
                if answer.top is None:
                    rows.append((name, "", "", "", "", printable(answer.refused)))
                for rank, likely in enumerate(answer.top or (), 1):
                    rows.append((name, rank, likely.number, likely.name, f"{likely.probability:.6g}", ""))
            lines(rows)

        yield write


@contextmanager
def csv_file(target: str, header: Sequence[str]) -> Iterator[Callable[[Sequence[Sequence[Any]]], None]]:
    """Yield a function that writes rows below ``header`` to the file ``target``, or to stdout for ``-``, and flushes.

    Raises:
        UserError: The file cannot be written, or is something other than an earlier one with the same header.
    """

    def ours(content: bytes) -> bool:
        return content.partition(b"\n")[0].rstrip(b"\r") == ",".join(header).encode()

    with ExitStack() as stack:
        if target == "-":
            file: IO[str] = sys.stdout
        else:
            path = Path(target)
            check_target(path, "a CSV file of this command", ours, todo="name another with --csv", largest=None)
            try:
                file = stack.enter_context(path.open("w", encoding="utf-8", errors="backslashreplace", newline=""))
            except OSError as error:
                raise UserError("a file that can be written", f"{path} ({error.strerror})", "correct --csv") from error
        lines = csv.writer(file, lineterminator="\n")

        def write(rows: Sequence[Sequence[Any]]) -> None:
            lines.writerows(rows)
            file.flush()

        write([header])
        yield write
