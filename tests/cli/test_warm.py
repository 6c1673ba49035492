"""``resnet-fast warm`` as a user types it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from resnet_fast.cli import main as cli
from resnet_fast.impl import Warmed
from resnet_fast.ops import warm as warming

REPORT = Warmed(12, 9, 2, (("conv_fwd_kernel 64x64", "PTXASError: x"),), 3.25, 2)


def say(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = cli.main(["warm", *arguments])
    done = capsys.readouterr()
    return code, done.out, done.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["resnet51"], "did you mean"),
        (["resnet18", "--batch", "1,x"], "expected --batch as numbers with commas"),
        (["resnet18", "--batch", "0"], "expected --batch >= 1, got 0"),
        (["resnet18", "--image", "-3"], "expected --image >= 1, got -3"),
        (["resnet18", "--dtype", "float64"], "expected --dtype among"),
        (["resnet18", "--gpu", "h1000"], "did you mean h100"),
        (["resnet18", "--arch", "70"], "expected --arch among 80"),
        (["resnet18", "--arch", "90", "--gpu", "h100"], "expected --gpu or --arch, got both"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = say(arguments, capsys)
    assert (code, out) == (2, "") and said in err and err.count("\n") == 1


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Replace ``warm()``, and return what it is asked for."""
    seen: list[tuple[Any, ...]] = []

    def warm(net: Any, x: torch.Tensor, train: bool, batches: Any, gpu: Any, rounded: Any, on_progress: Any) -> Warmed:
        seen.append((net.training, x.dtype, tuple(x.shape[1:]), train, batches, gpu, rounded))
        return REPORT

    monkeypatch.setattr("resnet_fast.warm", warm, raising=False)
    monkeypatch.setattr(warming, "warm", warm)
    return seen


def test_a_training_step_keeps_fp32_and_rounds(asked: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = say(["resnet18", "--train", "--batch", "1,8", "--image", "96", "--gpu", "a100"], capsys)
    assert code == 0 and asked == [(True, torch.float32, (3, 96, 96), True, (1, 8), "a100", torch.bfloat16)]
    assert "a100: 12 kernels: 9 compiled, 2 there already, in 3.2 s" in out
    assert "refused conv_fwd_kernel 64x64: PTXASError: x" in out


def test_an_architecture_means_each_of_its_gpus(asked: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = say(["resnet18", "--dtype", "float16", "--arch", "90", "--json"], capsys)
    found = json.loads(out)
    assert code == 0 and {"h100", "h200"} <= set(found) and found["h100"]["failed"] == [list(REPORT.failed[0])]
    assert {(dtype, train, rounded) for _, dtype, _, train, _, _, rounded in asked} == {(torch.float16, False, None)}
