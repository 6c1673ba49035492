"""``resnet-fast reproduce``: runs are trained once and continued, and pages agree with the logs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from resnet_fast.cli.main import main
from resnet_fast.training.experiments import report as pages
from resnet_fast.training.experiments import runs

TINY = ("data=digits", "size=8", "subset=64", "batch=32", "epochs=1", "warmup=0", "milestones=[]")


def reproduce(out: Path, *names: str, more: tuple[str, ...] = ()) -> int:
    changes = [text for change in (*TINY, *more) for text in ("--set", change)]
    return main(["reproduce", *names, "--out", str(out), "--threads", "1", "--device", "cpu", *changes])


def test_without_names_lists_the_experiments(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "degradation", "depth", "bottleneck", "shortcuts", "responses", "flops", "all",
    ]  # fmt: skip


def test_flops_needs_no_training(tmp_path: Path) -> None:
    assert main(["reproduce", "flops", "--out", str(tmp_path)]) == 0
    page = (tmp_path / "reduced" / "flops.md").read_text()
    assert "| resnet34 | shortcut A | 224 | 21.62 M | 3.644 G | 18.6% | 3.6 G |" in page  # the paper's 18 %


def test_page_says_what_the_logs_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reproduce(tmp_path, "shortcuts") == 0
    root = tmp_path / "reduced"
    page = (root / "shortcuts.md").read_text()
    assert (root / "shortcuts.png").stat().st_size > 10_000
    for key, label in (("cifar_resnet20", "resnet-20"), ("cifar_resnet20-B", "resnet-20, B")):
        kept = [json.loads(line) for line in (root / "logs" / f"{key}.jsonl").read_text().splitlines()]
        logged = [json.loads(line) for line in (root / "runs" / f"{key}-seed0" / "log.jsonl").read_text().splitlines()]
        assert kept == [line for line in logged if line["kind"] in ("run", "epoch")]
        last = kept[-1]
        row = next(line for line in page.splitlines() if line.startswith(f"| {label} |"))
        assert f"| {100 * last['train_error']:.2f} % | {100 * last['val_error']:.2f} %" in row
    assert "--set data=digits" in page and "digits at 8x8" in page
    first = capsys.readouterr()
    assert "epoch" in first.err

    assert reproduce(tmp_path, "shortcuts") == 0  # nothing left to train
    assert "epoch" not in capsys.readouterr().err
    assert (root / "shortcuts.md").read_text() == page

    assert reproduce(tmp_path, "shortcuts", more=("lr=0.2",)) == 2  # runs of another recipe are not passed off as these
    assert "other lr" in capsys.readouterr().err


def test_unknown_protocol_and_experiment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "flops", "--protocol", "quick", "--out", str(tmp_path)]) == 2
    assert "expected a protocol among reduced, full" in capsys.readouterr().err
    assert main(["reproduce", "width", "--out", str(tmp_path)]) == 2
    assert not list(tmp_path.iterdir())


def test_full_protocol_without_files_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["reproduce", "shortcuts", "--protocol", "full", "--data-path", str(tmp_path), "--out", str(tmp_path)])
    assert code == 2
    assert "cifar-10-python.tar.gz" in capsys.readouterr().err


def test_a_page_of_others_is_left_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runs, "train_case", lambda *_: pytest.fail("trained"))
    (tmp_path / "pages" / "logs").mkdir(parents=True)
    for name in ("shortcuts.md", "shortcuts.png", "logs/cifar_resnet20.jsonl"):
        (tmp_path / "pages" / name).write_text("mine")
        assert main(["reproduce", "shortcuts", "--out", str(tmp_path), "--report", str(tmp_path / "pages")]) == 2
        assert f"{name} (there already, and not" in capsys.readouterr().err
        assert (tmp_path / "pages" / name).read_text() == "mine"
        (tmp_path / "pages" / name).unlink()


def test_out_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["reproduce", "flops", "--out", str(tmp_path / "file")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "Not a directory" in err


def test_a_verdict_is_printed_though_the_page_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(self: pages.Page, folder: Path) -> tuple[Path, ...]:
        raise OSError(28, "No space left on device", str(folder))

    monkeypatch.setattr(pages.Page, "save", full)
    assert main(["reproduce", "flops", "--out", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out.startswith("flops: ") and "No space left on device" in err
