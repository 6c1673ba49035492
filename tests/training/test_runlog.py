"""The log: one line per event, no step twice, and one run per folder."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import pytest

from resnet_fast.errors import UserError
from resnet_fast.training import runlog
from resnet_fast.training.runlog import FolderLock, RunLog


def test_lines_are_read_as_they_were_written(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0, tensorboard=False)
    log.write("train", 1, loss=0.1 + 0.2, text="a\nb")
    assert runlog.read_log(tmp_path)[0]["loss"] == 0.1 + 0.2  # before close, for whoever looks on
    log.write("epoch", 2, val_error=0.5)
    log.close()
    assert [(line["kind"], line["step"]) for line in runlog.read_log(tmp_path)] == [("train", 1), ("epoch", 2)]
    assert [line["val_error"] for line in runlog.of_kind(tmp_path, "epoch")] == [0.5]
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2


def test_no_log_is_an_empty_one(tmp_path: Path) -> None:
    assert runlog.read_log(tmp_path) == []


def test_going_on_removes_what_came_after(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0, tensorboard=False)
    for step in (1, 2, 3):
        log.write("train", step)
        log.write("note", step, text="x")
    log.close()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')  # killed while it wrote
    assert len(runlog.read_log(tmp_path)) == 6
    log = RunLog(tmp_path, 2, tensorboard=False)
    log.write("train", 3, again=True)
    log.close()
    lines = [json.loads(text) for text in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["step"]) for line in lines] == [
        ("train", 1),
        ("note", 1),
        ("train", 2),
        ("note", 2),
        ("train", 3),
    ]
    assert lines[-1]["again"]
    RunLog(tmp_path, 0, tensorboard=False).close()
    assert runlog.read_log(tmp_path) == []


def test_tensorboard_gets_the_same_figures(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = RunLog(tmp_path, 0, tensorboard=True)
    for step in (1, 2):
        log.write("train", step, loss=step / 4, text="no scalar")
    log.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["train/loss"]
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 0.25), (2, 0.5)]


def test_a_full_disk_is_a_users_error(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0, tensorboard=False)
    log.close()
    log.file = open("/dev/full", "a", buffering=1)  # noqa: SIM115 - closed below
    with pytest.raises(
        UserError, match="expected space and permission to write /dev/full, got No space left on device"
    ):
        log.write("train", 1, loss=0.5)
    with contextlib.suppress(OSError):  # what it still holds fits nowhere
        log.file.close()


def test_a_folder_has_one_owner_at_a_time(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path / "deep" / "run")
    with pytest.raises(UserError, match=f"one run per output folder, got .*where process {os.getpid()} is at work"):
        FolderLock(tmp_path / "deep" / "run")
    lock.release()
    FolderLock(tmp_path / "deep" / "run").release()


def test_a_dead_owner_holds_nothing(tmp_path: Path) -> None:
    ours, theirs = os.pipe()
    if (owner := os.fork()) == 0:
        try:
            os.close(theirs)
            lock = FolderLock(tmp_path)
            if os.fork() == 0:  # as a worker process of the run, which may outlive it for seconds
                os.read(ours, 1)
                os._exit(0)
            os.kill(os.getpid(), 9)
            lock.release()
        finally:
            os._exit(1)
    os.close(ours)
    assert os.waitpid(owner, 0)[1] == 9
    FolderLock(tmp_path).release()
    os.close(theirs)


def test_a_file_of_the_locks_name_that_no_run_wrote_stays(tmp_path: Path) -> None:
    (tmp_path / "mine").write_bytes(b"precious \xff")
    (tmp_path / "run.lock").symlink_to("mine")
    with pytest.raises(
        UserError, match=r"an output folder that is a run's, or new, got .*run\.lock, which no run wrote"
    ):
        runlog.FolderLock(tmp_path)
    assert (tmp_path / "mine").read_bytes() == b"precious \xff"
    (tmp_path / "mine").write_text("12345")  # a process that ended long ago
    runlog.FolderLock(tmp_path).release()


def test_a_log_of_something_else_is_passed_over(tmp_path: Path) -> None:
    lines = [
        '{"kind": "train", "step": 1}',
        "[]",
        "3",
        '{"kind": "train"}',
        '{"step": 1}',
        '{"step": "1", "kind": "x"}',
    ]
    body = "\n".join(
        [*lines, '{"kind": "train", "step": 2, "loss": NaN}', "\xff", "[" * 99999, '{"kind": "x", "step": 3}']
    )
    (tmp_path / "log.jsonl").write_bytes(body.encode("latin-1"))
    assert [line["step"] for line in runlog.read_log(tmp_path)] == [1, 3]
    RunLog(tmp_path, 2, tensorboard=False).close()
    assert (tmp_path / "log.jsonl").read_text() == '{"kind": "train", "step": 1}\n'


def test_what_is_no_number_is_null(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0, tensorboard=False)
    log.write("epoch", 1, val_loss=float("inf"), more=[float("nan"), 2.0])
    log.close()
    (line,) = runlog.read_log(tmp_path)
    assert (
        line["val_loss"] is None and line["more"] == [None, 2.0] and "NaN" not in (tmp_path / "log.jsonl").read_text()
    )


def test_a_full_disk_for_events_is_said_at_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorboard")
    log = RunLog(tmp_path, 0, tensorboard=True)
    log.events.records._writer = open("/dev/full", "wb")  # noqa: SIM115 - closed below
    with pytest.raises(UserError, match=r"space and permission to write .*events.*, got No space left on device"):
        log.write("train", 1, loss=0.5)
    log.close()
    with contextlib.suppress(OSError):
        log.events.records._writer.close()
    assert capfd.readouterr().err == ""


def test_a_lock_on_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "getpid", full)
    with pytest.raises(UserError, match=r"space and permission to write .*run\.lock, got No space left on device"):
        FolderLock(tmp_path)


@pytest.mark.parametrize("below", ["file", "file/deep"])
def test_a_folder_that_cannot_be_written(below: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"expected a folder to write to, got .*{below} .*name another with --out"):
        FolderLock(tmp_path / below)
