"""A run writes what it promises: log, epochs, validation, the best checkpoint; a dry run writes nothing."""

from __future__ import annotations

import shutil
import time
from typing import Any

import pytest
import torch

from resnet_fast.errors import UserError
from resnet_fast.training import checkpoints, curves, optim, recipe, runlog
from resnet_fast.training.loop import describe_run, train
from resnet_fast.training.options import Tick, Watch
from resnet_fast.training.validation import Validation
from tests.support.runs import Make, assert_log_is_whole, draw_curves, steps

pytestmark = pytest.mark.usefixtures("quick")


def test_a_run_leaves_what_it_promises(tiny: Make, options: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curves, "write_curves", draw_curves)
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
    import torch.nn.functional as F
    from safetensors.torch import load_file

    from resnet_fast.training.datasets import loading
    from resnet_fast.training.step import Normalise

    done = train(tiny(ema=0.5), options())
    net = optim.build_net(tiny(seed=1), 10)
    net.load_state_dict(load_file(done.out / "model.safetensors"))
    found = loading.load_data(tiny())
    samples = [found.val[(0, i)] for i in range(found.val_size)]
    x = Normalise(found.mean, found.std, torch.device("cpu"), True)(torch.stack([s.pixels for s in samples]))
    y = torch.tensor([s.label for s in samples])
    with torch.no_grad():
        out = net.eval()(x)
    assert done.epochs[-1]["val_error"] == pytest.approx((out.argmax(1) != y).double().mean().item())
    assert done.epochs[-1]["val_loss"] == pytest.approx(F.cross_entropy(out, y).item(), rel=1e-5)  # other batches


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


def test_worker_processes_change_nothing(tiny: Make, options: Make, left: Make, same: Make) -> None:
    here = train(tiny(), options("here", workers=0))
    there = train(tiny(), options("there", workers=2))
    same(left(there.out), left(here.out))


@pytest.mark.slow
def test_digits_are_read_by_the_shipped_recipe(options: Make) -> None:
    start = time.process_time()
    done = train(recipe.load_recipe("digits"), options())
    assert done.epochs[-1]["val_error"] <= 0.03
    assert time.process_time() - start < 120  # seconds of one core, whatever else the machine does
