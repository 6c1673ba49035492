"""``resnet-fast export``: from weights or a name to a file, and what is printed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from resnet_fast.cli import main as cli
from resnet_fast.io.weight_facts import Facts
from resnet_fast.models import registry
from resnet_fast.tools import exporting

FACTS = Facts("cifar_resnet20", 16, ("cat", "dog"), (0.5,) * 3, (0.25,) * 3, 1.0, "B")


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "w.safetensors"
    net = registry.build("cifar_resnet20", num_classes=2, shortcut="B")
    save_file(net.state_dict(), path, metadata={"resnet_fast": FACTS.to_json()})
    for i in range(3):
        Image.new("RGB", (30, 20 + i), (80 * i, 99, 200)).save(tmp_path / f"{i}.png")
    return path


def _main(*arguments: object) -> int:
    return cli.main(["export", *map(str, arguments)])


def test_weights_become_a_program_with_their_facts(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "net.pt2"
    assert _main(weights, "--out", out, "--images", tmp_path, "--size", 24, "--json") == 0
    captured = capsys.readouterr()
    told = json.loads(captured.out)
    assert (told["inputs"], told["largest"], told["size"], told["batch"]) == (7, 0.0, 24, None)
    facts = exporting.facts_in(out.read_bytes(), ".pt2")
    assert facts is not None and facts.size == 24 and facts.classes == ("cat", "dog")
    assert "net: cifar_resnet20 (as the file says)" in captured.err
    assert torch.export.load(str(out)).module()(torch.zeros(1, 3, 24, 24)).shape == (1, 2)


def test_a_name_is_a_net_with_random_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _main("cifar_resnet20", "--out", tmp_path / "net.pt2", "--static", "--batch", 2) == 0
    out, err = capsys.readouterr()
    assert "input (2, 3, 32, 32) float32" in out and "largest difference 0" in out
    assert "weights: random, seed 0" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["cifar_resnet20", "--out", "net.pth"], "ending in .pt2 or .onnx"),
        (["cifar_resnet20", "--out", "w.safetensors"], "ending in .pt2 or .onnx"),
        (["cifar_resnet21", "--out", "net.pt2"], "did you mean"),
        (["none.pth", "--out", "net.pt2"], "none.pth"),
        (["w.safetensors", "--out", "net.pt2", "--size", 0], "--size >= 1"),
        (["w.safetensors", "--out", "net.pt2", "--batch", 4], "give --static"),
        (["w.safetensors", "--out", "net.pt2", "--images", "none.png"], "none.png"),
        (["cifar_resnet20", "--out", "net.pt2", "--model", "resnet18"], "leave them out"),
    ],
)
def test_unusable_requests(
    arguments: list[object],
    said: str,
    weights: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert _main(*arguments) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "net.pt2").exists()
