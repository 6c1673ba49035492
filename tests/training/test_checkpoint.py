"""Checkpoints: everything comes back bit for bit, damage is named, and whatever interrupts leaves a good one."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from resnet_fast.errors import UserError
from resnet_fast.training import checkpoint, curves
from resnet_fast.training.checkpoint import Damaged, State
from resnet_fast.training.distributed import World
from resnet_fast.training.loop import Options, Watch, train
from resnet_fast.training.recipe import Recipe

META = {"classes": 3, "recipe": {}, "sums": [0.1, 2.0, 3.0], "seconds": 1.5}


def make(seed: int = 0, amp: bool = False, ema: bool = False, steps: int = 2, momentum: float = 0.9) -> State:
    """A small net after ``steps`` steps of SGD."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3))
    model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum, weight_decay=0.01)
    averaged = torch.optim.swa_utils.AveragedModel(model, use_buffers=True) if ema else None
    state = State(model, optimizer, torch.amp.GradScaler("cpu", enabled=amp, init_scale=4.0 + seed), averaged)
    advance(state, steps)
    return state


def advance(state: State, steps: int) -> None:
    for _ in range(steps):
        x = torch.randn(2, 3, 4, 4) * (1 + random.random() + float(np.random.rand()))
        state.scaler.scale(state.model(x).square().sum()).backward()
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad()
        if state.ema is not None:
            state.ema.update_parameters(state.model)  # type: ignore[operator]


def content(state: State) -> dict[str, Any]:
    ema = None if state.ema is None else state.ema.state_dict()
    return {
        "model": state.model.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "scaler": state.scaler.state_dict(),
        "ema": ema,
    }


def save(out: Path, state: State, step: int, keep: int = 2, **meta: Any) -> Path:
    return checkpoint.save(out, state, META | {"step": step} | meta, World(), sharded=False, keep=keep)


def names(out: Path) -> list[str]:
    """What is in the folder, hidden or not."""
    return sorted(p.name for p in checkpoint.folder_of(out).iterdir())


@pytest.mark.parametrize("momentum", [0.9, 0.0])
@pytest.mark.parametrize(("amp", "ema"), [(False, False), (True, False), (False, True)])
def test_everything_comes_back_bit_for_bit(
    amp: bool, ema: bool, momentum: float, tmp_path: Path, same: Callable[[Any, Any], None]
) -> None:
    state = make(0, amp, ema, momentum=momentum)
    save(tmp_path, state, 2)
    place, meta, complaints = checkpoint.choose(tmp_path, "auto")
    advance(state, 3)
    drawn = (torch.randn(5), np.random.rand(5).tolist(), [random.random() for _ in range(5)])
    other = make(1, amp, ema, steps=0, momentum=momentum)
    assert place is not None and complaints == [] and {k: meta[k] for k in META} == META and meta["step"] == 2
    checkpoint.load(place, meta, other, World())
    assert other.model[0].weight.is_contiguous(memory_format=torch.channels_last)  # type: ignore[index]
    advance(other, 3)  # draws from all three generators
    same(content(other), content(state))
    same((torch.randn(5), np.random.rand(5).tolist(), [random.random() for _ in range(5)]), drawn)


def test_the_newest_are_kept(tmp_path: Path) -> None:
    state = make()
    for step in (9, 10, 100):
        save(tmp_path, state, step, keep=2)
    assert [p.name for p in checkpoint.found(tmp_path)] == ["step-00000100", "step-00000010"]
    save(tmp_path, state, 101, keep=1)
    assert names(tmp_path) == ["step-00000101"]


def test_later_steps_that_the_run_did_not_go_on_from_are_removed(tmp_path: Path) -> None:
    state = make()
    for step in (10, 20, 30):
        save(tmp_path, state, step, keep=3)
    # Gone on from 10, for the others are damaged or not wanted: a resume must not find them newer than this.
    save(tmp_path, state, 15, keep=1)
    assert names(tmp_path) == ["step-00000015"]


def test_what_a_killed_run_left_unfinished_is_removed(tmp_path: Path) -> None:
    state = make()
    save(tmp_path, state, 10)
    unfinished = checkpoint.folder_of(tmp_path) / ".step-00000012"
    unfinished.mkdir()
    (unfinished / "model.safetensors").write_bytes(b"half")
    assert [p.name for p in checkpoint.found(tmp_path)] == ["step-00000010"]
    save(tmp_path, state, 14)
    assert names(tmp_path) == ["step-00000010", "step-00000014"]


def damage(place: Path, how: str) -> str:
    """Spoil a checkpoint; returns what a complaint about it has to name."""
    name, _, what = how.partition(": ")
    path = place / name
    if what == "gone":
        path.unlink()
    elif what == "truncated":
        path.write_bytes(path.read_bytes()[:-7])
    elif what == "empty":
        path.write_bytes(b"")
    elif what == "flipped":
        body = bytearray(path.read_bytes())
        body[len(body) // 2] ^= 1
        path.write_bytes(body)
    else:
        path.write_text(what)
    return name


HARM = [f"{name}: {what}" for name in ("model.safetensors", "state.pt", "meta.json") for what in ("gone", "truncated")]
HARM += [
    "model.safetensors: flipped",
    "state.pt: flipped",
    "meta.json: empty",
    "meta.json: []",
    'meta.json: {"step": 3}',
]


@pytest.mark.parametrize("how", HARM)
def test_a_damaged_checkpoint_is_named_and_passed_over(how: str, tmp_path: Path) -> None:
    state = make()
    good, bad = save(tmp_path, state, 1), save(tmp_path, state, 2)
    name = damage(bad, how)
    with pytest.raises(Damaged) as error:
        checkpoint.choose(tmp_path, str(bad))
    assert str(bad) in str(error.value) and (name in str(error.value) or name == "meta.json")
    place, meta, complaints = checkpoint.choose(tmp_path, "auto")
    assert place == good and meta["step"] == 1
    assert len(complaints) == 1 and str(bad) in complaints[0]


def test_no_flipped_bit_of_meta_goes_unnoticed(tmp_path: Path) -> None:
    path = save(tmp_path, make(), 1) / "meta.json"
    body, good = path.read_bytes(), checkpoint.read_meta(path.parent)
    for position in range(len(body)):
        path.write_bytes(body[:position] + bytes([body[position] ^ 1]) + body[position + 1 :])
        try:
            meta = checkpoint.read_meta(path.parent)
        except Damaged:
            continue
        assert {key: meta.get(key) for key in good} == good  # the name of its digest, say, is no content
    path.write_bytes(body)
    assert checkpoint.read_meta(path.parent) == good


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(Damaged, match=r"a checkpoint folder with meta\.json, got .*absent"):
        checkpoint.choose(tmp_path, str(tmp_path / "absent"))
    (tmp_path / "meta.json").write_text('{"format": "another", "files": {}}')
    with pytest.raises(Damaged, match="expected a checkpoint of the format 'resnet_fast training checkpoint 1'"):
        checkpoint.choose(tmp_path, str(tmp_path))


def test_without_any_checkpoint_there_is_nothing_to_go_on_from(tmp_path: Path) -> None:
    assert checkpoint.choose(tmp_path, "auto") == (None, {}, [])


def test_where_every_checkpoint_is_damaged_nothing_is_overwritten(tmp_path: Path) -> None:
    for step in (1, 2):
        damage(save(tmp_path, make(), step), "state.pt: truncated")
    with pytest.raises(Damaged, match=r"a good checkpoint in .*, got 2 damaged ones, first .*step-00000002"):
        checkpoint.choose(tmp_path, "auto")


def test_resume_goes_on_from_the_older_one_and_says_so(
    tiny: Callable[..., Recipe],
    options: Callable[..., Options],
    left: Callable[[Path], dict[str, Any]],
    same: Callable[[Any, Any], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(curves, "write", lambda out, title: None)
    whole = train(tiny(steps=3), options("whole", save_steps=1))
    run = options(save_steps=1, stop_after=2)
    train(tiny(steps=3), run)
    newest = checkpoint.found(run.out)[0]
    damage(newest, "model.safetensors: flipped")
    told: list[str] = []
    ended = train(tiny(steps=3), options(save_steps=1, resume="auto"), Watch(note=told.append))
    assert any("a damaged checkpoint was passed over" in t and f"{newest}/model.safetensors" in t for t in told)
    assert any("going on after step 1 of 3" in t for t in told)
    same(left(ended.out), left(whole.out))


def full(*arguments: Any, **named: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("where", ["os.fsync", "os.rename", "pathlib.Path.write_bytes", "pathlib.Path.mkdir"])
def test_a_full_disk_leaves_the_previous_checkpoint(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = make()
    good = save(tmp_path, state, 1)
    with monkeypatch.context() as patched:
        patched.setattr(where, full)
        with pytest.raises(UserError, match=r"No space left on device; the last good one, step-00000001, is untouched"):
            save(tmp_path, state, 2)
    assert names(tmp_path) == ["step-00000001"] and checkpoint.read_meta(good)["step"] == 1
    assert checkpoint.read_meta(save(tmp_path, state, 2))["step"] == 2


class Killed(BaseException):
    """What no handler of an error catches: here the process would be gone."""


def test_a_death_at_any_call_leaves_a_whole_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = make()
    save(tmp_path / "good", state, 1)
    calls = [(os, "fsync"), (os, "rename"), (Path, "write_bytes"), (Path, "write_text"), (Path, "mkdir")]
    calls += [(shutil, "rmtree"), (os, "open")]
    seen: set[int] = set()
    for fatal in range(1000):
        out, left = tmp_path / str(fatal), [fatal]
        shutil.copytree(tmp_path / "good", out)

        def dying(real: Any, left: list[int] = left) -> Any:
            def call(*arguments: Any, **named: Any) -> Any:
                if left[0] == 0:
                    raise Killed
                left[0] -= 1
                return real(*arguments, **named)

            return call

        with monkeypatch.context() as patched:
            for place, name in calls:
                patched.setattr(place, name, dying(getattr(place, name)))
            try:
                save(out, state, 2, keep=1)
            except Killed:
                survived = True
            else:
                survived = False
        found, meta, complaints = checkpoint.choose(out, "auto")
        assert found is not None and complaints == [] and meta["step"] in (1, 2)
        seen.add(meta["step"])
        if not survived:
            break
    assert seen == {1, 2} and fatal > 10


@pytest.mark.slow
def test_a_limit_on_file_sizes_is_said_in_one_line(
    tiny: Callable[..., Recipe], options: Callable[..., Options]
) -> None:
    run = options(save_steps=2, stop_after=2)
    train(tiny(), run)
    code = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))\n"  # log and curves fit, weights do not
        "from resnet_fast.cli.main import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    chosen = [f"--set={key}={json.dumps(value)}" for key, value in tiny().to_dict().items() if key != "save"]
    command = [sys.executable, "-c", code, "train", "--out", str(run.out), "--resume", "auto", "--save-steps", "2"]
    done = subprocess.run([*command, "--no-tensorboard", *chosen], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert "File too large; the last good one, step-00000002, is untouched" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr and names(run.out) == ["step-00000002"]
    assert train(tiny(), options(resume="auto")).finished


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "curves.png"
    checkpoint.write_whole(path, b"old")
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"room and leave to write .*curves\.png, got No space left on device"):
            checkpoint.write_whole(path, b"new")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["curves.png"]


def test_the_exported_weights_load_into_the_stock_net(
    tiny: Callable[..., Recipe], options: Callable[..., Options]
) -> None:
    from safetensors import safe_open

    from resnet_fast.models import registry

    done = train(tiny(steps=1), options())
    with safe_open(done.out / "model.safetensors", "pt") as file:
        facts = json.loads(file.metadata()["resnet_fast"])
        assert (facts["model"], facts["classes"], facts["size"]) == ("cifar_resnet20", list("0123456789"), 8)
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    registry.build("cifar_resnet20", num_classes=10).load_state_dict(weights, strict=True)
