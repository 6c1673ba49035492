"""``resnet-fast explain``: the table and the JSON of small nets, and one line for every bad argument."""

from __future__ import annotations

import json
from typing import Any

import pytest

from resnet_fast.cli.main import main


def output(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["explain", *arguments]) == 0
    return capsys.readouterr().out


def rows(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    return json.loads(output(capsys, *arguments, "--json"))["rows"]


def test_the_table_has_a_line_per_block(capsys: pytest.CaptureFixture[str]) -> None:
    out = output(capsys, "resnet18", "--image", "32")
    lines = out.splitlines()
    assert lines[0].split()[:4] == ["layer", "op", "spec", "backend"]
    assert [line.split()[0] for line in lines[2:11]] == [
        "conv1", *(f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1))
    ]  # fmt: skip
    assert "not triton: expected a CUDA device, or TRITON_INTERPRET=1" in out
    assert "floors: " in out


def test_json_follows_the_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    found = rows(capsys, "cifar_resnet20", "--batch", "3", "--backend", "reference", "--dtype", "float64")
    assert len(found) == 10
    assert {row["backend"] for row in found} == {"reference"}
    assert all(row["spec"].startswith("N3 ") and "float64" in row["spec"] for row in found)
    assert found[0]["spec"].startswith("N3 32x32 3->16")


def test_timm_names_the_blocks_that_run_stock(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("timm")
    found = rows(capsys, "skresnet18", "--timm", "--image", "32")
    assert {(row["op"], row["backend"]) for row in found} == {("stem", "onednn"), ("block", "stock")}
    assert "expected a residual block of" in found[1]["why_not"]["fused"]
    assert "SelectiveKernelBasic" in found[1]["why_not"]["fused"]


def test_timm_names_the_pieces_of_a_block_around_a_foreign_layer(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("timm")
    found = rows(capsys, "seresnet18", "--timm", "--image", "32")
    assert {(row["op"], row["backend"]) for row in found} == {("stem", "onednn"), ("conv_bn_act", "onednn")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet19"], "resnet19"),
        (["resnet18", "--image", "0"], "expected --image >= 1, got 0"),
        (["resnet18", "--batch", "-1"], "expected --batch >= 1, got -1"),
        (["resnet18", "--dtype", "int8"], "expected --dtype among float32"),
        (["resnet18", "--backend", "warp"], "expected --backend among"),
        (["resnet18", "--backend", "cuda", "--image", "32"], "backend 'cuda' is not available"),
        (["vgg16", "--image", "32"], "expected a model with blocks of"),
        (["resnet18", "--timm", "--image", "x"], "got: "),
        (["no_such_net", "--timm"], "expected the name of a timm model, got 'no_such_net'"),
    ],
)
def test_bad_arguments_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    if "--timm" in arguments:
        pytest.importorskip("timm")
    assert main(["explain", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert message in captured.err


def test_without_timm_the_reason_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    assert main(["explain", "resnet18", "--timm"]) == 2
    assert "expected timm, " in capsys.readouterr().err
