"""``resnet-fast models``: every net by name, filtered, as a table and as JSON."""

from __future__ import annotations

import json

import pytest

from resnet_fast.cli.main import main
from resnet_fast.models import registry


def test_the_table_names_every_net(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    out = capsys.readouterr().out
    rows = {line.strip("│ ").split()[0]: line for line in out.splitlines() if line.startswith("│")}
    assert set(rows) == set(registry.names())
    assert "25.56 M" in rows["resnet50"] and "4.089 G" in rows["resnet50"] and "torchvision" in rows["resnet50"]
    assert "--timm" in out


def test_json_of_a_pattern(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "resnext*", "plain18", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [e["name"] for e in found] == ["resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d", "plain18"]
    assert found[0]["params"] == 25_028_904 and found[0]["source"] == "torchvision"


def test_a_pattern_that_matches_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "resnt50"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "did you mean resnet50" in err


def test_timm(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("timm")
    assert main(["models", "--timm", "resnet18", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {e["name"] for e in found} >= {"resnet18", "resnet18d"} and {e["source"] for e in found} == {"timm"}
