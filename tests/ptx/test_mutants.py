"""Compiled kernels with one instruction changed: the machine notices each change, or shows that it changes nothing.

A sample of the mutants in docs/tables/ptx-mutants.json; the slow test judges all of them again.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter

import pytest
import torch

from resnet_fast import native
from resnet_fast.benchmarks.tables import ptx_mutants
from resnet_fast.benchmarks.tables.ptx_mutants import CASES, MutantRow, compilers, launches_of, page
from resnet_fast.tools.ptx_machine import mutants, ptx_machine
from resnet_fast.tools.ptx_machine.judgement import judge, reason
from resnet_fast.tools.ptx_machine.recorded import execute, recorded
from tests.support.toy_kernels import copy_kernel

pytestmark = pytest.mark.skipif(not native.ptx_status(), reason=native.ptx_status().reason)


def kept() -> tuple[list[MutantRow], dict[str, str]]:
    """Return the rows of the table, and the compilers of its kernels."""
    table = json.loads(ptx_mutants.JSON.read_text())
    return [MutantRow(**row) for row in table["mutants"]], table["compilers"]


def as_judged(row: MutantRow) -> tuple[object, ...]:
    """Return what does not depend on where tensors lie: there a wrong address is a finding, here a wrong result."""
    return row.kernel, row.arch, row.kind, row.change, bool(row.caught), row.equivalent


@pytest.mark.parametrize("arch", ptx_mutants.ARCHS)
def test_a_sample_is_caught_or_equivalent(arch: int) -> None:
    ways: Counter[tuple[str, str]] = Counter()
    for launch, *relatives in launches_of(CASES["inference: 3x3, fp16, residual"], arch):
        for mutant in mutants.draw(launch, seed=3, each=2):
            verdict = judge(launch, mutant, relatives)
            assert not verdict.survived, mutant
            ways[mutant.kind, verdict.caught or "equivalent"] += 1
    assert ways["wait", "finding"] and ways["store", "result"] and ways["address", "finding"]
    assert sum(n for (_, way), n in ways.items() if way != "equivalent") > ways.total() / 2


def test_reasons_hold_for_no_mutant_that_gives_another_result() -> None:
    """Each reason is tried on mutants that are known to compute something else; of vectors, too."""
    kinds = ("immediate", "operand", "comparison", "modifier", "guard", "store", "address")
    wrong: list[mutants.Mutant] = []
    for launch, *relatives in launches_of(CASES["inference: 1x1, bf16"], 80):
        for mutant in mutants.draw(launch, 0, kinds, 8):
            if judge(launch, mutant).caught == "result":
                wrong.append(mutant)
                text = mutant(launch.kernel, launch.text)
                assert reason(mutant, text, [launch, *relatives]) == "", mutant
    assert len(wrong) >= 10
    assert any("," in mutant.was.operands[0] for mutant in wrong)


def test_draw_is_seeded_and_leaves_one_line_changed() -> None:
    (launch, *_), *_ = launches_of(CASES["inference: 1x1, bf16"], 90)
    first, again, other = (list(mutants.draw(launch, seed)) for seed in (0, 0, 1))
    assert first == again != other
    assert {m.kind for m in first} >= {"barrier", "wait", "immediate", "operand", "address", "store"}
    for mutant in first:
        before, after = (t.split("\n") for t in (launch.text, mutant(launch.kernel, launch.text)))
        changed = [n for n, (a, b) in enumerate(zip(before, after, strict=True), 1) if a != b]
        assert changed == [mutant.was.line]


def test_a_launch_is_executed_again_as_it_was() -> None:
    x, y = torch.randn(300), torch.zeros(300)
    with recorded(90) as (_, launches):
        copy_kernel[(2,)](x, y, 290, BLOCK=256)
    (launch,) = launches
    y.zero_()
    end = execute(launch, seed=3)
    assert torch.frombuffer(bytearray(end.memory[1]), dtype=torch.float32)[:290].equal(x[:290])
    assert not y.any(), "memory of its own"
    store = next(s for s in mutants.statements(launch.text, launch.kernel) if s.opcode.startswith("st.global"))
    missing = mutants.Mutant(launch.kernel, "store", store, None)
    assert judge(launch, missing).caught == "result"
    with ptx_machine(90, rewrite=missing):
        copy_kernel[(2,)](x, y, 290, BLOCK=256)
    assert not y.equal(torch.cat([x[:290], torch.zeros(10)]))


OPEN = 4
"""Mutants of the table that compute the same for a reason that no executed program shows yet. The page names them."""


def expect_few_survivors(rows: list[MutantRow]) -> None:
    """Other compilers' code gives other mutants, of which no larger share may be open."""
    survivors = [row for row in rows if not row.caught and not row.equivalent]
    assert len(survivors) <= OPEN * len(rows) / len(kept()[0]), survivors


def test_the_table_has_every_kernel_and_kind_and_few_survivors() -> None:
    rows, by = kept()
    assert len(rows) >= 60
    assert {row.kind for row in rows} == set(mutants.KINDS)
    expect_few_survivors(rows)
    assert ptx_mutants.PAGE.read_text() == page(rows, by)


@pytest.mark.slow
@pytest.mark.skipif(not native.status() or shutil.which("nvcc") is None, reason="needs the native library and nvcc")
def test_all_mutants_are_judged_as_the_table_says() -> None:
    rows, by = ptx_mutants.all_rows(), kept()[1]
    expect_few_survivors(rows)
    if by == compilers():
        assert [as_judged(row) for row in rows] == [as_judged(row) for row in kept()[0]]
