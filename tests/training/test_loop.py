"""A run that is stopped, killed or told to go on ends bit for bit where one that never stopped does."""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from resnet_fast.errors import UserError
from resnet_fast.io import safe_files
from resnet_fast.training import checkpoints, curves, disk, optim, recipe, runlog
from resnet_fast.training.diagnosis import NotFinite
from resnet_fast.training.loop import describe_run, train
from resnet_fast.training.options import RunOptions, RunResult, Tick, Watch
from resnet_fast.training.recipe import Recipe
from resnet_fast.training.validation import Validation

Make = Callable[..., Any]
DRAW = curves.write_curves


@pytest.fixture(autouse=True)
def _quick(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop does not depend on the net, nor on a picture. The slow tests are of processes that this does not reach,
    and train the real one."""
    if request.node.get_closest_marker("slow") is None:
        request.getfixturevalue("minute")
        monkeypatch.setattr(curves, "write_curves", lambda out, title: None)


def steps(out: Path, kind: str = "train") -> list[int]:
    return [line["step"] for line in runlog.of_kind(out, kind)]


def assert_log_is_whole(out: Path, last: int) -> None:
    """A line per step, one per epoch, in order, each once; no note of one step twice."""
    assert steps(out) == list(range(1, last + 1))
    assert steps(out, "epoch") == sorted(set(steps(out, "epoch")))
    notes = Counter(
        (line["step"], line["text"]) for line in runlog.of_kind(out, "note") if "going on" not in line["text"]
    )
    assert not [note for note, count in notes.items() if count > 1]


def test_a_run_leaves_what_it_promises(tiny: Make, options: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curves, "write_curves", DRAW)
    ticks: list[Tick] = []
    lines: list[dict[str, Any]] = []
    done = train(tiny(), options(probe=True), Watch(ticks.append, lines.append))
    assert done.finished and done.step == 6 and done.stopped_by == ""
    assert [(t.step, t.steps, t.epoch) for t in ticks] == [(i, 6, i / 4) for i in range(1, 7)]
    assert {p.name for p in done.out.iterdir()} == {
        "log.jsonl",
        "curves.png",
        "checkpoints",
        "model.safetensors",
        "best.safetensors",
        "run.lock",
    }
    assert_log_is_whole(done.out, 6)
    assert steps(done.out, "epoch") == [4, 6] and [e["epoch"] for e in done.epochs] == [1.0, 1.5]
    assert [{k: e[k] for k in line} for line, e in zip(lines, done.epochs, strict=True)] == lines
    (began,) = runlog.of_kind(done.out, "run")
    assert recipe.from_dict(began["recipe"]) == tiny() and began["input_images_per_s"] > 0
    assert (began["train_images"], began["val_images"], began["left_out_per_epoch"]) == (64, 359, 0)
    assert checkpoints.read_meta(checkpoints.found(done.out)[0])["step"] == 6


def test_an_epochs_figures_are_the_means_of_its_steps(tiny: Make, options: Make) -> None:
    done = train(tiny(epochs=2, lr=0.1), options())
    lines = runlog.of_kind(done.out, "train")
    for number, epoch in enumerate(done.epochs):
        four = lines[4 * number : 4 * number + 4]
        assert epoch["train_loss"] == pytest.approx(sum(line["loss"] for line in four) / 4)
        assert epoch["train_error"] == pytest.approx(sum(line["error"] for line in four) / 4)
    rates = [line["rate"] for line in lines]
    assert rates == [0.1 * tiny(epochs=2).factor(step, 4) for step in range(8)]


def test_validation_is_that_of_the_exported_weights(tiny: Make, options: Make) -> None:
    import torch
    import torch.nn.functional as F
    from safetensors.torch import load_file

    from resnet_fast.training.datasets import loading
    from resnet_fast.training.step import Normalise

    done = train(tiny(ema=0.5), options())
    net = optim.build(tiny(seed=1), 10)
    net.load_state_dict(load_file(done.out / "model.safetensors"))
    found = loading.load_data(tiny())
    samples = [found.val[(0, i)] for i in range(found.val_size)]
    x = Normalise(found.mean, found.std, torch.device("cpu"), True)(torch.stack([s.pixels for s in samples]))
    y = torch.tensor([s.label for s in samples])
    with torch.no_grad():
        out = net.eval()(x)
    assert done.epochs[-1]["val_error"] == pytest.approx((out.argmax(1) != y).double().mean().item())
    assert done.epochs[-1]["val_loss"] == pytest.approx(F.cross_entropy(out, y).item(), rel=1e-5)  # other batches


def test_a_run_stopped_after_any_step_ends_as_one_that_was_not(
    tiny: Make, options: Make, left: Make, same: Make
) -> None:
    chosen = tiny(steps=5, subset=48)
    whole = train(chosen, options("whole"))
    for stop in range(1, 5):
        first = train(chosen, options(f"stop {stop}", stop_after=stop))
        assert (first.finished, first.step, first.stopped_by) == (False, stop, "--stop-after")
        assert not (first.out / "model.safetensors").exists()
        second = train(chosen, options(f"stop {stop}", resume="auto"))
        assert second.finished
        same(left(second.out), left(whole.out))
        assert_log_is_whole(second.out, 5)


def errors_of(values: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Have validation find these shares of wrong answers, one epoch after the other."""
    left = iter(values)
    monkeypatch.setattr(Validation, "measure", lambda self, net, step: (1.0, next(left), 359))


@pytest.mark.parametrize("stop", [0, 3, 4, 5, 8, 9])
def test_the_best_epoch_is_kept(
    stop: int, tiny: Make, options: Make, same: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file

    errors_of([0.5, 0.25, 0.25, 0.75], monkeypatch)
    chosen, run = tiny(epochs=4, lr=0.01), options(save_steps=1, keep=1)
    if stop:
        train(chosen, options(save_steps=1, keep=1, stop_after=stop))
        run = options(save_steps=1, keep=1, resume="auto")
        if stop in (4, 8):  # killed between the checkpoint and what is kept of it
            shutil.rmtree(checkpoints.bests(run.out)[0])
            (run.out / "best.safetensors").unlink()
    done = train(chosen, run)
    assert sorted(p.name for p in checkpoints.folder_of(done.out).iterdir()) == ["best-00000008", "step-00000016"]
    best = checkpoints.bests(done.out)[0]
    assert checkpoints.read_meta(best)["best"] == {"step": 8, "val_error": 0.25}
    same(load_file(done.out / "best.safetensors"), load_file(best / "model.safetensors"))
    with pytest.raises(AssertionError):
        same(load_file(done.out / "best.safetensors"), load_file(done.out / "model.safetensors"))


def test_going_on_from_the_best_one(tiny: Make, options: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    errors_of([0.25, 0.5, 0.5, 0.125, 0.5], monkeypatch)
    chosen = tiny(epochs=3, lr=0.01)
    first = train(chosen, options(keep=1))
    best = checkpoints.bests(first.out)[0]
    assert best.name == "best-00000004"
    train(chosen, options(keep=1, resume=str(best)))
    assert sorted(p.name for p in checkpoints.folder_of(first.out).iterdir()) == [
        "best-00000008",
        "step-00000012",
        "step-00000012-set-aside",
    ]


def test_a_plan_writes_nothing(tiny: Make, options: Make) -> None:
    run = options()
    lines = describe_run(tiny(epochs=2, lr=0.1, schedule="step", milestones=[1]), run)
    assert lines == [
        "net: cifar_resnet20, 1,570 parameters",
        "data: digits: 64 training and 359 validation images of 10 classes (0, 1, 2, 3, 4, …)",
        "note: a fifth of the 1,797 images is the validation set, the same for every seed",
        lines[3],
        lines[4],
        "steps: 8 of 16 images, 4 per epoch, 2 epochs",
        "optimizer: SGD, momentum 0.9, nesterov False, weight_decay 0.0001",
        "learning rate: 0.1 at step 1, 0.01 at step 5, 0.01 at step 8",
        f"folder: {run.out}",
    ]
    counts = [int(part.split()[-1]) for part in lines[3].split(": ")[1].split(", ")]
    assert len(counts) == 10 and sum(counts) == 64 and lines[4].startswith("validation images per class: 0 ")
    assert not run.out.exists()
    train(tiny(), options(stop_after=2))
    before = {p: p.stat().st_mtime_ns for p in run.out.rglob("*")}
    assert describe_run(tiny(), options(resume="auto"))[-1].endswith("step-00000002")
    assert {p: p.stat().st_mtime_ns for p in run.out.rglob("*")} == before


def test_log_lines_after_a_stop_are_those_of_one_that_did_not(tiny: Make, options: Make) -> None:
    chosen = tiny(steps=11, subset=112)  # seven steps an epoch, a line every fifth
    whole = train(chosen, options("whole", log_every=5))
    for stop in (1, 4, 6, 8, 9, 10):
        train(chosen, options(f"stop {stop}", log_every=5, stop_after=stop))
        again = train(chosen, options(f"stop {stop}", log_every=5, resume="auto"))
        assert figures(again.out) == figures(whole.out)
    for _ in range(11):
        train(chosen, options("each", log_every=5, resume="auto", stop_after=1))
    assert figures(options("each").out) == figures(whole.out)


def figures(out: Path) -> list[Any]:
    """What the log says of training, without times."""
    return [[line[key] for key in ("step", "epoch", "loss", "error", "rate")] for line in runlog.of_kind(out, "train")]


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
    monkeypatch.setattr(curves, "write_curves", DRAW)
    whole = train(tiny(), options("whole"))
    run = options(save_steps=100, tensorboard=True)
    with monkeypatch.context() as patched:
        watch = full_from(3, what, run, patched)
        if what == "log.jsonl":
            patched.setattr(runlog.RunLog, "write", log_that_fails(run, 4))
            watch = Watch()
        with pytest.raises(UserError, match=rf"room and leave to write .*{what}, got No space left on device; ") as e:
            train(tiny(), run, watch)
    assert f"the run is saved after step {saved}; mend that and go on with --resume auto" in str(e.value)
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


@pytest.mark.parametrize(
    "values",
    [
        {"ema": 0.7, "mixup": 0.4, "cutmix": 1.0, "label_smoothing": 0.1},
        {"momentum": 0.0, "norm_weight_decay": 0.0},
        {"amp": "float16", "nesterov": True},
        {"accumulate": 2, "amp": "bfloat16", "channels_last": False},
    ],
    ids=["averaged and mixed", "no momentum", "scaled", "in parts"],
)
def test_every_part_of_the_state_survives_a_stop(
    values: dict[str, Any], tiny: Make, options: Make, left: Make, same: Make
) -> None:
    chosen = tiny(**values)
    whole = train(chosen, options("whole", log_every=4))
    for _ in range(3):
        stopped = train(chosen, options(resume="auto", stop_after=2, log_every=4))
    assert stopped.finished
    same(left(stopped.out), left(whole.out))


def test_what_was_logged_after_the_checkpoint_is_logged_once(tiny: Make, options: Make, left: Make, same: Make) -> None:
    whole = train(tiny(), options("whole"))
    run = options(save_steps=1, stop_after=5)
    train(tiny(), run)
    shutil.rmtree(checkpoints.found(run.out)[0])  # as if killed before it was saved, after the log was written
    again = train(tiny(), options(resume="auto"))
    assert_log_is_whole(again.out, 6)
    same(left(again.out), left(whole.out))


def test_an_older_checkpoint_by_name_rewinds_the_run(tiny: Make, options: Make, left: Make, same: Make) -> None:
    run = options(save_steps=1, keep=9)
    whole = left(train(tiny(), run).out)
    older = checkpoints.found(run.out)[-2]
    assert older.name == "step-00000002"
    train(tiny(), options(resume=str(older), stop_after=1))
    assert checkpoints.found(run.out)[0].name == "step-00000003" and steps(run.out)[-1] == 3
    done = train(tiny(), options(resume="auto"))
    assert_log_is_whole(done.out, 6)
    same(left(done.out), whole)


def test_a_finished_run_may_be_extended(tiny: Make, options: Make, left: Make, same: Make) -> None:
    constant = {"schedule": "constant", "warmup": 0}
    whole = train(tiny(epochs=2, **constant), options("whole"))
    train(tiny(epochs=1, **constant), options())
    again = train(tiny(epochs=1, **constant), options(resume="auto"))
    assert again.finished and len(again.epochs) == 1  # nothing left to do
    longer = train(tiny(epochs=2, **constant), options(resume="auto"))
    assert longer.step == 8
    same(left(longer.out), left(whole.out))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lr": 0.2}, r"got lr: 0\.2 \(was 0\.05\)"),
        ({"batch": 32, "seed": 1}, r"batch: 32 \(was 16\); seed: 1 \(was 0\)"),
        ({"classes": 11}, r"expected the 10 classes of .*, got 11 in the data now"),
        ({"model": "cifar_resnet32"}, r"model: cifar_resnet32 \(was cifar_resnet20\)"),
    ],
)
def test_another_recipe_does_not_go_on_with_a_checkpoint(
    changes: dict[str, Any], said: str, tiny: Make, options: Make
) -> None:
    run = options(stop_after=1)
    train(tiny(), run)
    before = (run.out / "log.jsonl").read_bytes()
    with pytest.raises(UserError, match=said):
        train(tiny(**changes), options(resume="auto"))
    assert (run.out / "log.jsonl").read_bytes() == before


def test_a_new_run_does_not_overwrite_an_old_one(tiny: Make, options: Make) -> None:
    run = options(stop_after=1)
    train(tiny(), run)
    before = {p: p.read_bytes() for p in run.out.rglob("*") if p.is_file() and p.name != "run.lock"}
    with pytest.raises(UserError, match=r"without checkpoints for a new run, got .*step-00000001; go on with --resume"):
        train(tiny(), options())
    assert {p: p.read_bytes() for p in run.out.rglob("*") if p.is_file() and p.name != "run.lock"} == before


def test_two_runs_do_not_share_a_folder(tiny: Make, options: Make) -> None:
    refused: list[str] = []

    def second(tick: Tick) -> None:
        if tick.step == 2:
            with pytest.raises(UserError) as error:
                train(tiny(), options(resume="auto"))
            refused.append(str(error.value))

    assert train(tiny(), options(), Watch(step=second)).finished
    assert len(refused) == 1 and f"where process {os.getpid()} is at work" in refused[0]


def test_an_output_folder_that_cannot_be_made(tiny: Make, options: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"expected a folder to write to, got .*file/run"):
        train(tiny(), options("file/run"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"threads": 0}, "threads >= 1"),
        ({"keep": 0}, "keep >= 1"),
        ({"log_every": 0}, "correct --log-every"),
        ({"stop_after": 0}, "correct --stop-after"),
        ({"workers": -1}, "workers >= 0"),
        ({"save_steps": -1}, "save_steps >= 0"),
        ({"parallel": "tp"}, "parallel among ddp, fsdp"),
        ({"device": "abacus"}, "a device such as cpu or cuda:0"),
        ({"device": "meta"}, "device cpu or cuda"),
        ({"device": "cuda:99"}, "CUDA devices that PyTorch sees"),
    ],
)
def test_an_option_that_cannot_be_used(changes: dict[str, Any], said: str, tiny: Make, options: Make) -> None:
    with pytest.raises(UserError, match=said):
        train(tiny(), options(**changes))
    assert not options().out.exists()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_ends_the_run_after_its_step(name: str, tiny: Make, options: Make) -> None:
    number = getattr(signal, name)
    before = signal.getsignal(number)

    def send(tick: Tick) -> None:
        if tick.step == 3:
            signal.raise_signal(number)

    done = train(tiny(), options(save_steps=100), Watch(step=send))
    assert (done.finished, done.step, done.stopped_by) == (False, 3, name)
    assert checkpoints.read_meta(checkpoints.found(done.out)[0])["step"] == 3 and steps(done.out) == [1, 2, 3]
    assert signal.getsignal(number) == before
    assert train(tiny(), options(resume="auto")).finished


def test_a_second_signal_ends_it_at_once(tiny: Make, options: Make) -> None:
    def send(tick: Tick) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(tiny(), options(), Watch(step=send))
    assert train(tiny(), options(resume="auto")).finished  # the lock is free


def test_a_run_in_a_thread_leaves_signals_alone(tiny: Make, options: Make) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        done: RunResult = pool.submit(train, tiny(steps=1), options()).result()
    assert done.finished


def test_worker_processes_change_nothing(tiny: Make, options: Make, left: Make, same: Make) -> None:
    here = train(tiny(), options("here", workers=0))
    there = train(tiny(), options("there", workers=2))
    same(left(there.out), left(here.out))


def child(chosen: Recipe, run: RunOptions) -> Any:
    """A process that trains; its torch is imported already, once for all of them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["resnet_fast.training.loop", "resnet_fast.models.registry", "sklearn.datasets"])
    process = context.Process(target=train, args=(chosen, run))
    process.start()
    return process


def wait_for(out: Path, step: int, process: Any, seconds: float = 120) -> None:
    """Until ``step`` is in the log, or the process has ended."""
    end = time.monotonic() + seconds
    while process.is_alive() and (not steps(out) or steps(out)[-1] < step):
        assert time.monotonic() < end, f"no step {step} in {seconds} s"
        time.sleep(0.005)


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "length", "times"), [(0, 60, 7), (1, 30, 3)])
def test_a_run_killed_again_and_again_ends_as_one_that_was_not(
    workers: int, length: int, times: int, tiny: Make, options: Make, left: Make, same: Make
) -> None:
    chosen = tiny(steps=length, subset=320, ema=0.9, mixup=0.4)
    whole = train(chosen, options("whole"))
    run = options("killed", save_steps=1, resume="auto", workers=workers)
    reached, kills = 0, 0
    for seed in range(times):
        chance = random.Random(seed)
        process = child(chosen, run)
        wait_for(run.out, reached + chance.randint(1, 3), process)
        time.sleep(chance.uniform(0, 0.2))
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        reached = steps(run.out)[-1]
        place, meta, complaints = checkpoints.resume_point(run.out, "auto")
        assert place is not None and complaints == [] and 0 <= reached - meta["step"] <= 1
    assert kills == times and reached < length
    process = child(chosen, run)
    process.join()
    assert process.exitcode == 0
    same(left(run.out), left(whole.out))
    assert_log_is_whole(run.out, length)
    assert not list(checkpoints.folder_of(run.out).glob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_to_the_command_and_its_workers(number: int, code: int, options: Make) -> None:
    run = options()
    command = [sys.executable, "-m", "resnet_fast.cli.main", "train", "--out", str(run.out), "--log-every", "1"]
    command += ["--size", "8", "--batch", "16", "--epochs", "500", "--set", "subset=64", "--save-steps", "100000"]
    command += ["--workers", "1", "--threads", "1", "--device", "cpu", "--no-tensorboard"]
    # In a group of its own, all of which gets the signal, as a terminal or a scheduler sends it; and with the signal
    # heeded, which whoever runs the tests in the background may have this process ignore.
    heed = functools.partial(signal.signal, number, signal.SIG_DFL)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=heed)
    try:
        end = time.monotonic() + 120
        while process.poll() is None and len(steps(run.out)) < 3:
            assert time.monotonic() < end
            time.sleep(0.02)
        os.killpg(process.pid, number)
        _, said = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == code, said
    last = steps(run.out)[-1]
    assert checkpoints.read_meta(checkpoints.found(run.out)[0])["step"] == last
    name = signal.Signals(number).name
    assert said.splitlines()[-1] == f"stopped by {name} after step {last}, saved; go on with --resume auto"
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_terminal_that_closes_leaves_a_saved_run(options: Make) -> None:
    """As a lost connection does: the kernel sends SIGHUP, and whatever is printed from then on fails."""
    run = options()
    own_terminal = (
        "import fcntl, os, sys, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
        "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    )
    command = [sys.executable, "-c", own_terminal, "-m", "resnet_fast.cli.main", "train", "--out", str(run.out)]
    command += [
        "--log-every",
        "1",
        "--size",
        "8",
        "--batch",
        "16",
        "--epochs",
        "5000",
        "--set",
        "subset=64",
        "--save-steps",
        "100000",
    ]
    command += ["--threads", "1", "--device", "cpu", "--no-tensorboard"]
    ours, theirs = os.openpty()
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    threading.Thread(target=_drain, args=(ours,), daemon=True).start()
    try:
        end = time.monotonic() + 120
        while process.poll() is None and len(steps(run.out)) < 5:
            assert time.monotonic() < end
            time.sleep(0.02)
    finally:
        os.close(ours)
    assert process.wait(60) == 129
    assert checkpoints.step_of(checkpoints.found(run.out)[0]) == steps(run.out)[-1]


def _drain(terminal: int) -> None:
    with contextlib.suppress(OSError):
        while os.read(terminal, 65536):
            pass


@pytest.mark.slow
def test_digits_are_read_by_the_shipped_recipe(options: Make) -> None:
    start = time.process_time()
    done = train(recipe.load_recipe("digits"), options())
    assert done.epochs[-1]["val_error"] <= 0.03
    assert time.process_time() - start < 120  # seconds of one core, whatever else the machine does
