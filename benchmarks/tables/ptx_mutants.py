"""Change compiled kernels one instruction at a time, and write how the PTX machine notices: docs/tables/ptx-mutants.*.

    python -m resnet_fast.benchmarks.tables.ptx_mutants        needs nvcc

ptx_mutant_cases.py has the launches whose kernels are changed.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

import triton

from resnet_fast.tools.ptx_machine import mutants
from resnet_fast.tools.ptx_machine.judgement import MutantVerdict, judge

from .. import markdown
from ..markdown import LEFT, RIGHT
from . import FOLDER
from .cuda_budgets import nvcc_version, readable
from .ptx_mutant_cases import CASES, launches_of

JSON, PAGE = FOLDER / "ptx-mutants.json", FOLDER / "ptx-mutants.md"
COMMAND = "python -m resnet_fast.benchmarks.tables.ptx_mutants"
SEED = 19

RELATIVES = 3
"""Further launches that a survivor must survive, where there are as many: the last ones, of other numbers and walks."""


@dataclass(frozen=True)
class MutantRow:
    """A mutant of the table: its kernel (as people call it), architecture, kind, change and verdict."""

    kernel: str
    arch: int
    kind: str
    change: str
    caught: str
    equivalent: str


def rows_of(name: str, arch: int) -> Iterator[MutantRow]:
    """Yield the mutants of a case, judged."""
    case = CASES[name]
    for launch, *relatives in launches_of(case, arch):
        for mutant in mutants.draw(launch, SEED, each=case.each):
            verdict = judge(launch, mutant, relatives[-RELATIVES:])
            yield row_of(mutant, arch, verdict)


NVCC_HASH = re.compile(r"_GLOBAL__N__[0-9a-f]{8}(_\d+_\w+?_cu_)[0-9a-f]{8}")
"""nvcc hashes a file's path into the names of its unnamed namespace, and a row says the same in every checkout."""


def row_of(mutant: mutants.Mutant, arch: int, verdict: MutantVerdict) -> MutantRow:
    """Return the row of a judged mutant."""
    change = NVCC_HASH.sub(r"_GLOBAL__N__\1", f"{mutant.was} -> {mutant.becomes.replace('`', '')}")
    kernel = readable(mutant.kernel) if mutant.kernel.startswith("_Z") else mutant.kernel
    return MutantRow(kernel, arch, mutant.kind, change, verdict.caught, verdict.equivalent)


def all_rows() -> list[MutantRow]:
    """Return every mutant of every case."""
    return [row for name, case in CASES.items() for arch in case.archs for row in rows_of(name, arch)]


WAYS = ("finding", "result", "schedules", "counts")


def score(rows: Iterable[MutantRow], by: Callable[[MutantRow], str]) -> str:
    """Return a table of how mutants ended, a row for each value of ``by`` and one for all."""
    ends: dict[str, Counter[str]] = {}
    for row in rows:
        end = row.caught or ("equivalent" if row.equivalent else "survivor")
        for key in (by(row), "all"):
            ends.setdefault(key, Counter())[end] += 1
    columns = (*WAYS, "equivalent", "survivor")
    order = sorted(ends, key=lambda key: (key == "all", key))
    body = [(key, ends[key].total(), *(ends[key][c] for c in columns)) for key in order]
    return markdown.table(("", "mutants", *columns), body, [LEFT, *[RIGHT] * (1 + len(columns))])


def page(rows: Sequence[MutantRow], compilers: dict[str, str]) -> str:
    """Return the table as Markdown."""
    others = [row for row in rows if not row.caught]
    listed = markdown.table(
        ("kernel", "sm", "kind", "change", "why it computes the same"),
        [(r.kernel, r.arch, r.kind, f"`{r.change}`", r.equivalent or "**survivor**") for r in others],
    )
    versions = ", ".join(f"{name} {version}" for name, version in compilers.items())
    return "\n\n".join(
        [
            "# Mutants of compiled kernels in the PTX machine",
            f"Written by `{COMMAND}`; compiled by {versions}. docs/ptx-machine.md says what a mutant is, how one is "
            "caught, and what makes one equivalent.",
            "## By kernel",
            score(rows, lambda r: f"{r.kernel}, sm_{r.arch}"),
            "## By kind of change",
            score(rows, lambda r: r.kind),
            "## Not caught",
            listed + "\n",
        ]
    )


def compilers() -> dict[str, str]:
    """Return name -> version of the compilers whose PTX is changed."""
    return {"Triton": triton.__version__, "nvcc": nvcc_version().removeprefix("nvcc ")}


def write(rows: Sequence[MutantRow], by: dict[str, str]) -> None:
    """Write both files."""
    listed = ",\n".join(json.dumps(asdict(row)) for row in rows)
    JSON.write_text(f'{{"compilers": {json.dumps(by)}, "mutants": [\n{listed}\n]}}\n')
    PAGE.write_text(page(rows, by))


if __name__ == "__main__":
    write(all_rows(), compilers())
