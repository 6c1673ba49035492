"""Run the command ``resnet-fast bench`` alone: ``python -m resnet_fast.benchmarks.run``."""

from __future__ import annotations

import sys

import typer

from resnet_fast.cli.bench import bench
from resnet_fast.errors import UserError


def main() -> None:
    """Exit code 2 and one line on stderr for input that cannot be used."""
    try:
        typer.run(bench)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
