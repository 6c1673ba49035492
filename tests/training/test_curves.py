"""The picture of a run is drawn from its log."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from resnet_fast.errors import UserError
from resnet_fast.training import curves
from resnet_fast.training.runlog import RunLog


def log(out: Path, errors: list[tuple[float, float]]) -> None:
    lines = RunLog(out, 0, tensorboard=False)
    for epoch, (train, val) in enumerate(errors, 1):
        lines.write("epoch", epoch, epoch=epoch, train_error=train, val_error=val)
    lines.close()


def test_both_errors_are_drawn_in_per_cent(tmp_path: Path) -> None:
    _, (axis,) = curves.figure(1)
    lines = [{"epoch": 1, "train_error": 0.5, "val_error": 0.6}, {"epoch": 1.5, "train_error": 0.2, "val_error": 0.4}]
    curves.draw(axis, {"ours": lines, "other": lines[:1]})
    thin, bold, *_ = axis.get_lines()
    assert thin.get_xdata().tolist() == [1, 1.5] and thin.get_ydata().tolist() == pytest.approx([50, 20])
    assert bold.get_ydata().tolist() == pytest.approx([60, 40]) and bold.get_linewidth() > thin.get_linewidth()
    assert thin.get_color() == bold.get_color() and len(axis.get_lines()) == 4
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["ours", "other"]


def test_more_runs_than_colours(tmp_path: Path) -> None:
    _, (axis,) = curves.figure(1)
    line = [{"epoch": 1, "train_error": 0.5, "val_error": 0.6}]
    curves.draw(axis, {f"run {i}": line for i in range(len(curves.COLOURS) + 3)})
    assert len(axis.get_lines()) == 2 * (len(curves.COLOURS) + 3)


def test_a_png_of_the_log(tmp_path: Path) -> None:
    red = [int(curves.COLOURS[0][i : i + 2], 16) for i in (1, 3, 5)]
    drawn = []
    for epochs in (0, 1, 3):
        out = tmp_path / str(epochs)
        out.mkdir()
        log(out, [(0.5, 0.6), (0.2, 0.4), (0.1, 0.3)][:epochs])
        path = curves.write_curves(out, "a title with $ and _")
        with Image.open(path) as picture:
            assert picture.format == "PNG" and min(picture.size) > 300
            drawn.append(int((np.asarray(picture.convert("RGB")) == red).all(-1).sum()))
        assert sorted(p.name for p in out.iterdir()) == ["curves.png", "log.jsonl"]
    assert drawn[2] > 4 * drawn[0] > 0  # the legend's line alone, and two lines through three points


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    curves.require_matplotlib()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(
        UserError, match=r"matplotlib, which draws the curves, got no such package; pip install matplotlib"
    ):
        curves.require_matplotlib()


def test_panels_share_an_axis_that_cuts_nothing() -> None:
    _, axes = curves.figure(2)
    for axis, errors in zip(axes, ((0.9, 0.5), (0.004, 0.0)), strict=True):
        lines = [{"epoch": i, "train_error": e, "val_error": e / 2} for i, e in enumerate(errors, 1)]
        curves.draw(axis, {"run": lines}, "a panel")
    curves.show_whole(axes)
    (low, high), other = axes[0].get_ylim(), axes[1].get_ylim()
    assert (low, high) == other and low <= 0 and 90 < high <= 100
    assert axes[0].get_title() == "a panel" and "50" in [t.get_text() for t in axes[0].get_yticklabels()]
    nothing, (axis,) = curves.figure(1)
    curves.show_whole([axis])
    del nothing
