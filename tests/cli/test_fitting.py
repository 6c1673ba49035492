"""Tables on a terminal of 80 columns: every name and every number of the wide form is there, whole."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table
from rich.text import Text

from resnet_fast.benchmarks import report
from resnet_fast.benchmarks.compare import BenchReport, InferenceRow
from resnet_fast.benchmarks.side_by_side import AnswerPair
from resnet_fast.cli import demo, explain, output, tune
from resnet_fast.cli.fitting import fit
from resnet_fast.cli.main import main
from resnet_fast.dispatch import tune as tuning
from resnet_fast.tuning import shapes, tables
from resnet_fast.tuning.routes import launch

LINES = re.compile(r"[─━│┃┏┓┗┛┡┩├┤┳┻╇┼╋┴┬└┘┌┐╭╮╰╯╌-]{2,}|[│┃┏┓┗┛┡┩├┤┳┻╇┼┴┬└┘]")


def words(text: str) -> Counter[str]:
    """Return the words of a text without the lines of its tables."""
    return Counter(LINES.sub(" ", text).split())


def printed(*parts: Table, width: int) -> str:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        for part in parts:
            console.print(part, highlight=False, markup=False)
    return capture.get()


def check(wide: str, narrow: str, width: int = 80) -> None:
    assert "…" not in narrow
    assert not words(wide) - words(narrow)
    longest = max(len(line) for line in narrow.splitlines())
    assert longest <= width, longest


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str]]:
    """Return what a command prints without a terminal, and on one of 80 columns."""

    def run(*arguments: str) -> tuple[str, str]:
        assert main(list(arguments)) == 0
        wide = capsys.readouterr().out
        monkeypatch.setattr(output, "terminal_width", lambda: 80)
        monkeypatch.setattr(explain, "terminal_width", lambda: 80)
        assert main(list(arguments)) == 0
        return wide, capsys.readouterr().out

    return run


@pytest.mark.parametrize(
    "arguments",
    [
        ["models"],
        ["summary", "resnet50"],
        ["summary", "resnext101_32x8d", "vgg16"],
        ["summary"],
        ["roofline", "resnet50"],
        ["roofline", "resnet18", "--plan", "train-conv-bn", "--batch", "100000"],
        ["reproduce"],
    ],
    ids=" ".join,
)
def test_a_command_loses_nothing_at_80_columns(arguments: list[str], both: Callable[..., tuple[str, str]]) -> None:
    check(*both(*arguments))


def test_explain_loses_nothing_at_80_columns(both: Callable[..., tuple[str, str]]) -> None:
    wide, narrow = both("explain", "resnext50_32x4d", "--image", "64", "--backend", "reference")
    table = wide.split("\n\n")[0]
    check(table, narrow, width=max(80, max(len(word) for word in narrow.split())))
    assert not words(wide) - words(narrow)


def test_tune_and_bench_and_demo_lose_nothing_at_80_columns() -> None:
    problems = shapes.problems("resnet50", 8, dtype="bfloat16")
    launches = tuple(launch(problems[f"r50.layer1.0.conv{i}"]) for i in (1, 2, 3))
    times: dict[str, dict[str, float | None]] = {
        str(one): {"64x64x64 w4 s4": 1234567.0, "cudnn": 25.0} for one in launches
    }
    tuned = tuning.Tuned(tables.Table("NVIDIA H100 80GB HBM3", times), Path("t"), launches)
    ran = {"median_ms": 12345.67, "q1_ms": 12345.5, "q3_ms": 23456.78, "images_per_s": 12500.0, "ratio": 1.25}
    rows = [
        InferenceRow(
            "resnet50", "onnxruntime", "float32", 1, "cpu", False, "float32", error_l2=1e-6, error_max=2e-6, **ran
        ),  # type: ignore[arg-type]
        InferenceRow(
            "resnet50", "openvino", "float32", 1, "cpu", False, note="RuntimeError: could not do it on this machine"
        ),
    ]
    answer = AnswerPair("a photograph.png", 1, 2, 1e-3, 1e-7, 4e-7, 3e-7)
    for table in (
        tune._table(tuned, "resnet50, batch 8, 224x224, bfloat16, NVIDIA H100 80GB HBM3"),
        *report.tables(BenchReport(rows)),
        demo.answer_table([answer], None),
        demo.explain_table([{"op": "stem", "backend": "onednn", "calls": 3, "why_not": {"triton": "no GPU " * 9}}]),
    ):
        check(printed(table, width=1000), printed(*fit(table, 80), width=80))


def test_a_table_that_fits_is_left_alone() -> None:
    table = Table("a", "b")
    table.add_row("1", "2")
    assert fit(table, 80) == [table]


def test_parts_begin_with_the_same_columns_and_keep_sections() -> None:
    table = Table("layer", "kernel", title="title")
    for number in range(8):
        table.add_column(f"number{number}", justify="right", no_wrap=True)
    table.add_row("layer1.0", Text("conv"), *["1,234,567.8 MB"] * 8, end_section=True)
    table.add_row("layer1.1", Text("conv"), *["9,876,543.2 MB"] * 8)
    parts = fit(table, 80)
    assert len(parts) > 1 and parts[0].title == "title" and parts[1].title is None
    assert [[str(c.header) for c in part.columns[:2]] for part in parts] == [["layer", "kernel"]] * len(parts)
    assert [str(c.header) for part in parts for c in part.columns[2:]] == [f"number{n}" for n in range(8)]
    assert all(part.rows[0].end_section for part in parts)
    text = printed(*parts, width=80)
    assert text.count("1,234,567.8 MB") == 8 and max(map(len, text.splitlines())) <= 80


def test_a_word_longer_than_the_width_is_folded_and_not_cut() -> None:
    table = Table("path")
    table.add_row("/".join(["folder"] * 30))
    text = printed(*fit(table, 40), width=40)
    assert (
        "…" not in text and text.count("folder") + text.count("fold") >= 30 and max(map(len, text.splitlines())) <= 40
    )
