"""Compiled kernels with one instruction changed: the machine notices each change, or shows that it changes nothing.

A sample of the mutants in docs/tables/ptx-mutants.json; the slow test judges all of them again.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from dataclasses import replace

import pytest
import torch

from resnet_fast import native
from resnet_fast.backends.triton.training import pool_winner
from resnet_fast.benchmarks.tables import ptx_mutants
from resnet_fast.benchmarks.tables.ptx_mutant_cases import ARCHS, CASES, UNLAUNCHED, launches_of, shipped_kernels
from resnet_fast.benchmarks.tables.ptx_mutants import MutantRow, compilers, page
from resnet_fast.calls import Pool
from resnet_fast.errors import UserError
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


@pytest.mark.parametrize("arch", ARCHS)
def test_a_sample_is_caught_or_equivalent(arch: int) -> None:
    ways: Counter[tuple[str, str]] = Counter()
    for launch, *relatives in launches_of(CASES["inference: 3x3, fp16, residual"], arch):
        for mutant in mutants.draw(launch, seed=3):
            verdict = judge(launch, mutant, relatives)
            assert not verdict.survived, mutant
            ways[mutant.kind, verdict.caught or "equivalent"] += 1
    assert (
        ways["wait", "finding"] and ways["store", "result"] and ways["address", "finding"] + ways["address", "result"]
    )
    assert sum(n for (_, way), n in ways.items() if way != "equivalent") > ways.total() / 2


def test_reasons_hold_for_no_mutant_that_gives_another_result() -> None:
    """Each reason is tried on mutants that are known to compute something else; of vectors, too."""
    kinds = ("immediate", "operand", "comparison", "modifier", "guard", "store", "address")
    wrong: list[mutants.Mutant] = []
    for launch, *relatives in launches_of(CASES["inference: 1x1, bf16"], 80):
        for mutant in mutants.draw(launch, 0, kinds, 6):
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
    for mutant in (m for m in first if m.behind is None):
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
    elsewhere = replace(missing, was=replace(store, line=store.line - 1))
    with pytest.raises(UserError, match=rf"`{re.escape(str(store))}` at line {store.line - 1} of copy_kernel, got"):
        judge(launch, elsewhere)
    with pytest.raises(UserError, match="PTX with the kernel other, got one with copy_kernel; name a kernel"):
        mutants.statements(launch.text, "other")


def survivors(rows: list[MutantRow]) -> list[MutantRow]:
    return [row for row in rows if not row.caught and not row.equivalent]


def test_the_table_has_every_kind_and_no_survivor() -> None:
    rows, by = kept()
    assert len(rows) >= 60
    assert {row.kind for row in rows} == set(mutants.KINDS)
    assert survivors(rows) == []
    assert ptx_mutants.PAGE.read_text() == page(rows, by)


def test_the_table_has_every_kernel_on_every_architecture() -> None:
    judged = {(row.kernel.partition("<")[0], row.arch) for row in kept()[0]}
    shipped = {(kernel, arch) for kernel in shipped_kernels() for arch in ARCHS}
    assert len(shipped) >= 70
    assert set(UNLAUNCHED) <= shipped
    assert judged == shipped - set(UNLAUNCHED)


def test_a_branch_whose_sides_differ_is_no_reason() -> None:
    """Both sides of a division of 64-bit numbers give the quotient; where one gives the rest, turning it is no mutant
    that computes the same, although no launch comes there."""
    act = torch.relu(torch.randn(2, 16, 5, 3)).half().contiguous(memory_format=torch.channels_last)
    with recorded(80) as (_, launches):
        pool_winner.pool_forward(act, Pool(3, 2, 1))
    (launch,) = launches
    turned = next(
        mutants.Mutant(launch.kernel, "comparison", s, replace(s, opcode="setp.eq.b64"))
        for s in mutants.statements(launch.text, launch.kernel)
        if s.opcode == "setp.ne.b64" and s.operands[2] == "0"
    )
    assert judge(launch, turned).equivalent == "same value by the other branch"
    wrong = replace(launch, text=launch.text.replace("div.s64", "rem.s64", 1))
    assert not judge(wrong, turned).equivalent
    assert reason(turned, turned(wrong.kernel, wrong.text), [wrong]) == ""


def test_a_moved_statement_stands_behind_the_next_one() -> None:
    (launch, *_), *_ = launches_of(CASES["inference: 1x1, bf16"], 80)
    (moved,) = mutants.draw(launch, 3, ["order"])
    assert moved.behind is not None
    before, after = (t.split("\n") for t in (launch.text, moved(launch.kernel, launch.text)))
    changed = [n for n, (a, b) in enumerate(zip(before, after, strict=True), 1) if a != b]
    assert changed == [moved.was.line, moved.behind.line]
    assert after[moved.behind.line - 1].strip() == f"{moved.behind} {moved.was}"


@pytest.mark.slow
@pytest.mark.skipif(not native.status() or shutil.which("nvcc") is None, reason="needs the native library and nvcc")
def test_all_mutants_are_judged_as_the_table_says() -> None:
    rows, by = ptx_mutants.all_rows(), kept()[1]
    if by != compilers():  # other code gives other mutants
        assert len(survivors(rows)) <= len(rows) / 400, survivors(rows)
    else:
        assert survivors(rows) == []
        assert [as_judged(row) for row in rows] == [as_judged(row) for row in kept()[0]]
