"""HTML of the report page: its skeleton and style, labels of figures, tables that a phone shows row by row."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from .results import Run

MARK = '<meta name="generator" content="resnet-fast report">'
"""What tells our page from another file that must not be replaced."""

LABELS = {
    "measured": "a clock, on the machine that is named",
    "counted": "shapes, machine code or counters of a run",
    "modelled": "a prediction from counts and a device's ceilings; nobody measured it",
    "simulated": "a kernel run without its GPU: right or wrong, never a time",
}


NONE = "&ndash;"
"""The cell of a figure that there is not."""


def commit_text(commit: str) -> str:
    return f"commit {commit[:10]}" if commit else "no commit recorded"


def origin(run: Run, commit: str, date: str) -> str:
    """Return device, versions, commit and date of a figure as one text."""
    return "; ".join(filter(None, (run.device, run.versions_text, commit_text(commit), date[:10])))


def style() -> str:
    """Return the page's style sheet."""
    return (Path(__file__).parent / "page.css").read_text(encoding="utf-8")


def label(kind: str) -> str:
    """Return the label of a figure, one of :data:`LABELS`."""
    return f'<span class="label {kind}" title="{escape(LABELS[kind])}">{kind}</span>'


def paragraph(text: str, kind: str = "") -> str:
    """Return a paragraph; ``text`` is HTML."""
    return f'<p class="{kind}">{text}</p>' if kind else f"<p>{text}</p>"


def table(
    caption: str,
    headings: Sequence[str],
    rows: Iterable[tuple[str, Sequence[str]]],
    numbers: Iterable[int] = (),
    whole: Iterable[int] = (),
    bar: int | None = None,
) -> str:
    """Return a table that a narrow screen shows as one card per row.

    Args:
        caption: HTML.
        headings: plain text.
        rows: the class of a row, and its cells as HTML; the first is the row's heading.
        numbers: columns that are aligned right.
        whole: columns whose cells take the width of a card.
        bar: the column of bars.
    """
    numbers, whole = set(numbers), set(whole)
    head = "".join(
        f'<th role="columnheader" scope="col"{" class=number" if i in numbers else ""}>{escape(text)}</th>'
        for i, text in enumerate(headings)
    )
    body = []
    for kind, cells in rows:
        out = [f'<th role="rowheader" scope="row">{cells[0]}</th>']
        for i, cell in enumerate(cells[1:], 1):
            names = ["number"] * (i in numbers) + ["whole"] * (i in whole) + ["bar"] * (i == bar)
            shown = f' data-label="{escape(headings[i])}"' if i != bar else ""
            out.append(f'<td role="cell" class="{" ".join(names)}"{shown}>{cell}</td>')
        body.append(f'<tr role="row" class="{kind}">{"".join(out)}</tr>')
    return (
        f'<div class="wrap"><table role="table" class="cards"><caption>{caption}</caption><thead><tr role="row">{head}'
        f"</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def details(summary: str, body: str) -> str:
    """Return a part that is opened by a click."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def figure(picture: str, caption: str) -> str:
    """Return a picture with its caption; both are HTML."""
    return f"<figure>{picture}<figcaption>{caption}</figcaption></figure>"


def page(title: str, lead: str, sections: Sequence[tuple[str, str, str]], foot: str) -> str:
    """Return the whole document.

    Args:
        title: plain text.
        lead: HTML above the sections.
        sections: anchor, heading and HTML of each.
        foot: HTML below.
    """
    links = "".join(f'<li><a href="#{anchor}">{escape(heading)}</a></li>' for anchor, heading, _ in sections)
    body = "\n".join(
        f'<section aria-labelledby="{anchor}"><h2 id="{anchor}">{escape(heading)}</h2>\n{html}</section>'
        for anchor, heading, html in sections
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n{MARK}\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style()}</style>\n</head>\n<body>\n<header><h1>{escape(title)}</h1>\n"
        f'{lead}\n<nav aria-label="Sections"><ul>{links}</ul></nav></header>\n<main>\n{body}\n</main>\n'
        f"<footer>{foot}</footer>\n</body>\n</html>\n"
    )
