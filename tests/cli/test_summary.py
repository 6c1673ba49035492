"""``resnet-fast summary`` as a user types it."""

from __future__ import annotations

import json
from functools import partial

import pytest

from resnet_fast.cli.summary import summary
from resnet_fast.errors import UserError
from tests.support.cli import invoke

_run = partial(invoke, summary)


def test_one_net_prints_its_stages() -> None:
    result = _run("resnet50", "--stride-in-1x1")
    assert result.exit_code == 0, result.output
    assert "[1x1, 256; 3x3, 256; 1x1, 1024] x 6" in result.output
    assert "25,557,032" in result.output and "3.858 G" in result.output
    assert "cut off, not rounded" in result.output


def test_several_nets_print_a_comparison_with_numbered_notes() -> None:
    result = _run("vgg16", "vgg19", "cifar_resnet20")
    assert result.exit_code == 0, result.output
    line = next(line for line in result.output.splitlines() if "vgg16" in line)
    assert "15.470 G" in line and "15.347 G" in line and "15.3 G (1)" in line
    assert "(1) vgg16: 15.3 counts the convolutions alone" in result.output


def test_nothing_is_cut_off_in_a_pipe() -> None:
    assert "…" not in _run("googlenet").output
    assert "[1x1, 384]; [1x1, 192; 3x3, 384]; [1x1, 48; 3x3, 128]; [1x1, 128]" in _run("googlenet").output


def test_json_of_one_net() -> None:
    data = json.loads(_run("resnet18", "--image", "65", "--batch", "2", "--dtype", "bfloat16", "--json").output)
    assert (data["image"], data["batch"], data["dtype"]) == (65, 2, "bfloat16")
    assert [s["name"] for s in data["stages"]][-1] == "fc"


def test_json_of_a_comparison() -> None:
    data = json.loads(_run("resnet18", "plain18", "--json").output)
    assert [(d["name"], d["image"]) for d in data] == [("resnet18", 224), ("plain18", 224)]
    assert data[0]["macs"] > data[1]["macs"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["resnet51"], "did you mean"),
        (["resnet50", "--shortcut", "Z"], "A, B or C"),
        (["resnet50", "--image", "-3"], "image -3"),
        (["resnet50", "--dtype", "fp32"], "name of a dtype"),
        (["resnet50", "resnet18", "--batch", "4"], "one name with --batch"),
        (["--shortcut", "A"], "name them"),
    ],
)
def test_bad_input_is_a_user_error(args: list[str], message: str) -> None:
    result = _run(*args)
    assert isinstance(result.exception, UserError)
    assert message in str(result.exception) and "\n" not in str(result.exception)
