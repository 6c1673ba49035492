"""``resnet-fast report``: make one HTML page of folders of result files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..io import safe_files
from .output import show


def report(
    folders: Annotated[
        list[Path],
        typer.Argument(
            help="Folders of result files, such as benchmarks/results or out/bench, or single files.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="The page to write, one file that loads nothing.")] = Path(
        "out/report.html"
    ),
) -> None:
    """Make one page of result files: ours against each peer, rooflines, where a step's time goes, history.

    The folders are those of `make gpu-check`, `make gpu-bench` and `resnet-fast bench`, also of a run that was cut.
    """
    from resnet_fast.benchmarks import page

    safe_files.check_target(out, "a report page", page.is_ours, todo="name another file with --out", make_folder=True)
    content = page.build(folders).encode()
    out.parent.mkdir(parents=True, exist_ok=True)
    show(f"written: {safe_files.write_whole(out, content)}")
