"""Numbers too large for any machine: every command refuses them at once, in one line, before it allocates."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from resnet_fast import limits
from resnet_fast.cli import main as cli

TRAIN = ["train", "--device", "cpu", "--out", "never"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([*TRAIN, "--workers", "99999"], "expected --workers <= "),
        ([*TRAIN, "--threads", "100000"], "expected --threads <= "),
        ([*TRAIN, "--set", "classes=1000000000"], "classes from 1 to 100,000"),
        ([*TRAIN, "--set", "classes=100000"], "a classifier of 100,000 classes to fit into"),
        ([*TRAIN, "--size", "1000000"], "size from 1 to 16,384"),
        ([*TRAIN, "--size", "10000"], "images of 10000x10000 to fit into the 50 MB of memory that are free"),
        ([*TRAIN, "--data", "synthetic", "--size", "4096"], "images of 4096x4096 to fit into"),
        ([*TRAIN, "--set", "pad=1000000"], "pad from 0 to 1,024"),
        ([*TRAIN, "--batch", "1000000000"], "batch from 1 to 1,048,576"),
        ([*TRAIN, "--steps", "1" + "0" * 30, "--set", "warmup=0"], "steps from 1 to 1,000,000,000"),
        ([*TRAIN, "--epochs", "1e30"], "epochs from 1e-06 to 1,000,000"),
        ([*TRAIN, "--data", "cifar10", "--data-path", "x" * 5000], "CIFAR10 files below"),
        ([*TRAIN, "--data", "folder", "--data-path", "x" * 5000], "which is no folder"),
        (["bench", "--batch", "1000000000"], "expected --batch <= 1,048,576"),
        (["bench", "--batch", "100000"], "100,000 images of 224x224 to fit into"),
        (["bench", "--size", "1000000"], "expected --size <= 16,384"),
        (["bench", "--threads", "100000"], "expected --threads <= "),
        (["bench", "--suite", "train", "--batch", "1000000000"], "expected --batch <= 1,048,576"),
        (
            ["bench", "--suite", "train", "--model", "resnet18", "--batch", "6"],
            "a training step of 6 images of 224x224",
        ),
        (
            [
                *TRAIN,
                "--data",
                "synthetic",
                "--model",
                "resnet18",
                "--size",
                "64",
                "--batch",
                "64",
                "--set",
                "subset=64",
            ],
            "a training step of 64 images of 64x64 to fit into",
        ),
        (["tune", "resnet18", "--batch", "1000000000"], "expected --batch <= 1,048,576"),
        (["tune", "resnet18", "--image", "1000000"], "expected --image <= 16,384"),
        (["tune", "resnet18", "--batch", "100000"], "100,000 images of 224x224 to fit into"),
        (["explain", "resnet18", "--batch", "1000000000"], "expected --batch <= 1,048,576"),
        (["explain", "resnet18", "--image", "16000"], "1 images of 16000x16000 to fit into"),
        (["roofline", "resnet18", "--batch", "1" + "0" * 30], "expected --batch <= 1,048,576"),
        (["roofline", "resnet18", "--image", "1" + "0" * 30], "expected --image <= 16,384"),
        (["summary", "resnet18", "--batch", "1" + "0" * 30], "expected --batch <= 1,048,576"),
        (["summary", "resnet18", "--image", "1" + "0" * 30], "expected --image <= 16,384"),
        (["predict", "x.jpg", "--weights", "w.pth", "--threads", "100000"], "expected --threads <= "),
        (["predict", "x.jpg", "--weights", "w.pth", "--batch", "1000000000"], "expected --batch <= 1,048,576"),
        (["validate", "w.pth", "--workers", "99999"], "expected --workers <= "),
        (["validate", "w.pth", "--threads", "100000"], "expected --threads <= "),
        (["validate", "w.pth", "--batch", "1000000000"], "expected --batch <= 1,048,576"),
    ],
)
def test_a_number_beyond_the_machine_is_one_line_and_exit_2(
    arguments: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(limits, "available_memory", lambda: 50_000_000)
    start = time.process_time()
    code = cli.main(arguments)
    done = capsys.readouterr()
    assert (code, done.out, done.err.count("\n")) == (2, "", 1) and said in done.err
    assert not (tmp_path / "never" / "checkpoints").exists()
    assert time.process_time() - start < 60
