"""A run that is stopped and resumed ends bit for bit where one that never stopped does."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from resnet_fast.errors import UserError
from resnet_fast.training import checkpoints, runlog
from resnet_fast.training.loop import train
from resnet_fast.training.options import Tick, Watch
from tests.support.runs import Make, assert_log_is_whole, steps

pytestmark = pytest.mark.usefixtures("quick")


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
