"""benchmarks/gpu: what a crash, a hang or the end of the budget leaves behind, and what a later session runs again."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from resnet_fast.benchmarks.gpu import check, report, tune, worker
from resnet_fast.benchmarks.gpu import session as sessions
from resnet_fast.benchmarks.gpu.session import BudgetClock, GpuCase, Session, Settings, Store
from resnet_fast.tuning import tables
from tests.support import ROOT
from tests.support.gpu_sessions import rows


def session(folder: Path, command: str = "toy", budget: float = 400.0, **more: Any) -> Session:
    settings = Settings(command, "cpu", str(folder), budget=budget, **more)
    return Session(settings, BudgetClock(budget), Store(folder / f"{command}.jsonl", settings.fresh), "here", "abc")


TOY = """
import os, time
from resnet_fast.benchmarks.gpu.session import GpuCase, Skipped

def boom(): raise ValueError("first line\\nsecond line")
def skip(): raise Skipped("not here")
def crash(): os.write(2, b"Fatal: stack smashed\\n"); os.abort()
def hang(): time.sleep(600)

def cases(settings):
    ok = [GpuCase(f"ok {i}", lambda: {"answer": 42}) for i in range(3)]
    print("what libraries print")
    return [GpuCase("raises", boom), GpuCase("skips", skip), GpuCase("crashes", crash),
            GpuCase("hangs", hang, limit_s=1), GpuCase("expensive", hang, needs_s=1000), *ok]
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[GpuCase]]:
    """Return a module of cases that workers can import, and its cases."""
    (tmp_path / "toy_cases.py").write_text(TOY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    sys.modules.pop("toy_cases", None)
    return lambda: importlib.import_module("toy_cases").cases(None)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_a_case_that_crashes_or_hangs_costs_itself_alone(
    toy: Callable[[], list[GpuCase]], tmp_path: Path, size: int, capsys: pytest.CaptureFixture[str]
) -> None:
    s = session(tmp_path)
    with worker.WorkerPool("toy_cases", s, size) as pool:
        pool.run(s.todo(toy()))
    found = {row["case"]: row for row in rows(tmp_path, "toy")}
    assert found["raises"]["status"] == "failed" and found["raises"]["error"] == "ValueError: first line"
    assert found["skips"]["status"] == "skipped" and found["skips"]["reason"] == "not here"
    assert "exit code -6: Fatal: stack smashed" in found["crashes"]["error"]
    assert found["hangs"]["error"] == "no answer within 1 s"
    assert [found[f"ok {i}"]["answer"] for i in range(3)] == [42] * 3
    assert s.left == ["expensive"]
    assert s.finish(toy()) == 1
    assert "FAILED  crashes" in capsys.readouterr().out


@pytest.mark.alone
@pytest.mark.slow
def test_the_end_of_the_budget_stops_a_running_case(toy: Callable[[], list[GpuCase]], tmp_path: Path) -> None:
    s = session(tmp_path, budget=8.0)
    hanging = [replace(case, limit_s=100.0) for case in toy() if case.name == "hangs"]
    with worker.WorkerPool("toy_cases", s) as pool:
        pool.run(hanging)
        assert not [w for w in pool.workers if w.case]
    assert s.left == ["hangs"] and 8 <= s.clock.elapsed < 100  # the limit of the case
    assert not (tmp_path / "toy.jsonl").exists()
    assert s.finish(hanging) == 0


def test_a_worker_that_cannot_start_is_an_error(tmp_path: Path) -> None:
    s = session(tmp_path)
    with (
        worker.WorkerPool("no_such_module", s) as pool,
        pytest.raises(RuntimeError, match="No module named 'no_such_module'"),
    ):
        pool.run([GpuCase("any", dict)])


def test_failures_are_tried_again_after_all_that_is_new(tmp_path: Path) -> None:
    s = session(tmp_path)
    s.record("a", {"status": "failed", "error": "x"})
    s.record("b", {"status": "passed"})
    again = session(tmp_path)
    listed = [
        GpuCase("a", dict),
        GpuCase("b", dict),
        GpuCase("c", dict),
        GpuCase("d", dict, known={"status": "refused"}),
    ]
    assert [case.name for case in again.todo(listed)] == ["c", "a"]
    assert again.counts == {"kept": 1, "refused": 1}
    again.record("a", {"status": "passed"})
    assert again.finish(listed) == 0 and session(tmp_path).row("a")["status"] == "passed"  # type: ignore[index]
    assert [case.name for case in session(tmp_path, only="c").todo(listed)] == ["c"]
    assert session(tmp_path, fresh=True).row("a") is None


def test_a_torn_line_is_dropped_and_the_next_one_is_whole(tmp_path: Path) -> None:
    s = session(tmp_path)
    s.record("a", {"status": "passed"})
    with (tmp_path / "toy.jsonl").open("a") as file:
        file.write('{"key": "b | here", "ca')
    s = session(tmp_path)
    assert list(s.store.rows) == ["a | here"]
    s.record("c", {"status": "passed"})
    assert list(session(tmp_path).store.rows) == ["a | here", "c | here"]


@pytest.mark.parametrize(
    "options,environment,sentence",
    [
        (["--budget", "600"], {}, "at most 520"),
        (["--budget", "0"], {}, "at most 520"),
        ([], {"TRITON_INTERPRET": "1"}, "unset it"),
        ([], {}, "expected a CUDA device"),
    ],
)
def test_unusable_options(
    options: list[str],
    environment: dict[str, str],
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as caught:
        sessions.settings_from("check", "what", options)
    assert caught.value.code == 2 and sentence in capsys.readouterr().err


def test_results_of_the_interpreter_stay_out_of_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    folder = sessions.settings_from("check", "what", ["--device", "cpu"]).path
    assert ROOT not in folder.parents
    folder.rmdir()
    for module in (sessions, tune):
        monkeypatch.setattr(module, "gpu_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert sessions._folder(None, "cuda") == ROOT / "benchmarks" / "results" / "nvidia-h100-80gb-hbm3"
    h100 = Settings("tune", "cuda", "elsewhere")
    assert tune.table_path(h100) == tables.SHIPPED / "nvidia-h100-80gb-hbm3.json"


GPU_TESTS = """
import os, pytest
pytestmark = pytest.{mark}.gpu
def test_good(): pass
def test_bad(): assert 1 == 2
def test_away(): pytest.skip("not on this GPU")
def test_fatal(): os._exit(9)
def test_after(): pass
"""


@pytest.mark.slow
def test_tests_for_a_gpu_are_rows_and_those_that_passed_are_not_run_again(tmp_path: Path) -> None:
    path = tmp_path / "test_on_gpu.py"
    path.write_text(GPU_TESTS.format(mark="mark"))
    (tmp_path / "test_elsewhere.py").write_text("def test_it(): pass\n")
    assert check.gpu_test_files(tmp_path) == [path]
    s = session(tmp_path)
    check.run_tests(s, [path])
    found = {row["case"].rpartition("::")[2]: row for row in rows(tmp_path, "toy")}
    assert {name: row["status"] for name, row in found.items()} == {
        "test_good": "passed", "test_bad": "failed", "test_away": "skipped", "test_fatal": "failed",
    }  # fmt: skip
    assert "assert 1 == 2" in found["test_bad"]["error"] and "exit code 9" in found["test_fatal"]["error"]
    path.write_text(GPU_TESTS.format(mark="mark").replace("os._exit(9)", "pass").replace("1 == 2", "1 == 1"))
    again = session(tmp_path)
    check.run_tests(again, [path])
    new = [row["case"].rpartition("::")[2] for row in rows(tmp_path, "toy")][len(found) :]
    assert set(new) == {"test_bad", "test_away", "test_fatal", "test_after", "tests"}
    none = session(tmp_path, "none")
    check.run_tests(none, [])
    assert rows(tmp_path, "none")[0]["status"] == "skipped"


def test_the_report_names_failures_and_survives_an_empty_folder(tmp_path: Path) -> None:
    s = session(tmp_path, "check")
    assert report.to_markdown(s.settings) == "# Results\n"
    s.record("config conv: a | b", {"status": "failed", "error": "ValueError: wrong"})
    text = report.to_markdown(s.settings)
    assert "## Failed: 1" in text and "- config conv: a | b: ValueError: wrong" in text
