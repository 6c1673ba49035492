"""The folder of checkpoints: which are kept, removed, renamed and resumed from."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from resnet_fast.errors import UserError
from resnet_fast.training import checkpoints, curves
from resnet_fast.training.checkpoints import Damaged
from resnet_fast.training.distributed import World
from resnet_fast.training.loop import train
from resnet_fast.training.options import RunOptions, Watch
from resnet_fast.training.recipe import Recipe
from tests.support.checkpoint_cases import META, damage, full, make, names, save


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


def test_a_runs_folder_is_a_name_of_its_newest_checkpoint(tmp_path: Path) -> None:
    state = make()
    good, bad = save(tmp_path, state, 1), save(tmp_path, state, 2)
    assert checkpoints.resume_point(tmp_path / "elsewhere", str(tmp_path))[0] == bad
    damage(bad, "state.pt: truncated")
    place, _, complaints = checkpoints.resume_point(tmp_path / "elsewhere", str(tmp_path))
    assert place == good and len(complaints) == 1


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
