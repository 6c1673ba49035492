"""``resnet-fast bench``: files, tables and JSON of a small run, and the options that are refused."""

from __future__ import annotations

import errno
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from resnet_fast.benchmarks import compare
from resnet_fast.cli.bench import bench
from resnet_fast.cli.main import main
from resnet_fast.errors import UserError
from resnet_fast.io import safe_files
from resnet_fast.models import registry
from tests.support.cli import invoke

_run = partial(invoke, bench)

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = ("--model", "cifar_resnet20", "--batch", "1,2", "--rounds", 1, "--dtype", "float32")


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.effect_noise((60, 50), 80).save(tmp_path / "noise.png")
    return tmp_path / "noise.png"


def test_json_is_all_of_stdout_and_files_are_written(tmp_path: Path, picture: Path) -> None:
    result = _run(*SMALL, "--providers", "eager-nchw,resnet_fast", "--images", picture, "--threads", 1,
                  "--out", tmp_path / "o", "--json")  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [(r["provider"], r["batch"]) for r in found["rows"]] == [
        ("eager-nchw", 1), ("resnet_fast", 1), ("eager-nchw", 2), ("resnet_fast", 2)
    ]  # fmt: skip
    for row in found["rows"]:
        assert row["median_ms"] > 0 and row["error_l2"] < 1e-5, row
    assert found["provenance"]["images"] == ["noise.png"] and found["provenance"]["threads"] == 1
    assert sorted(os.listdir(tmp_path / "o")) == ["bench.csv", "bench.json", "bench.md", "bench.png"]
    assert json.loads((tmp_path / "o" / "bench.json").read_text()) == found


def test_table_of_a_suite_and_own_weights(tmp_path: Path, picture: Path) -> None:
    torch.save(registry.build("cifar_resnet20").state_dict(), tmp_path / "w.pth")
    result = _run(*SMALL, "--providers", "eager-nhwc", "--images", picture, "--suite", "blocks",
                  "--weights", tmp_path / "w.pth", "--out", tmp_path / "o")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "cifar_resnet20.layer2.0, float32, batch 2, cpu" in result.stdout
    assert "eager-nhwc" in result.stdout and "bench.png" in result.stdout
    assert str(tmp_path / "w.pth") in (tmp_path / "o" / "bench.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--batch", "1,x"), "expected batch sizes such as 1,16, got '1,x'"),
        (("--batch", ""), "expected batch sizes >= 1, got none"),
        (("--dtype", "int8"), "expected dtypes among"),
        (("--providers", "tvm"), "expected providers among"),
        (("--device", "cuda:77"), "got 'cuda:77'"),
        (("--suite", "x"), "expected a suite among"),
        (("--images", "no-such-folder"), "does not exist"),
        (("--model", "resnet5"), "resnet5"),
    ],
)
def test_unusable_options_write_nothing(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    result = _run("--dtype", "float32", "--out", tmp_path / "o", *arguments)
    assert isinstance(result.exception, UserError)
    with pytest.raises(UserError, match=message):
        raise result.exception
    assert not (tmp_path / "o").exists() or not os.listdir(tmp_path / "o")


def test_out_that_cannot_be_written_is_refused_before_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(compare, "run", lambda *_: pytest.fail("measured"))
    result = _run(*SMALL, "--out", tmp_path / "file")
    assert isinstance(result.exception, UserError) and "a folder to write to" in str(result.exception)


def test_a_file_that_is_no_report_is_left_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "run", lambda *_: pytest.fail("measured"))
    for name, content in (("bench.md", "# mine"), ("bench.csv", "a,b"), ("bench.json", "{}"), ("bench.png", "x")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text(content)
        result = _run(*SMALL, "--out", folder)
        assert isinstance(result.exception, UserError) and f"{name} (there already, and not" in str(result.exception)
        assert (folder / name).read_text() == content and len(os.listdir(folder)) == 1


@pytest.mark.parametrize("as_json", [False, True])
def test_what_was_measured_is_printed_though_it_cannot_be_written(
    as_json: bool, tmp_path: Path, picture: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, content: bytes) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(safe_files, "write_whole", full)
    arguments = [*SMALL, "--providers", "eager-nhwc", "--images", picture, "--threads", "1", "--out", tmp_path / "o"]
    code = main(["bench", *map(str, arguments), *["--json"] * as_json])
    out, err = capsys.readouterr()
    assert code == 2 and err.count("\n") == 1 and "No space left on device" in err and "free some space" in err
    assert "eager-nhwc" in out and "written: " not in out
    if as_json:
        assert json.loads(out)["rows"][0]["median_ms"] > 0


def test_an_own_report_is_replaced(tmp_path: Path, picture: Path) -> None:
    arguments = (*SMALL, "--providers", "eager-nhwc", "--images", picture, "--threads", 1, "--out", tmp_path / "o")
    for _ in range(2):
        result = _run(*arguments)
        assert result.exit_code == 0, result.output


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (MemoryError(), 2)])
def test_cells_measured_before_an_end_are_printed(
    error: BaseException, code: int, tmp_path: Path, picture: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    whole = compare._InferenceCell.run

    def second_fails(self: compare._InferenceCell, *arguments: Any) -> None:
        if self.batch == 2:
            raise error
        whole(self, *arguments)

    monkeypatch.setattr(compare._InferenceCell, "run", second_fails)
    arguments = [*SMALL, "--providers", "eager-nhwc", "--images", picture, "--threads", "1", "--out", tmp_path / "o"]
    assert main(["bench", *map(str, arguments)]) == code
    out = capsys.readouterr().out
    assert "batch 1, cpu" in out and "batch 2" not in out and "written: " not in out


def test_unusable_input_is_one_line_and_exit_code_two(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--dtype", "float32", "--batch", "many"]) == 2
    assert capsys.readouterr().err == "resnet-fast: expected batch sizes such as 1,16, got 'many'; correct --batch\n"
