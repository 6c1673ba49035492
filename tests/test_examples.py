"""The programs in examples/ run at their small size, and show what they say."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import resnet_fast
from tests.support import ROOT
from tests.support.processes import LIMIT_S

EXAMPLES = ROOT / "examples"
SAME = 1e-5
"""Of one net in two orders of summation: an fp32 epsilon (1.2e-7) times the root of its longest sum, 9 x 512."""

Main = Callable[[list[str]], None]


@pytest.fixture
def example(request: pytest.FixtureRequest) -> Main:
    """Return main() of the example that the test is named after: ``test_detector`` is of ``detector.py``."""
    resnet_fast.reset_stats()
    path = EXAMPLES / f"{request.node.originalname.removeprefix('test_')}.py"
    return runpy.run_path(str(path))["main"]  # type: ignore[no-any-return]


def differences(said: str) -> list[float]:
    return [float(number) for number in re.findall(r"(\d\.\de[-+]\d+)", said)]


def losses(said: str) -> list[float]:
    return [float(number) for number in re.findall(r"loss (\S+)", said)]


def test_every_example_has_a_test_and_a_place_in_the_quick_start() -> None:
    start = (ROOT / "docs" / "start.md").read_text(encoding="utf-8")
    own = Path(__file__).read_text(encoding="utf-8")
    names = [path.name for path in EXAMPLES.glob("*.py")]
    assert len(names) >= 6
    for name in names:
        assert f"(../examples/{name})" in start, name
        assert f"def test_{name.removesuffix('.py')}(" in own, name


def test_serve_classifier(example: Main, capsys: pytest.CaptureFixture[str]) -> None:
    example(["--tiny"])
    said = capsys.readouterr().out
    answers = re.findall(r"^(\d) images: classes \[(.*)\], (\S+) from stock$", said, re.MULTILINE)
    assert [(int(count), len(classes.split(","))) for count, classes, _ in answers] == [(1, 1), (4, 4), (2, 2), (1, 1)]
    assert all(float(difference) < SAME for *_, difference in answers)
    assert "layer4.1" in said and resnet_fast.stats()["fallbacks"] == {}


@pytest.mark.slow
def test_detector(example: Main, capsys: pytest.CaptureFixture[str]) -> None:
    example(["--tiny"])
    said = capsys.readouterr().out
    ours, accelerated = re.findall(r"^(\d+) boxes, (\d+) accelerated$", said, re.MULTILINE)[0]
    assert ours == accelerated and int(ours) > 0
    assert "body.layer4.2" in said


@pytest.mark.slow
def test_train_detector(example: Main, capsys: pytest.CaptureFixture[str]) -> None:
    example(["--tiny"])
    said = capsys.readouterr().out
    assert "19 of 19 as basic_block" in said
    assert len(losses(said)) == 4 and losses(said)[-1] < losses(said)[0]


def test_robot_policy(example: Main, capsys: pytest.CaptureFixture[str]) -> None:
    example(["--tiny"])
    said = capsys.readouterr().out
    assert len(losses(said)) == 4 and losses(said)[-1] < losses(said)[0]
    assert "10 actions" in said
    assert resnet_fast.stats() == {"calls": {"basic_block/onednn": 8}, "fallbacks": {}}  # of one observation


def test_foreign_block(example: Main, capsys: pytest.CaptureFixture[str]) -> None:
    example(["--tiny"])
    said = capsys.readouterr().out
    assert "5 of 9 convolutions are fused" in said  # the others are those of the gates
    assert differences(said)[-1] < SAME


def test_check_kernel() -> None:
    """In a process of its own: Triton decides at its import whether it interprets."""
    assert not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") is None
    command = [sys.executable, str(EXAMPLES / "check_kernel.py"), "--tiny"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^(torch\.\w+): error .* ratio", done.stdout, re.MULTILINE) == ["torch.float32", "torch.float16"]
