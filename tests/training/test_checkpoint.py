"""Checkpoints: everything comes back bit for bit, damage is named, and whatever interrupts leaves a good one."""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from resnet_fast.errors import UserError
from resnet_fast.training import checkpoints, curves, disk
from resnet_fast.training.checkpoints import Damaged, TrainingState
from resnet_fast.training.distributed import World
from resnet_fast.training.loop import train
from resnet_fast.training.options import RunOptions, Watch
from resnet_fast.training.recipe import Recipe
from tests.support.checkpoint_cases import META, advance, content, make, reseal, touching


def save(out: Path, state: TrainingState, step: int, keep: int = 2, **meta: Any) -> Path:
    return checkpoints.save_checkpoint(out, state, META | {"step": step} | meta, World(), sharded=False, keep=keep)


def names(out: Path) -> list[str]:
    """What is in the folder, hidden or not."""
    return sorted(p.name for p in checkpoints.folder_of(out).iterdir())


@pytest.mark.parametrize("momentum", [0.9, 0.0])
@pytest.mark.parametrize(("amp", "ema"), [(False, False), (True, False), (False, True)])
def test_everything_comes_back_bit_for_bit(
    amp: bool, ema: bool, momentum: float, tmp_path: Path, same: Callable[[Any, Any], None]
) -> None:
    state = make(0, amp, ema, momentum=momentum)
    save(tmp_path, state, 2)
    place, meta, complaints = checkpoints.resume_point(tmp_path, "auto")
    advance(state, 3)
    drawn = (torch.randn(5), np.random.rand(5).tolist(), [random.random() for _ in range(5)])
    other = make(1, amp, ema, steps=0, momentum=momentum)
    assert place is not None and complaints == [] and {k: meta[k] for k in META} == META and meta["step"] == 2
    checkpoints.restore_checkpoint(place, meta, other, World())
    assert other.model[0].weight.is_contiguous(memory_format=torch.channels_last)  # type: ignore[index]
    advance(other, 3)  # draws from all three generators
    same(content(other), content(state))
    same((torch.randn(5), np.random.rand(5).tolist(), [random.random() for _ in range(5)]), drawn)


def test_the_newest_are_kept(tmp_path: Path) -> None:
    state = make()
    for step in (9, 10, 100):
        save(tmp_path, state, step, keep=2)
    assert [p.name for p in checkpoints.found(tmp_path)] == ["step-00000100", "step-00000010"]
    save(tmp_path, state, 101, keep=1)
    assert names(tmp_path) == ["step-00000101"]


def test_only_what_the_run_wrote_is_removed(tmp_path: Path) -> None:
    state = make()
    for step in (1, 2, 4):
        save(tmp_path, state, step, keep=9, run="mine")
    folder = checkpoints.folder_of(tmp_path)
    shutil.copytree(folder / "step-00000004", folder / "step-best")
    shutil.copytree(folder / "step-00000004", folder / "step-00000004-backup")
    shutil.copytree(folder / "step-00000001", folder / ".step-00000001-before")
    (folder / "step-notes").write_text("a file")
    (folder / "step-00000000").mkdir()
    (folder / "step-00000000" / "mine.txt").write_text("no checkpoint")
    (folder / "step-00000005").symlink_to("step-00000004")
    save(tmp_path, state, 3, keep=9, run="another")
    save(tmp_path, state, 6, keep=1, run="mine")
    assert names(tmp_path) == [
        ".step-00000001-before",
        "step-00000000",
        "step-00000003",
        "step-00000004-backup",
        "step-00000005",
        "step-00000006",
        "step-best",
        "step-notes",
    ]


def test_the_best_one_is_kept_besides_the_newest(tmp_path: Path) -> None:
    state = make()
    for step in (1, 2, 3):
        place = save(tmp_path, state, step, keep=1, run="mine")
        if step < 3:
            assert checkpoints.keep_best(place, tmp_path).name == f"best-{step:08d}"
    assert names(tmp_path) == ["best-00000002", "step-00000003"]
    best = checkpoints.best_of(tmp_path, "mine")
    assert best is not None and checkpoints.read_meta(best)["step"] == 2
    assert checkpoints.best_of(tmp_path, "another") is None
    assert [p.name for p in checkpoints.found(tmp_path)] == ["step-00000003"]  # at which --resume auto looks
    checkpoints.restore_checkpoint(best, checkpoints.read_meta(best), make(1), World())
    other = save(tmp_path, state, 4, keep=1, run="another")
    checkpoints.keep_best(other, tmp_path)
    assert names(tmp_path) == ["best-00000002", "best-00000004", "step-00000003", "step-00000004"]


def test_where_the_newest_are_damaged_the_best_one_is_gone_on_with(tmp_path: Path) -> None:
    state = make()
    best = checkpoints.keep_best(save(tmp_path, state, 1, run="mine"), tmp_path)
    damage(save(tmp_path, state, 2, keep=1, run="mine"), "state.pt: truncated")
    place, meta, complaints = checkpoints.resume_point(tmp_path, "auto")
    assert place == best and meta["step"] == 1 and len(complaints) == 1


def test_the_best_one_needs_no_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = save(tmp_path, make(), 1, run="mine")
    monkeypatch.setattr(os, "link", full)
    best = checkpoints.keep_best(place, tmp_path)
    shutil.rmtree(place)
    assert checkpoints.read_meta(best)["step"] == 1


def test_a_best_one_that_cannot_be_written_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = make()
    checkpoints.keep_best(save(tmp_path, state, 1, run="mine"), tmp_path)
    place = save(tmp_path, state, 2, run="mine")
    monkeypatch.setattr(os, "mkdir", full)
    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(UserError, match="No space left on device"):
        checkpoints.keep_best(place, tmp_path)
    assert names(tmp_path) == ["best-00000001", "step-00000001", "step-00000002"]


def test_a_folder_in_the_way_is_renamed_and_named(tmp_path: Path) -> None:
    place = checkpoints.folder_of(tmp_path) / "step-00000002"
    place.mkdir(parents=True)
    (place / "mine.txt").write_text("no checkpoint")
    told: list[str] = []
    checkpoints.save_checkpoint(tmp_path, make(), META | {"step": 2}, World(), False, 1, told.append)
    assert names(tmp_path) == ["step-00000002", "step-00000002-set-aside"]
    assert (place.with_name("step-00000002-set-aside") / "mine.txt").exists()
    assert told == [f"{place} is not this run's: renamed to step-00000002-set-aside"]


def test_later_steps_are_untouched_by_a_save(tmp_path: Path) -> None:
    state = make()
    for step in (10, 20, 30):
        save(tmp_path, state, step, keep=3)
    save(tmp_path, state, 15, keep=1)
    assert names(tmp_path) == ["step-00000015", "step-00000020", "step-00000030"]


def test_a_pipe_in_place_of_meta_json_is_not_waited_for(tmp_path: Path) -> None:
    place = save(tmp_path, make(), 10)
    save(tmp_path, make(), 20)
    (place / "meta.json").unlink()
    os.mkfifo(place / "meta.json")
    with pytest.raises(Damaged, match="No plain file"):
        checkpoints.read_meta(place)
    assert checkpoints.resume_point(tmp_path, "auto")[0] == checkpoints.found(tmp_path)[0]
    save(tmp_path, make(), 30, keep=1)
    assert names(tmp_path) == ["step-00000010", "step-00000030"]  # not known to be the run's: it stays


def test_a_checkpoint_is_of_the_step_that_it_is_named_by(tmp_path: Path) -> None:
    place = save(tmp_path, make(), 10)
    shutil.copytree(place, place.with_name("step-99999999"))
    with pytest.raises(Damaged, match=r"a checkpoint of step 99999999, got .* of step 10; rename the folder"):
        checkpoints.read_meta(place.with_name("step-99999999"))
    found, meta, complaints = checkpoints.resume_point(tmp_path, "auto")
    assert (found, meta["step"], len(complaints)) == (place, 10, 1)
    shutil.copytree(place, tmp_path / "copy")
    assert checkpoints.read_meta(tmp_path / "copy")["step"] == 10


def test_a_link_in_place_of_meta_json_is_not_followed(tmp_path: Path) -> None:
    place = save(tmp_path, make(), 10)
    (place / "meta.json").rename(tmp_path / "outside.json")
    (place / "meta.json").symlink_to(tmp_path / "outside.json")
    with pytest.raises(Damaged, match=r"files inside .*, got a link meta\.json"):
        checkpoints.read_meta(place)


def test_a_hidden_folder_with_other_files_in_it_stays(tmp_path: Path) -> None:
    folder = checkpoints.folder_of(tmp_path)
    for name in (".step-00000010", ".step-00000020", ".step-00000090", ".best-00000020"):
        (folder / name).mkdir(parents=True)
        (folder / name / "mine.txt").write_text(name)
    (folder / ".step-00000080").mkdir()
    (folder / ".step-00000080" / "state.pt").touch()  # what a killed process left
    state = make()
    for step in (10, 20, 30):
        checkpoints.keep_best(save(tmp_path, state, step, keep=1), tmp_path)
    assert names(tmp_path) == [
        ".best-00000020-set-aside",
        ".step-00000010-set-aside",
        ".step-00000020-set-aside",
        ".step-00000090",
        "best-00000030",
        "step-00000030",
    ]
    kept = {p.parent.name.removesuffix("-set-aside"): p.read_text() for p in folder.glob("*/mine.txt")}
    assert len(kept) == 4 and all(name == text for name, text in kept.items())


def test_a_run_goes_on_from_elsewhere_over_no_other_run(
    tiny: Callable[..., Recipe], options: Callable[..., RunOptions]
) -> None:
    mine, theirs = options("mine"), options("theirs")
    train(tiny(), mine)
    train(tiny(), theirs)
    before = {p: p.read_bytes() for p in mine.out.rglob("*") if p.is_file() and p.name != "run.lock"}
    with pytest.raises(UserError, match=r"of the run that goes on, or a new one, got .*mine with step-.* another run"):
        train(tiny(), options("mine", resume=str(theirs.out)))
    assert {p: p.read_bytes() for p in mine.out.rglob("*") if p.is_file() and p.name != "run.lock"} == before
    assert train(tiny(), options("new", resume=str(theirs.out))).finished


def test_resume_from_an_older_one_keeps_the_later_ones_and_the_log(
    tiny: Callable[..., Recipe], options: Callable[..., RunOptions], minute: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(curves, "write_curves", lambda out, title: None)
    run = options(save_steps=1, keep=9)
    train(tiny(steps=4), run)
    older = checkpoints.found(run.out)[2]
    told: list[str] = []
    train(tiny(steps=4), options(resume=str(older), save_steps=1, keep=9, stop_after=1), Watch(note=told.append))
    aside = [f"step-{step:08d}-set-aside" for step in (4, 3)]
    aside.append("best-00000004-set-aside")
    assert f"later checkpoints are kept under other names, at which no --resume auto looks: {', '.join(aside)}" in told
    assert [p.name for p in checkpoints.found(run.out)] == [f"step-{step:08d}" for step in (3, 2, 1)]
    assert checkpoints.read_meta(checkpoints.folder_of(run.out) / aside[0])["step"] == 4
    kept = (checkpoints.folder_of(run.out) / aside[0] / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in kept if '"train"' in line] == [1, 2, 3, 4]
    told.clear()
    assert train(tiny(steps=4), options(resume="auto", keep=1), Watch(note=told.append)).finished
    assert "removing all but the newest 1 (--keep): step-00000003, step-00000002, step-00000001" in told
    assert names(run.out) == ["best-00000004", *sorted([*aside, "step-00000004"])]


def test_what_a_killed_run_left_unfinished_is_removed(tmp_path: Path) -> None:
    state = make()
    save(tmp_path, state, 10)
    unfinished = checkpoints.folder_of(tmp_path) / ".step-00000012"
    unfinished.mkdir()
    (unfinished / "model.safetensors").write_bytes(b"half")
    assert [p.name for p in checkpoints.found(tmp_path)] == ["step-00000010"]
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
        checkpoints.resume_point(tmp_path, str(bad))
    assert str(bad) in str(error.value) and (name in str(error.value) or name == "meta.json")
    place, meta, complaints = checkpoints.resume_point(tmp_path, "auto")
    assert place == good and meta["step"] == 1
    assert len(complaints) == 1 and str(bad) in complaints[0]


def test_no_flipped_bit_of_meta_goes_unnoticed(tmp_path: Path) -> None:
    path = save(tmp_path, make(), 1) / "meta.json"
    body, good = path.read_bytes(), checkpoints.read_meta(path.parent)
    for position in range(len(body)):
        path.write_bytes(body[:position] + bytes([body[position] ^ 1]) + body[position + 1 :])
        try:
            meta = checkpoints.read_meta(path.parent)
        except Damaged:
            continue
        assert {key: meta.get(key) for key in good} == good  # the name of its digest, say, is no content
    path.write_bytes(body)
    assert checkpoints.read_meta(path.parent) == good


@pytest.mark.parametrize("name", ["model.safetensors", "state.pt"])
def test_a_file_that_would_run_a_command_is_refused(name: str, tmp_path: Path) -> None:
    place, proof = save(tmp_path / "run", make(), 1), tmp_path / "proof"
    torch.save(touching(proof), place / name)
    reseal(place)
    with pytest.raises(Damaged, match="expected a checkpoint of this net") as error:
        checkpoints.restore_checkpoint(place, checkpoints.read_meta(place), make(1), World())
    assert not proof.exists() and "\n" not in str(error.value)
    (place / name).write_bytes(pickle.dumps(touching(proof)))
    reseal(place)
    with pytest.raises(Damaged, match="expected a checkpoint of this net"):
        checkpoints.restore_checkpoint(place, checkpoints.read_meta(place), make(1), World())
    assert not proof.exists()


def test_a_state_that_unpacks_without_end_is_refused(tmp_path: Path) -> None:
    place = save(tmp_path, make(), 1)
    with zipfile.ZipFile(place / "state.pt", "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/more", bytes(10**7))
    reseal(place)
    with pytest.raises(Damaged, match=r"which unpacks to 10,\d+,\d+ bytes"):
        checkpoints.restore_checkpoint(place, checkpoints.read_meta(place), make(1), World())


@pytest.mark.parametrize("name", ["../secret", "link/../../secret", "link", "absolute"])
def test_a_listed_file_outside_the_checkpoint_is_not_read(name: str, tmp_path: Path) -> None:
    place, secret = save(tmp_path, make(), 1), checkpoints.folder_of(tmp_path) / "secret"
    secret.write_bytes(b"x")
    if name == "link":
        (place / "link").symlink_to(secret)
    name = str(secret) if name == "absolute" else name
    listed = checkpoints.read_meta(place)["files"] | {name: [1, checkpoints.digest_of(secret)]}
    reseal(place, files=listed)
    with pytest.raises(Damaged, match=r"expected files inside .*step-00000001, got '.*' in its meta\.json"):
        checkpoints.resume_point(tmp_path, str(place))


WRONG = [
    ("step", ...),
    ("step", -1),
    ("step", "3"),
    ("step", True),
    ("step", 2.5),
    ("classes", ...),
    ("classes", 0),
    ("classes", [3]),
    ("recipe", ...),
    ("recipe", []),
    ("recipe", {"lr": "fast"}),
    ("recipe", {"another": 1}),
    ("seconds", ...),
    ("seconds", "long"),
    ("sums", ...),
    ("sums", [1.0, 2.0]),
    ("sums", [1.0, 2.0, None]),
    ("layout", ...),
    ("layout", "another"),
    ("layout", ["full"]),
    ("layout", "sharded"),
    ("files", ...),
    ("files", []),
    ("files", {}),
    ("files", {"state.pt": 3}),
    ("files", {"state.pt": [3]}),
    ("files", {"state\0": [3, "x"]}),
    ("files", {"model.safetensors": ["3", "x"]}),
    ("unreadable", 3),
    ("unreadable", [3]),
    ("run", 3),
]


@pytest.mark.parametrize(("field", "value"), WRONG)
def test_a_sealed_meta_with_a_wrong_field_is_damaged(field: str, value: Any, tmp_path: Path) -> None:
    place = save(tmp_path, make(), 1, unreadable=[])
    reseal(place, **{field: value})
    with pytest.raises(Damaged) as error:
        checkpoints.resume_point(tmp_path, str(place))
    assert str(place / "meta.json") in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"step": NaN}', '{"step": Infinity}', "\xff", '"' + "9" * 5000])
def test_a_meta_that_is_no_json_is_damaged(text: str, tmp_path: Path) -> None:
    (tmp_path / "meta.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(Damaged, match=r"expected a checkpoint folder with meta\.json"):
        checkpoints.resume_point(tmp_path, str(tmp_path))


def test_a_listed_file_that_cannot_be_looked_at_is_damage(tmp_path: Path) -> None:
    place = save(tmp_path, make(), 1)
    listed = checkpoints.read_meta(place)["files"]
    (place / "ring").symlink_to("ring")
    for name in ("ring", "a" * 300, "state.pt/inner", "shards"):
        reseal(place, files=listed | {name: [1, "x"]})
        with pytest.raises(Damaged, match=r"expected a whole checkpoint, got .*step-00000001"):
            checkpoints.read_meta(place)


def spoil_state(place: Path, path: str, value: Any) -> None:
    """Set the entry ``path`` of state.pt, or remove it."""
    state = torch.load(place / "state.pt", weights_only=True)
    *outer, last = path.split("/")
    inner = state
    for name in outer:
        inner = inner[name]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    torch.save(state, place / "state.pt")
    reseal(place)


OTHER_STATES = [
    ("optimizer", ...),
    ("optimizer", {}),
    ("optimizer", [1]),
    ("optimizer/state", {}),
    ("optimizer/state/0.weight/momentum_buffer", ...),
    ("optimizer/state/0.weight/momentum_buffer", torch.zeros(7)),
    ("optimizer/state/0.weight/momentum_buffer", "text"),
    ("optimizer/state/0.weight/momentum_buffer", torch.full((4, 3, 3, 3), torch.nan)),
    ("scaler", ...),
    ("scaler", {"scale": "large"}),
    ("scaler/scale", 0.0),
    ("scaler/scale", float("nan")),
    ("random", ...),
    ("random", [1, 2]),
    ("random/torch", torch.zeros(3)),
    ("random/numpy", ["MT19937", 3]),
    ("random/python", "text"),
]


@pytest.mark.parametrize(("path", "value"), OTHER_STATES)
def test_a_state_of_something_else_is_one_line(path: str, value: Any, tmp_path: Path) -> None:
    place = save(tmp_path, make(amp=True), 1)
    spoil_state(place, path, value)
    with pytest.raises(Damaged) as error:
        checkpoints.restore_checkpoint(place, checkpoints.read_meta(place), make(1, amp=True, steps=0), World())
    assert str(place) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("what", ["list", "text", "names", "shapes", "nan", "empty", "header"])
def test_weights_of_something_else_are_one_line(what: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    place = save(tmp_path, make(), 1)
    weights = load_file(place / "model.safetensors")
    if what == "names":
        save_file({"x": torch.zeros(2)}, place / "model.safetensors")
    elif what == "shapes":
        save_file({name: torch.zeros(1) for name in weights}, place / "model.safetensors")
    elif what == "nan":
        save_file({name: t * torch.nan for name, t in weights.items()}, place / "model.safetensors")
    else:
        body = {"list": b"[]", "text": b"hello", "empty": b"", "header": b"\xff" * 16}[what]
        (place / "model.safetensors").write_bytes(body)
    reseal(place)
    with pytest.raises(Damaged) as error:
        checkpoints.restore_checkpoint(place, checkpoints.read_meta(place), make(1), World())
    assert str(place) in str(error.value) and "\n" not in str(error.value)


def test_hyperparameters_are_the_recipes(tmp_path: Path) -> None:
    place = save(tmp_path, make(), 1)
    state = torch.load(place / "state.pt", weights_only=True)
    state["optimizer"]["param_groups"][0] |= {"momentum": "large", "weight_decay": -5.0}
    torch.save(state, place / "state.pt")
    reseal(place)
    other = make(1)
    checkpoints.restore_checkpoint(place, checkpoints.read_meta(place), other, World())
    (group,) = other.optimizer.param_groups
    assert (group["momentum"], group["weight_decay"]) == (0.9, 0.01)


def test_a_runs_folder_is_a_name_of_its_newest_checkpoint(tmp_path: Path) -> None:
    state = make()
    good, bad = save(tmp_path, state, 1), save(tmp_path, state, 2)
    assert checkpoints.resume_point(tmp_path / "elsewhere", str(tmp_path))[0] == bad
    damage(bad, "state.pt: truncated")
    place, _, complaints = checkpoints.resume_point(tmp_path / "elsewhere", str(tmp_path))
    assert place == good and len(complaints) == 1


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(Damaged, match=r"a checkpoint folder with meta\.json, got .*absent"):
        checkpoints.resume_point(tmp_path, str(tmp_path / "absent"))
    (tmp_path / "meta.json").write_text('{"format": "another", "files": {}}')
    with pytest.raises(Damaged, match="expected a checkpoint of the format 'resnet_fast training checkpoint 1'"):
        checkpoints.resume_point(tmp_path, str(tmp_path))


def test_without_any_checkpoint_there_is_nothing_to_go_on_from(tmp_path: Path) -> None:
    assert checkpoints.resume_point(tmp_path, "auto") == (None, {}, [])


def test_where_every_checkpoint_is_damaged_nothing_is_overwritten(tmp_path: Path) -> None:
    for step in (1, 2):
        damage(save(tmp_path, make(), step), "state.pt: truncated")
    with pytest.raises(Damaged, match=r"a good checkpoint in .*, got 2 damaged ones, first .*step-00000002"):
        checkpoints.resume_point(tmp_path, "auto")


def test_resume_goes_on_from_the_older_one_and_says_so(
    tiny: Callable[..., Recipe],
    options: Callable[..., RunOptions],
    left: Callable[[Path], dict[str, Any]],
    same: Callable[[Any, Any], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(curves, "write_curves", lambda out, title: None)
    whole = train(tiny(steps=3), options("whole", save_steps=1))
    run = options(save_steps=1, stop_after=2)
    train(tiny(steps=3), run)
    newest = checkpoints.found(run.out)[0]
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
    assert names(tmp_path) == ["step-00000001"] and checkpoints.read_meta(good)["step"] == 1
    assert checkpoints.read_meta(save(tmp_path, state, 2))["step"] == 2


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
        found, meta, complaints = checkpoints.resume_point(out, "auto")
        assert found is not None and complaints == [] and meta["step"] in (1, 2)
        seen.add(meta["step"])
        if not survived:
            break
    assert seen == {1, 2} and fatal > 10


@pytest.mark.slow
def test_a_limit_on_file_sizes_is_said_in_one_line(
    tiny: Callable[..., Recipe], options: Callable[..., RunOptions]
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
    disk.write_file(path, b"old")
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"room and leave to write .*curves\.png, got No space left on device"):
            disk.write_file(path, b"new")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["curves.png"]


def test_the_exported_weights_load_into_the_stock_net(
    tiny: Callable[..., Recipe], options: Callable[..., RunOptions]
) -> None:
    from safetensors import safe_open

    from resnet_fast.models import registry

    done = train(tiny(steps=1), options())
    with safe_open(done.out / "model.safetensors", "pt") as file:
        facts = json.loads(file.metadata()["resnet_fast"])
        assert (facts["model"], facts["classes"], facts["size"]) == ("cifar_resnet20", list("0123456789"), 8)
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    registry.build("cifar_resnet20", num_classes=10).load_state_dict(weights, strict=True)
