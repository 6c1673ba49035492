"""``resnet-fast validate``: its output, files and exit code on a small run."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import save_file

from resnet_fast.cli import main as cli
from resnet_fast.io.weight_facts import Facts
from resnet_fast.models import registry

pytestmark = pytest.mark.usefixtures("same_threads")


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Save untrained weights of ten named classes and a folder with four of them; one picture is damaged."""
    names = tuple(f"kind{i}" for i in range(10))
    net = registry.build("cifar_resnet20", num_classes=10).eval()
    facts = Facts("cifar_resnet20", 16, names, (0.5,) * 3, (0.25,) * 3, 1.0, data="folder")
    path = tmp_path / "w.safetensors"
    save_file(net.state_dict(), path, metadata={"resnet_fast": facts.to_json()})
    for number in (7, 1, 3, 5):
        folder = tmp_path / "data" / f"kind{number}"
        folder.mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (20, 24), (30 * number, 80 * i, 99)).save(folder / f"{i}.png")
    (tmp_path / "data" / "kind3" / "1.png").write_bytes(b"no picture")
    return path


def _main(*arguments: object) -> int:
    return cli.main(["validate", *map(str, arguments), "--workers", "0", "--threads", "1"])


def test_json_and_csv_say_the_same(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = (weights, "--data-path", tmp_path / "data", "--csv", tmp_path / "o.csv", "--batch", 4)
    assert _main(*given, "--json") == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    lines = list(csv.DictReader((tmp_path / "o.csv").read_text().splitlines()))
    read = [line for line in lines if not line["error"]]
    assert len(read) == found["images"] == 11 and len(lines) == 12 and len(found["unreadable"]) == 1
    assert found["top1"] == sum(int(line["right"]) for line in read) / 11
    assert found["top5"] == sum(int(line["in_top5"]) for line in read) / 11
    for row in found["per_class"]:
        mine = [line for line in read if line["class"] == row["name"]]
        assert row["images"] == len(mine) and all(f"/{row['name']}/" in line["image"] for line in mine)
        assert row["top1"] == sum(int(line["right"]) for line in mine) / len(mine)
    assert [row["class"] for row in found["per_class"]] == [1, 3, 5, 7] and found["images_per_s"] > 0
    assert err.count("not read: ") == 1 and "classes matched by name" in err


def test_tables_name_the_classes_and_the_speed(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _main(weights, "--data-path", tmp_path / "data") == 0
    out = capsys.readouterr().out
    assert all(f"kind{i}" in out for i in (1, 3, 5, 7)) and "kind2" not in out
    assert "img/s on cpu" in out and "top-5" in out and "1 unreadable images not counted" in out


def test_a_run_is_its_own_example(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    train = ["train", "--data", "digits", "--size", 8, "--steps", 3, "--threads", 1, "--out", run, "--set", "subset=64"]
    assert cli.main([str(a) for a in [*train, "--json", "--no-tensorboard"]]) == 0
    logged = json.loads(capsys.readouterr().out)["epochs"][-1]
    assert _main(run / "model.safetensors", "--json") == 0
    assert json.loads(capsys.readouterr().out)["error"] == logged["val_error"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["--batch", 0], "--batch >= 1"),
        (["--amp", "int8"], "--amp among none, bfloat16, float16"),
        (["--device", "tpu"], "device"),
        (["--csv", "-"], "where the tables go"),
        (["--data", "mnist"], "data among digits"),
        (["--data-path", "nowhere"], "which is no folder"),
        (["--model", "resnet5"], "resnet5"),
    ],
)
def test_unusable_options(
    weights: Path, tmp_path: Path, changes: list[object], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _main(weights, "--data-path", tmp_path / "data", *changes) == 2
    err = capsys.readouterr().err
    assert said in err.splitlines()[-1] and "Traceback" not in err
