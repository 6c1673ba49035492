"""``resnet-fast demo`` on a small net: agreement, budget, kernels and files."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.text import Text
from typer.testing import Result

from resnet_fast.benchmarks import providers
from resnet_fast.benchmarks.side_by_side import AnswerPair, largest_gemm_k
from resnet_fast.cli import demo as module
from resnet_fast.dispatch.explain import Explanation, LayerRow
from resnet_fast.models import registry
from tests.support.cli import invoke

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    quick = tuple(p for p in providers.INFERENCE if p.name in ("eager-nhwc", "resnet_fast"))
    monkeypatch.setattr(providers, "INFERENCE", quick)
    (tmp_path / "in").mkdir()
    for i in range(2):
        Image.effect_noise((60 + i, 50), 80).save(tmp_path / "in" / f"{i}.png")
    return tmp_path / "in"


def _run(tmp_path: Path, *arguments: object) -> Result:
    return invoke(module.demo, "--model", "cifar_resnet20", "--rounds", 1, "--out", tmp_path / "o", *arguments)


def test_json(tmp_path: Path, pictures: Path) -> None:
    result = _run(tmp_path, "--images", pictures, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [a["image"] for a in found["answers"]] == ["0.png", "1.png"]
    for answer in found["answers"]:
        assert answer["agree"] and answer["within"] and 0 < answer["accelerated_error"] < 1e-5
    assert sum(k["calls"] for k in found["kernels"]) == 10  # the stem and nine blocks
    ran = {r["provider"]: r["median_ms"] for r in found["speed"]["rows"]}
    assert ran["eager-nhwc"] > 0 and ran["resnet_fast"] > 0
    assert sorted(os.listdir(tmp_path / "o")) == ["demo.csv", "demo.json", "demo.md", "demo.png"]


def test_tables_say_that_random_classes_mean_nothing(tmp_path: Path, pictures: Path) -> None:
    result = _run(tmp_path, "--images", pictures)
    assert result.exit_code == 0, result.output
    assert module.RANDOM in result.stdout and module.BUDGET in result.stdout
    assert "Same answer?" in result.stdout and "Which kernel ran where" in result.stdout
    assert "#" in result.stdout and "demo.png" in result.stdout


def test_weights_give_the_classes_names(tmp_path: Path, pictures: Path) -> None:
    torch.save(registry.build("cifar_resnet20").state_dict(), tmp_path / "w.pth")
    result = _run(tmp_path, "--images", pictures, "--weights", tmp_path / "w.pth")
    assert result.exit_code == 0, result.output
    assert module.RANDOM not in result.stdout and "class " in result.stdout and "w.pth" in result.stdout


def test_disagreement_shows() -> None:
    good = AnswerPair("a", 1, 1, 0.0, 1e-7, 1e-7, 3e-7)
    bad = AnswerPair("b", 1, 2, 0.0, 1e-7, 4e-7, 3e-7)
    assert good.agree and good.within and not bad.agree and not bad.within
    table = module.answer_table([good, bad], None)
    assert list(table.columns[3].cells) == ["yes", "NO"] and list(table.columns[8].cells) == ["yes", "NO"]
    assert list(module.answer_table([bad], ["x", "cat", "[dog]"]).columns[2].cells) == [Text("[dog]")]


def test_kernels_are_counted_by_reason() -> None:
    rows = [LayerRow(f"l{i}", "bottleneck", "", "onednn", {"triton": "no GPU"}) for i in range(3)]
    rows.append(LayerRow("l3", "bottleneck", "", "stock", {"fused": "a hook"}))
    summary = module.summarise(Explanation(tuple(rows), "cpu", ""))
    assert [(s["backend"], s["calls"], s["why_not"]) for s in summary] == [
        ("onednn", 3, {"triton": "no GPU"}),
        ("stock", 1, {"fused": "a hook"}),
    ]
    assert module.explain_table(summary).row_count == 2


def test_largest_gemm_k_is_the_widest_sum() -> None:
    assert largest_gemm_k(registry.build("cifar_resnet20")) == 64 * 9
