"""What ends a run early: numbers that overflow, and files that cannot be written."""

from __future__ import annotations

import errno
import itertools
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from resnet_fast.errors import UserError
from resnet_fast.io import safe_files
from resnet_fast.training import checkpoints, curves, disk, runlog
from resnet_fast.training.diagnosis import NotFinite
from resnet_fast.training.loop import train
from resnet_fast.training.options import RunOptions, Tick, Watch
from resnet_fast.training.validation import Validation
from tests.support.runs import Make, draw_curves

pytestmark = pytest.mark.usefixtures("quick")


def overflow(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the update of that step overflow, after the loss was found to be a number."""
    from resnet_fast.training.step import TrainingStep

    call, count = TrainingStep.__call__, 0

    def broken(self: TrainingStep, *arguments: Any) -> list[str]:
        nonlocal count
        count += 1
        found = call(self, *arguments)
        if count == step:
            with torch.no_grad():
                self.inner[-1].bias[3] = torch.inf  # type: ignore[index]
        return found

    monkeypatch.setattr(TrainingStep, "__call__", broken)


@pytest.mark.parametrize("where", ["the last step", "before a checkpoint", "at the end of an epoch"])
def test_an_update_that_overflows_is_not_saved(
    where: str, tiny: Make, options: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = {"the last step": 6, "before a checkpoint": 2, "at the end of an epoch": 4}[where]
    overflow(step, monkeypatch)
    run = options(save_steps=2)
    with pytest.raises(NotFinite, match=rf"^after the update of step {step} 4\.bias: 1 of 10 values not finite") as e:
        train(tiny(), run)
    assert e.value.expected == "weights that are numbers"
    assert [checkpoints.step_of(p) for p in checkpoints.found(run.out)] == list(range(step - 2, 0, -2))[:2]
    assert not (run.out / "model.safetensors").exists()
    json_is_json(run.out)


def json_is_json(out: Path) -> None:
    for path in (*out.rglob("*.json"), *out.rglob("*.jsonl")):
        for text in path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]:
            safe_files.json_value(text)


@pytest.mark.parametrize("bad", [0, 1])
def test_a_validation_loss_that_is_no_number_is_null_and_no_end_of_a_run(
    bad: int, tiny: Make, options: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure, run, count = Validation.measure, options(), itertools.count()

    def broken(self: Validation, *arguments: Any) -> Any:
        found = measure(self, *arguments)
        return (float("inf"), *found[1:]) if next(count) == bad else found

    monkeypatch.setattr(Validation, "measure", broken)
    if bad == 0:
        train(tiny(), run)
    else:
        with pytest.raises(NotFinite, match=r"^inf after the last step, 6$"):
            train(tiny(), run)
    losses = [epoch["val_loss"] for epoch in runlog.of_kind(run.out, "epoch")]
    assert [loss is None for loss in losses] == [bad == 0, bad == 1]
    assert (run.out / "model.safetensors").exists() == (bad == 0)
    json_is_json(run.out)


def no_room(*arguments: Any, **named: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_from(step: int, what: str, run: RunOptions, monkeypatch: pytest.MonkeyPatch) -> Watch:
    """A disk that has no room for ``what`` after ``step``."""

    def fill(tick: Tick) -> None:
        if tick.step == step:
            place, name = {
                "log.jsonl": (runlog.safe_files, "json_text"),
                "curves.png": (curves, "write_png"),
                "events.out": (runlog.Events, "_append"),
                "model.safetensors": (checkpoints, "export_weights"),
            }[what]

            def failing(*arguments: Any, **named: Any) -> Any:
                raise disk.no_room(run.out / what, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))

            monkeypatch.setattr(place, name, failing)

    return Watch(step=fill)


@pytest.mark.parametrize(("what", "saved"), [("log.jsonl", 4), ("events.out", 4), ("curves.png", 4)])
def test_what_cannot_be_written_ends_the_run_after_it_is_saved(
    what: str, saved: int, tiny: Make, options: Make, left: Make, same: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(curves, "write_curves", draw_curves)
    whole = train(tiny(), options("whole"))
    run = options(save_steps=100, tensorboard=True)
    with monkeypatch.context() as patched:
        watch = full_from(3, what, run, patched)
        if what == "log.jsonl":
            patched.setattr(runlog.RunLog, "write", log_that_fails(run, 4))
            watch = Watch()
        with pytest.raises(
            UserError, match=rf"space and permission to write .*{what}, got No space left on device; "
        ) as e:
            train(tiny(), run, watch)
    assert f"the run is saved after step {saved}; fix that and continue with --resume auto" in str(e.value)
    assert checkpoints.step_of(checkpoints.found(run.out)[0]) == saved
    again = train(tiny(), options(resume="auto"))
    if what != "log.jsonl":
        same(left(again.out), left(whole.out))


def log_that_fails(run: RunOptions, step: int) -> Any:
    """A log whose file is on a full disk from ``step`` on."""
    write = runlog.RunLog.write

    def failing(self: runlog.RunLog, kind: str, number: int, **values: Any) -> None:
        if number >= step:
            raise disk.no_room(run.out / runlog.NAME, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        write(self, kind, number, **values)

    return failing


def test_where_nothing_can_be_written_both_are_said(tiny: Make, options: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    run = options(save_steps=1)
    monkeypatch.setattr(runlog.RunLog, "write", log_that_fails(run, 3))

    def fill(tick: Tick) -> None:
        if tick.step == 3:
            monkeypatch.setattr(os, "fsync", no_room)

    with pytest.raises(UserError) as error:
        train(tiny(), run, Watch(step=fill))
    assert "log.jsonl, got No space left on device; step 3 could not be saved either: No space left" in str(error.value)
    assert "the last good one, step-00000002, is untouched" in str(error.value)


def test_final_weights_that_cannot_be_written_leave_the_last_checkpoint(
    tiny: Make, options: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = options()
    with (
        monkeypatch.context() as patched,
        pytest.raises(UserError, match=r"to write .*model\.safetensors, got No space"),
    ):
        train(tiny(), run, full_from(6, "model.safetensors", run, patched))
    assert checkpoints.step_of(checkpoints.found(run.out)[0]) == 6
    assert train(tiny(), options(resume="auto")).finished and (run.out / "model.safetensors").exists()


def test_an_output_folder_on_a_read_only_disk(tiny: Make, options: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    real = open

    def read_only(path: Any, mode: str = "r", *more: Any, **named: Any) -> Any:
        if str(path).endswith("run.lock"):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return real(path, mode, *more, **named)

    monkeypatch.setattr("builtins.open", read_only)
    with pytest.raises(UserError, match=r"expected a folder to write to, got .*Read-only file system"):
        train(tiny(), options())


def test_an_output_folder_that_cannot_be_made(tiny: Make, options: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"expected a folder to write to, got .*file/run"):
        train(tiny(), options("file/run"))
