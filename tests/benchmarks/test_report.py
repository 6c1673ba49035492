"""benchmarks/report.py: every format holds the measurements, and files appear whole or not at all."""

from __future__ import annotations

import csv
import io
import json
import os
import stat
from pathlib import Path

import pytest

from resnet_fast.benchmarks import report
from resnet_fast.benchmarks.compare import BenchReport, InferenceRow
from resnet_fast.errors import UserError


@pytest.fixture
def measured() -> BenchReport:
    ran = {"median_ms": 2.0, "q1_ms": 1.5, "q3_ms": 2.5, "images_per_s": 500.0, "ratio": 1.25, "samples": 3}
    rows = [
        InferenceRow("net", "eager-nchw", "float32", 1, "cpu", True, "float32", **(ran | {"ratio": 1.0})),  # type: ignore[arg-type]
        InferenceRow("net", "resnet_fast", "float32", 1, "cpu", False, "float32", error_l2=1e-6, error_max=2e-6, **ran),  # type: ignore[arg-type]
        InferenceRow("net", "openvino", "float32", 1, "cpu", False, note="broke | here"),
        InferenceRow("net", "openvino", "bfloat16", 4, "cpu", False, "float32", **ran),  # type: ignore[arg-type]
    ]
    return BenchReport(rows, {"net float32 1 eager-nchw": [1, 2, 3]}, {"cpu": "a CPU", "threads": 2, "date": "today"})


def test_csv_has_every_field_of_every_row(measured: BenchReport) -> None:
    rows = list(csv.DictReader(io.StringIO(report.to_csv(measured))))
    assert len(rows) == 4
    assert rows[1]["provider"] == "resnet_fast" and float(rows[1]["error_l2"]) == 1e-6
    assert rows[2]["median_ms"] == "" and rows[2]["note"] == "broke | here"


def test_markdown_tables(measured: BenchReport) -> None:
    text = report.to_markdown(measured)
    assert "## net, float32, batch 1, cpu" in text and "## net, bfloat16, batch 4, cpu" in text
    assert "| resnet_fast | float32 | 2.00 | 1.50 - 2.50 | 500.0 | 1.25 | 1.0e-06 | 2.0e-06 |  |" in text
    assert "broke \\| here" in text and "- cpu: a CPU" in text
    widths = {line.count("|") - line.count("\\|") for line in text.splitlines() if line.startswith("|")}
    assert widths == {len(report.HEADINGS) + 1}


def test_json_keeps_raw_samples_and_provenance(measured: BenchReport) -> None:
    found = json.loads(report.to_json(measured))
    assert found["samples_ns"] == {"net float32 1 eager-nchw": [1, 2, 3]}
    assert found["provenance"]["threads"] == 2 and found["rows"][2]["median_ms"] is None


def test_terminal_tables(measured: BenchReport) -> None:
    first, second = report.tables(measured)
    assert first.row_count == 3 and second.row_count == 1
    assert [c.header for c in first.columns] == list(report.HEADINGS)


def test_write_makes_four_whole_files(measured: BenchReport, tmp_path: Path) -> None:
    paths = report.write(measured, tmp_path / "new" / "folder")
    assert sorted(p.name for p in paths) == ["bench.csv", "bench.json", "bench.md", "bench.png"]
    assert sorted(os.listdir(tmp_path / "new" / "folder")) == sorted(p.name for p in paths)
    png = (tmp_path / "new" / "folder" / "bench.png").read_bytes()
    assert png.startswith(b"\x89PNG\r\n") and png.endswith(b"IEND\xaeB`\x82")
    assert stat.S_IMODE(paths[0].stat().st_mode) == 0o644


def test_chart_shows_bars_ratios_and_absences(measured: BenchReport) -> None:
    from matplotlib.figure import Figure

    figure = Figure()
    axis = figure.subplots()
    report._panel(axis, "title", measured.cells()["net", "float32", 1])
    assert [bar.get_width() for bar in axis.patches] == [500.0, 500.0, 0.0]
    assert [t.get_text().strip() for t in axis.texts] == [
        "500.0  (1.00x)",
        "500.0  (1.25x)",
        "did not run, see the table",
    ]
    assert report._label(measured.rows[3]) == "openvino (in float32)"


def test_failed_write_leaves_the_old_file(
    measured: BenchReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bench.csv").write_text("old")

    def broken(source: object, target: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="disk full"):
        report.write(measured, tmp_path)
    assert os.listdir(tmp_path) == ["bench.csv"] and (tmp_path / "bench.csv").read_text() == "old"


def test_out_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="expected a folder to write to"):
        report.prepare_folder(tmp_path / "file")


def test_chart_explains_colours_and_shows_quartiles_on_one_axis(measured: BenchReport) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    slow, fast = report._quartiles(measured.rows[1])
    assert (slow, fast) == pytest.approx((1e3 / 2.5, 1e3 / 1.5))
    assert report._quartiles(measured.rows[2]) == (0, 0)
    axis = Figure().subplots()
    report._panel(axis, "title", measured.cells()["net", "float32", 1], most=2000)
    assert [list(line.get_xdata()) for line in axis.get_lines()] == [pytest.approx([slow, fast])] * 2
    assert axis.get_xlim()[1] > 2000
    assert set(report.BARS) == {"resnet_fast", "stock PyTorch", "other programs"}
