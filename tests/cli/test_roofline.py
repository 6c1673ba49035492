"""``resnet-fast roofline`` as a user types it."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import pytest

from resnet_fast.cli import main
from resnet_fast.cli import roofline as module
from resnet_fast.cli.roofline import roofline
from resnet_fast.devices import H100, ORIGINS
from resnet_fast.errors import UserError
from resnet_fast.io import safe_files
from resnet_fast.roofline.byte_model import PLANS, net_work
from tests.support.cli import invoke

_run = partial(invoke, roofline)


@pytest.fixture(scope="module")
def default() -> str:
    result = _run("resnet50", "--gpu", "h100", "--batch", "256")
    assert result.exit_code == 0, result.output
    return result.output


def test_every_launch_block_and_plan_has_a_row(default: str) -> None:
    lines = default.splitlines()
    assert any("r50.layer1.0" in line and "conv2+conv3+downsample" in line for line in lines)
    assert any("r50.layer3.5" in line and "sum" in line for line in lines)
    assert all(any(line.startswith(f"│ {plan} ") for line in lines) for plan in PLANS)
    assert "…" not in default


def test_figures_are_labelled(default: str) -> None:
    copy = next(line for line in default.splitlines() if "copy bandwidth" in line)
    assert "3.02 TB/s" in copy and "measured" in copy and "3.35 TB/s" in copy
    assert "modelled from the ceilings above" in default and "modelled on every GPU" in default
    assert "for the picture: --plot" in default


def test_what_was_measured_stands_beside_its_prediction(default: str) -> None:
    line = next(line for line in default.splitlines() if line.startswith("measured: best stock inference"))
    assert "25,700 img/s, 0.54 of the floor of plan conv; predicted 25," in line
    assert "measured: " not in _run("resnet50", "--gpu", "a100").output
    assert "measured: " not in _run("resnet18").output


def test_json_has_the_same_content() -> None:
    data = json.loads(_run("resnet18", "--gpu", "b200", "--batch", "1", "--plan", "block", "--json").output)
    assert data["device"]["name"] == "NVIDIA B200" and data["device"]["bandwidth"]["origin"] in ORIGINS
    assert list(data["plans"]) == list(PLANS) and data["plans"]["block"]["bound"] == "launch"
    assert len(data["launches"]) == data["plans"]["block"]["launches"] == 11
    assert sum(x["predicted_s"] for x in data["launches"]) == pytest.approx(data["plans"]["block"]["predicted_s"])
    assert data["plans"]["conv"]["activations"] > data["plans"]["block"]["activations"] > 0


@pytest.mark.parametrize("plan", ["tail", "train-conv-bn"])
def test_plot_is_a_picture(tmp_path: Path, plan: str) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "roofline.png"
    result = _run("resnet50", "--plan", plan, "--plot", str(path))
    assert result.exit_code == 0, result.output
    assert path.read_bytes().startswith(b"\x89PNG") and f"written: {path}" in result.output


def test_plot_without_matplotlib_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    result = _run("--plot", str(tmp_path / "x.png"))
    assert isinstance(result.exception, UserError)
    said = str(result.exception)
    assert "; pip install matplotlib" in said and said.endswith(", or leave out --plot")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["resnet51"], "did you mean"),
        (["--gpu", "h10"], "did you mean h100"),
        (["--plan", "magic"], "fusion plan out of separate"),
        (["--batch", "0"], "1 or more images"),
        (["--image", "0"], "at least 1x1 pixels"),
        (["--dtype", "fp32"], "name of a dtype"),
        (["--gpu", "a100", "--dtype", "float8_e4m3fn"], "known rate for"),
        (["--plot", "/no/such/folder/x.png"], "picture file"),
        (["--plot", "x.nonsense"], "picture file"),
    ],
)
def test_bad_input_is_a_user_error(args: list[str], message: str) -> None:
    if "--plot" in args:
        pytest.importorskip("matplotlib")
    result = _run(*args)
    assert isinstance(result.exception, UserError)
    assert message in str(result.exception) and "\n" not in str(result.exception)


def test_the_program_knows_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["roofline", "resnet50", "--gpu", "voodoo"]) == 2
    assert "choose one of h100" in capsys.readouterr().err


def test_a_picture_of_others_is_left_and_said_before_anything(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "photo.png").write_bytes(b"a photo")
    result = _run("--plot", str(tmp_path / "photo.png"))
    assert isinstance(result.exception, UserError) and result.output == ""
    assert "photo.png (there already, and not a picture" in str(result.exception)
    assert (tmp_path / "photo.png").read_bytes() == b"a photo"


def test_tables_are_printed_though_the_picture_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")

    def full(path: Path, content: bytes) -> Path:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(safe_files, "write_whole", full)
    assert main.main(["roofline", "resnet18", "--plot", str(tmp_path / "x.png")]) == 2
    out, err = capsys.readouterr()
    assert "plan tail" in out and "predicted img/s" in out and "written: " not in out
    assert "No space left on device" in err


@pytest.mark.parametrize("plan", ["tail", "separate", "train-conv-bn"])
def test_nothing_of_the_picture_is_cut(plan: str) -> None:
    """Every launch with operations is inside the axes, areas are shares of the time, and both legends exist."""
    pytest.importorskip("matplotlib")
    from matplotlib.legend import Legend

    items = net_work("resnet50", plan, 256)
    axes = module._draw("resnet50", items, H100, plan).axes[0]
    points = [(x, y) for drawn in axes.collections for x, y in drawn.get_offsets()]
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    assert len(points) > 5 and all(left < x < right and bottom < y < top for x, y in points)
    texts = [text.get_text() for legend in axes.findobj(Legend) for text in legend.get_texts()]
    assert {item.kernel for item in items if item.flops} <= {text.split(":")[0] for text in texts}
    assert any("TFLOP/s (measured)" in text for text in texts) and axes.get_title().startswith("Roofline of resnet50")
