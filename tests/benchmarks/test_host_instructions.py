"""A step keeps its budget of instructions on the host (docs/tables/host-instructions.md)."""

from __future__ import annotations

from typing import Any

import pytest

from resnet_fast import native
from resnet_fast.benchmarks import callgrind, host_instructions
from resnet_fast.benchmarks.host_instructions import Counts, StepCount
from resnet_fast.benchmarks.tables import host_instructions as table

TABLE = table.read()


def _counts(case: str, total: int) -> Counts:
    return {case: {"ours": StepCount({"forward": total}, {"python": total}, [], 0.0)}}


def test_growth_beyond_the_tolerance_is_reported_with_what_to_do() -> None:
    budget: dict[str, Any] = {"train": {"ours": {"forward": 600_000, "backward": 400_000}}}
    limit = int(1_000_000 * (1 + table.TOLERANCE))
    assert table.grown(_counts("train", limit), budget) == []
    (text,) = table.grown(_counts("train", limit + 1), budget)
    assert text.startswith(f"train: expected at most 1,000,000 instructions and 3%, got {limit + 1:,}; ")
    assert table.COMMAND in text


def test_other_versions_are_named() -> None:
    now = host_instructions.versions()
    assert table.other_versions({"versions": now}) == ""
    text = table.other_versions({"versions": now | {"torch": "1.0"}})
    assert text.startswith(f"torch {now['torch']} in place of 1.0; count at the last good commit")


def test_the_table_has_every_case() -> None:
    assert set(TABLE["budget"]) == set(host_instructions.CASES)


@pytest.mark.slow
@pytest.mark.skipif(bool(callgrind.obstacle()), reason=callgrind.obstacle())
@pytest.mark.skipif(isinstance(native.submitter(), str), reason="needs the native library")
@pytest.mark.skipif(bool(table.other_versions(TABLE)), reason=f"a table of {table.other_versions(TABLE)}")
def test_no_step_takes_more_instructions_than_its_budget() -> None:
    assert table.grown(host_instructions.count(), TABLE["budget"]) == []
