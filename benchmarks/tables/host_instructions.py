"""Count the instructions of steps on the host and write docs/tables/host-instructions.{json,md}.

    python -m resnet_fast.benchmarks.tables.host_instructions

The counts hold for the versions that the table names: another torch or another build of Python executes others.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .. import host_instructions, markdown
from ..host_instructions import Counts
from . import FOLDER

COMMAND = "python -m resnet_fast.benchmarks.tables.host_instructions"
JSON, PAGE = FOLDER / "host-instructions.json", FOLDER / "host-instructions.md"

TOLERANCE = 0.03
"""By how much a count may exceed the table's: docs/notes/host-time.md derives it."""


def grown(counts: Counts, budget: dict[str, Any]) -> list[str]:
    """Return a sentence for each of our steps that takes more instructions than its budget and the tolerance allow."""
    found = []
    for case, sides in counts.items():
        now, then = sides["ours"].total, sum(budget[case]["ours"].values())
        if now > then * (1 + TOLERANCE):
            text = f"{case}: expected at most {then:,} instructions and {TOLERANCE:.0%}, got {now:,}"
            found.append(f"{text}; find them by --top of host_instructions, or write the table again by {COMMAND}")
    return found


def other_versions(table: dict[str, Any]) -> str:
    """Return how this machine's versions differ from the table's; empty if they do not."""
    now = host_instructions.versions()
    differ = [f"{name} {now[name]} in place of {then}" for name, then in table["versions"].items() if now[name] != then]
    return f"{', '.join(differ)}; count at the last good commit and at this one, and compare" if differ else ""


def read() -> dict[str, Any]:
    """Return the table: ``versions``, and instructions by case, side and phase in ``budget``."""
    found: dict[str, Any] = json.loads(Path(JSON).read_text())
    return found


def write(counts: Counts) -> None:
    """Write the table and the page of counts that were made on this machine."""
    versions = host_instructions.versions()
    budget = {case: {side: one.phases for side, one in sides.items()} for case, sides in counts.items()}
    lines = ",\n".join(f"  {json.dumps(case)}: {json.dumps(sides)}" for case, sides in budget.items())
    JSON.write_text(f'{{\n "versions": {json.dumps(versions)},\n "budget": {{\n{lines}\n }}\n}}\n')
    page = [
        "# Instructions of a step on the host",
        f"ResNet-50. {host_instructions.MISSING} Written by benchmarks/tables/host_instructions.py.",
        host_instructions.table(counts),
        "A row without a phase is a whole step.",
        markdown.table(("counted with", "version"), versions.items()),
    ]
    PAGE.write_text("\n\n".join(page) + "\n")


def main() -> None:
    write(host_instructions.count())


if __name__ == "__main__":
    main()
