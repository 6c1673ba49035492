"""``resnet-fast tune`` as a user types it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock

from resnet_fast.backends.triton import device as gpus
from resnet_fast.cli import main as cli
from resnet_fast.dispatch import catalog
from resnet_fast.dispatch import tune as tuning
from resnet_fast.io import safe_files
from resnet_fast.models import registry
from resnet_fast.spec import Verdict
from resnet_fast.tuning import shapes, tables
from resnet_fast.tuning.routes import launch

GPU = "NVIDIA H100 80GB HBM3"


def say(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = cli.main(["tune", *arguments])
    done = capsys.readouterr()
    return code, done.out, done.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["resnet51"], "did you mean"),
        (["resnet50", "--only", "conv_bn"], "did you mean conv_bn_act"),
        (["resnet50", "--only", "xyz"], "choose one of conv_bn_act_1x1, "),
        (["resnet50", "--batch", "0"], "expected --batch >= 1, got 0"),
        (["resnet50", "--image", "-3"], "expected --image >= 1, got -3"),
        (["resnet50", "--budget", "-1"], "expected --budget >= 0, got -1"),
        (["resnet50", "--budget", "nan"], "expected --budget >= 0, got nan"),
        (["resnet50", "--dtype", "float64"], "expected --dtype among float32, bfloat16, float16"),
        ([], "Missing argument"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = say(arguments, capsys)
    assert (code, out) == (2, "") and said in err and err.count("\n") == 1


def test_without_a_gpu_it_says_what_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    verdict = Verdict.no("a CUDA device", "none", "use another backend")
    monkeypatch.setattr(catalog, "availability", lambda: {"triton": verdict})
    code, out, err = say(["resnet50"], capsys)
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert (
        err == "resnet-fast: tuning needs the Triton backend: expected a CUDA device, got none; use another backend\n"
    )


@pytest.fixture
def replaced(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, Any]]]:
    """Replace ``tune()`` with a function, and return the arguments that it gets."""

    def replace(function: Callable[..., tuning.Tuned]) -> list[dict[str, Any]]:
        seen: list[dict[str, Any]] = []

        def tune(net: Any, x: torch.Tensor, budget_s: float, on_progress: Any, path: Path, only: str | None) -> Any:
            seen.append({"net": net, "x": x, "budget": budget_s, "path": path, "only": only})
            return function(path, on_progress)

        monkeypatch.setattr(tuning, "default_device", lambda: torch.device("cpu"))
        monkeypatch.setattr(tuning, "tune", tune)
        monkeypatch.setattr(gpus, "table_of", lambda device: tables.Table(GPU))
        return seen

    return replace


def tuned(path: Path, on_progress: Any) -> tuning.Tuned:
    """Return three launches: ours is faster, stock is faster, not measured."""
    problems = shapes.problems("resnet50", 8, dtype="bfloat16")
    launches = tuple(launch(problems[f"r50.layer1.0.conv{i}"]) for i in (1, 2, 3))
    entries: dict[str, dict[str, float | None]] = {
        str(launches[0]): {"64x64x64 w4 s4": 10.0, "cudnn": 25.0, "cudnn_fused": 20.0},
        str(launches[1]): {"64x64x64 w4 s4": 40.0, "cudnn_fused": 30.0, "128x64x64 w4 s4": None},
    }
    refused = [(str(launches[1]), "128x64x64 w4 s4", "AssertionError: wrong")]
    return tuning.Tuned(tables.Table(GPU, entries), path, launches, 1, 1, 1, 2.5, refused)


def test_options_reach_the_tuner(
    replaced: Callable[..., list[dict[str, Any]]], capsys: pytest.CaptureFixture[str]
) -> None:
    (seen,) = [replaced(tuned)]
    options = ["--batch", "2", "--image", "64", "--dtype", "float16", "--only", "stem", "--budget", "7", "--table", "t"]
    assert say(["resnet18", *options], capsys)[0] == 0
    assert (seen[0]["budget"], seen[0]["path"], seen[0]["only"]) == (7, Path("t"), "stem")
    x, net = seen[0]["x"], seen[0]["net"]
    assert (x.shape, x.dtype) == ((2, 3, 64, 64), torch.float16)
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert not net.training and {p.dtype for p in net.parameters()} == {torch.float16}
    assert net.layer1[0].__dict__["_resnet_fast_backend"] == "triton"


def test_a_training_step_is_tuned_under_autocast(
    replaced: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    def step(path: Path, on_progress: Any) -> tuning.Tuned:
        assert torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
        return tuned(path, on_progress)

    seen = replaced(step)
    code, out, _ = say(["resnet18", "--train", "--image", "64", "--table", "t"], capsys)
    assert code == 0 and "resnet18, batch 1, 64x64, bfloat16, training" in " ".join(out.split())
    assert seen[0]["net"].training and {p.dtype for p in seen[0]["net"].parameters()} == {torch.float32}
    assert seen[0]["x"].dtype == torch.float32


def test_the_table_has_a_row_per_launch_and_the_nets_total(
    replaced: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    def with_total(path: Path, on_progress: Any) -> tuning.Tuned:
        found = tuned(path, on_progress)
        found.net_us, found.net_stock_us = 1000.0, 1500.0
        return found

    replaced(with_total)
    code, out, err = say(["cifar_resnet20", "--table", "t.json"], capsys)
    rows = {line.split(":")[0].strip(" │"): line for line in out.splitlines() if ":" in line and "│" in line}
    assert code == 0 and err == ""
    assert f"cifar_resnet20, batch 1, 32x32, bfloat16, {GPU}" in out
    cells = [[cell.strip() for cell in line.strip("│").split("│")][1:] for line in out.splitlines() if " bn+" in line]
    assert cells == [
        ["64x64x64 w4 s4", "10.0", "20.0", "2.00x"],
        ["cudnn_fused", "30.0", "30.0", "1.00x"],
        ["-", "-", "-", "-"],
    ]
    assert "1,000.0" in rows["net"] and "1,500.0" in rows["net"] and "1.50x" in rows["net"]
    assert "1 launches measured, 1 known before, in 2 s; t.json; 1 left for the next run" in out
    assert "1 candidates refused; --json gives the reasons" in out and "no total" not in out


def test_without_every_launch_there_is_no_total(
    replaced: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    replaced(tuned)
    assert "no total: a launch of the net is not measured yet" in say(["cifar_resnet20", "--table", "t"], capsys)[1]


def test_json(replaced: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    replaced(tuned)
    code, out, err = say(["cifar_resnet20", "--table", "t.json", "--json"], capsys)
    data = json.loads(out)
    assert (code, err) == (0, "")
    assert (data["gpu"], data["table"], data["measured"], data["left"]) == (GPU, "t.json", 1, 1)
    assert [row["best"] for row in data["launches"]] == ["64x64x64 w4 s4", "cudnn_fused", None]
    assert [row["speedup"] for row in data["launches"]] == [2.0, 1.0, None]
    assert data["refused"][0]["reason"] == "AssertionError: wrong" and data["net_us"] is None


def test_an_interrupt_says_how_far_it_got(replaced: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(path: Path, on_progress: Any) -> tuning.Tuned:
        on_progress(3, 40, "conv")
        raise KeyboardInterrupt

    replaced(interrupted)
    code, out, err = say(["cifar_resnet20", "--table", "t.json"], capsys)
    assert (code, out) == (130, "")
    assert "interrupted: 3 of 40 launches are in t.json; the next run measures the others" in err
    assert "Traceback" not in err


def test_a_file_that_is_no_table_is_left_as_it_is(
    replaced: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    replaced(lambda path, on_progress: pytest.fail("measured"))
    (tmp_path / "README_copy.md").write_text("# mine")
    code, out, err = say(["cifar_resnet20", "--table", str(tmp_path / "README_copy.md")], capsys)
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert "README_copy.md (there already, and not a tuning table of" in err and "name another file" in err
    assert (tmp_path / "README_copy.md").read_text() == "# mine"


@pytest.mark.parametrize("json_too", [False, True])
def test_what_was_measured_is_printed_though_the_disk_is_full(
    json_too: bool, replaced: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, on_progress: Any) -> tuning.Tuned:
        found = tuned(path, on_progress)
        found.unsaved = "No space left on device"
        return found

    replaced(full)
    code, out, err = say(["cifar_resnet20", "--table", "t.json", *["--json"] * json_too], capsys)
    assert code == 2 and "expected a table that can be written, got t.json (No space left on device)" in err
    assert "64x64x64 w4 s4" in out
    if json_too:
        assert len(json.loads(out)["launches"]) == 3


def test_a_table_that_cannot_be_written_later_keeps_the_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = tuned(tmp_path / "t.json", None)
    before = dict(found.table.entries)

    def full(path: Path, content: bytes) -> Path:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(safe_files, "write_whole", full)
        tuning._keep(found, tables.Table(GPU, {"a": {"cudnn": 1.0}}))
    assert found.unsaved == "No space left on device" and "NOT written" in str(found)
    assert found.table.entries == before | {"a": {"cudnn": 1.0}}
    tuning._keep(found, tables.Table(GPU, {"b": {"cudnn": 2.0}}))  # there is room again: all of it is written
    assert found.unsaved == "" and tables.read(found.path, GPU).entries == found.table.entries
    assert {"a", "b", *before} == set(found.table.entries)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the net with one block of three channels."""
    monkeypatch.setattr(registry, "build", lambda name: nn.Sequential(BasicBlock(3, 3)))


@pytest.mark.interpret
def test_a_run_in_the_interpreter(
    tiny: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RESNET_FAST_CACHE", str(tmp_path))
    arguments = ["cifar_resnet20", "--image", "4", "--only", "conv_bn_act", "--json"]
    code, out, err = say(arguments, capsys)
    data, file = json.loads(out), tmp_path / "tuning" / "triton-interpreter.json"
    assert (code, err) == (0, "") and data["table"] == str(file)
    assert (data["measured"], data["kept"], data["left"]) == (2, 0, 0)
    rows = {row["launch"]: row for row in data["launches"]}
    assert "conv_bn_act: N1 4x4 3->3 3x3/1 p1 bn+add+relu bfloat16 nhwc" in rows
    assert all(row["us"] > 0 and row["stock_us"] > 0 and row["speedup"] >= 1 for row in rows.values())
    assert json.loads(file.read_text())["launches"].keys() == rows.keys()
    assert data["net_us"] == pytest.approx(sum(row["us"] for row in rows.values()))
    code, out, err = say([*arguments[:-1], "--budget", "0"], capsys)
    assert (code, err) == (0, "") and "0 launches measured, 2 known before" in out


@pytest.mark.interpret
def test_a_kernel_that_the_net_does_not_launch(tiny: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = say(["cifar_resnet20", "--image", "4", "--only", "stem", "--table", str(tmp_path / "t")], capsys)
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert "expected a model that launches stem, got one that launches conv_bn_act; name one of those" in err


@pytest.mark.interpret
def test_a_table_that_cannot_be_written(tiny: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = say(["cifar_resnet20", "--image", "4", "--table", str(tmp_path)], capsys)
    assert code == 2 and "expected a tuning table of " in err and f"can be written, got {tmp_path} (a folder)" in err
