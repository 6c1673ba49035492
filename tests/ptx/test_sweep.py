"""Shipped configs as compiled: a sample of docs/tables/ptx-sweep.md, and what makes a row fail."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from resnet_fast import native
from resnet_fast.backends.triton import problem
from resnet_fast.benchmarks.tables import ptx_sweep
from resnet_fast.benchmarks.tables.ptx_sweep import ARCHS, SweepPair, SweepRow, pairs, run
from resnet_fast.tools.ptx_machine.stock import Tf32Convolutions
from resnet_fast.tuning import configs, training_configs
from tests.support.toy_kernels import copy_kernel

pytestmark = pytest.mark.skipif(not native.ptx_status(), reason=native.ptx_status().reason)


def expect_passed(some: list[SweepPair]) -> None:
    rows = [run(pair) for pair in some]
    assert not [row for row in rows if row.error]
    assert all(row.instructions and row.ratio is not None for row in rows)


def small(arch: int, needs_proof: bool) -> SweepPair:
    """Return a pair that is quickly compiled."""
    found = (p for p in pairs(arch) if configs.needs_proof(p.launch, p.config) == needs_proof)
    return min((p for p in found if p.launch.kernel == "conv_bn_act_3x3"), key=lambda p: p.launch.macs())


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("needs_proof", [True, False])
def test_a_pair_of_each_kind_passes(arch: int, needs_proof: bool) -> None:
    before = torch.backends.cudnn.allow_tf32
    expect_passed([small(arch, needs_proof)])
    assert torch.backends.cudnn.allow_tf32 is before


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_a_sample_passes(arch: int) -> None:
    expect_passed(ptx_sweep.sample(8, 0, (arch,)))


@pytest.mark.parametrize("arch", ARCHS)
def test_the_pairs_are_every_admitted_config_of_every_kernel(arch: int) -> None:
    found = pairs(arch)
    assert len({pair.name for pair in found}) == len(found) > 1600
    assert {pair.launch.kernel for pair in found} == {*configs.SHIPPED, *training_configs.SHIPPED}
    proofs = [configs.needs_proof(pair.launch, pair.config) for pair in found]
    assert proofs == sorted(proofs, reverse=True) and sum(proofs) > 150
    assert [pair.name for pair in ptx_sweep.sample(6, 1, (arch,))] == [p.name for p in ptx_sweep.sample(6, 1, (arch,))]


def test_a_wrong_result_and_a_finding_are_failed_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = small(90, needs_proof=False)
    monkeypatch.setattr(problem.Problem, "run", lambda self, config: self.eager())
    assert "expected a launch" in run(pair).error
    real = problem.Problem.prepared
    monkeypatch.setattr(problem.Problem, "run", lambda self, config: real(self, config)() * 1.01)
    assert "over the budget" in run(pair).error

    def outside(self: problem.Problem, config: configs.Config) -> torch.Tensor:
        past = self.x.untyped_storage().nbytes()  # in elements, twice what there is
        copy_kernel[(past // 256,)](self.x, self.x, past, BLOCK=256)
        return self.eager()

    monkeypatch.setattr(problem.Problem, "run", outside)
    assert "PtxFault" in run(pair).error


def test_rows_are_kept_until_the_sources_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair, path, ran = small(80, needs_proof=False), tmp_path / "build" / "rows.jsonl", []
    row = SweepRow(pair.name, 80, "k", "p", "c", False, "", 1.0, {"k": 1}, 5, "", 0, 0.1, "", "")
    now = {"triton": ptx_sweep.triton.__version__, "kernels": ptx_sweep.proofs.versions()["kernels"]}

    def fake(pair: SweepPair) -> SweepRow:
        ran.append(pair)
        return replace(row, **now, error="wrong" if len(ran) == 1 else "")

    monkeypatch.setattr(ptx_sweep, "run", fake)
    for again, count in ((False, 1), (False, 1), (True, 2), (True, 2)):
        ptx_sweep.sweep([pair], again, path)
        assert len(ran) == count
    assert ptx_sweep.kept(path)[pair.name].error == ""
    other = path.read_text().replace(now["kernels"], "other sources")
    path.write_text(other)
    ptx_sweep.sweep([pair], False, path)
    assert len(ran) == 3
    path.write_text(other.replace(now["triton"], "1.0"))
    assert ptx_sweep.kept(path) == {}


def test_the_page_is_of_its_numbers_and_names_what_fails() -> None:
    content = json.loads(ptx_sweep.JSON.read_text())
    assert ptx_sweep.PAGE.read_text() == ptx_sweep.page(content)
    assert content["packed_constants"] >= 0 and sum(content["kernels"].values()) == sum(
        line["run"] for line in content["summary"]
    )
    failed = Counter(row["name"].split()[0] for row in content["failed"])
    for arch in ARCHS:
        lines = [line for line in content["summary"] if line["arch"] == arch]
        assert sum(line["pairs"] for line in lines) == len(pairs(arch))
        assert sum(line["run"] - line["passed"] for line in lines) == failed[f"sm_{arch}"]


def test_stock_pytorch_drops_what_a_tensor_core_does_not_read() -> None:
    x, w = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3)
    exact = torch.nn.functional.conv2d(x, w)
    cut = [(t.view(torch.int32) & -(1 << 13)).view(torch.float32) for t in (x, w)]
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode, Tf32Convolutions():
            found, double = torch.nn.functional.conv2d(x, w), torch.nn.functional.conv2d(x.double(), w.double())
        assert torch.equal(found, torch.nn.functional.conv2d(*cut)) and not torch.equal(found, exact)
        assert (double - exact).abs().max() < 1e-5
    x.requires_grad_()
    with Tf32Convolutions():
        torch.nn.functional.conv2d(x, w).backward(torch.ones_like(exact))
    want = torch.nn.grad.conv2d_input(x.shape, cut[1], torch.ones_like(exact))
    assert torch.equal(x.grad, want)
