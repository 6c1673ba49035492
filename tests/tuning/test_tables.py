"""Tables on disk read back what was written, ignore unusable entries with a reason, and survive interruption."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from resnet_fast import devices, flags
from resnet_fast.errors import UserError
from resnet_fast.tuning import configs, shapes, tables
from resnet_fast.tuning.routes import launch
from resnet_fast.tuning.tables import Table, add, check_target, load, read, user_file

GPU = "NVIDIA H100 80GB HBM3"
LAUNCH = launch(shapes.problems("resnet50", 8, dtype="bfloat16")["r50.layer3.0.conv2"])
TIMES: dict[str, float | None] = {"64x64x64 w4 s4": 10.5, "cudnn": 9.25, "128x64x64 w4 s4": None}


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Replace the shipped tables with an empty folder."""
    folder = tmp_path / "shipped"
    monkeypatch.setattr(tables, "SHIPPED", folder)
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RESNET_FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def content(**changes: Any) -> dict[str, Any]:
    return {"space": configs.SPACE, "gpu": GPU, "versions": {}, "launches": {"a": {"cudnn": 1.0}}} | changes


def test_round_trip(tmp_path: Path) -> None:
    table = Table(GPU, {str(LAUNCH): TIMES, "another": {"cudnn": 1}}, {"torch": "2.14", "triton": "3.8"})
    path = tmp_path / "folder" / "made" / "table.json"
    table.save(path)
    again = read(path, GPU)
    assert again == table
    assert again.times(LAUNCH) == TIMES
    assert again.times(launch(shapes.problems("resnet50", 9, dtype="bfloat16")["r50.layer3.0.conv2"])) == {}


def test_a_file_reads_like_a_report(tmp_path: Path) -> None:
    """It shows the unit, versions and one line per candidate, fastest first, refused last."""
    path = tmp_path / "table.json"
    Table(GPU, {str(LAUNCH): TIMES}, {"torch": "2.14"}).save(path)
    written = json.loads(path.read_text())
    assert (written["unit"], written["gpu"], written["space"]) == ("microseconds", GPU, configs.SPACE)
    assert list(written["launches"][str(LAUNCH)]) == ["cudnn", "64x64x64 w4 s4", "128x64x64 w4 s4"]
    assert '   "cudnn": 9.25,\n' in path.read_text() and path.read_text().endswith("}\n")


def test_no_file_is_an_empty_table_without_a_warning(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(tmp_path / "none.json", GPU) == Table(GPU)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "JSONDecodeError"),
        ('{"space": 1, "gpu"', "JSONDecodeError"),
        ("[]", "not a tuning table"),
        ("[" * 100_000, "RecursionError"),
        ("{}", "not a tuning table"),
        (json.dumps(content(gpu="NVIDIA A100")), f"expected measurements of {GPU}, got 'NVIDIA A100'"),
        (
            json.dumps(content(space=configs.SPACE + 1)),
            f"expected config space {configs.SPACE}, got {configs.SPACE + 1}",
        ),
        (json.dumps(content(launches=[])), "launches are not candidate -> microseconds"),
        (json.dumps(content(launches={"a": 3})), "launches are not candidate -> microseconds"),
        (json.dumps(content(launches={"a": {"cudnn": "fast"}})), "launches are not candidate -> microseconds"),
        (json.dumps(content(launches={"a": {"cudnn": True}})), "launches are not candidate -> microseconds"),
        (json.dumps(content(launches={"a": {"cudnn": -1.0}})), "launches are not candidate -> microseconds"),
        (json.dumps(content(launches={"a": {"cudnn": float("nan")}})), "launches are not candidate -> microseconds"),
        (json.dumps(content(launches={"a": {"cudnn": float("inf")}})), "launches are not candidate -> microseconds"),
        (json.dumps(content(versions=["2.14"])), "versions are not name -> version"),
    ],
)
def test_a_file_that_cannot_be_used_is_ignored_and_replaced(text: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.warns(RuntimeWarning) as caught:
        table = read(path, GPU)
    said = str(caught[0].message)
    assert len(caught) == 1 and str(path) in said and reason in said and "replaces it" in said
    assert table == Table(GPU)
    table.entries["b"] = {"cudnn": 2.0}
    table.save(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(path, GPU).entries == {"b": {"cudnn": 2.0}}


def test_bytes_that_are_no_text_and_a_folder_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.warns(RuntimeWarning, match="UnicodeDecodeError"):
        assert read(path, GPU) == Table(GPU)
    with pytest.warns(RuntimeWarning, match="IsADirectoryError"):
        assert read(tmp_path, GPU) == Table(GPU)


@pytest.mark.parametrize("fails", ["while writing", "while replacing"])
def test_a_cut_leaves_the_old_file_and_nothing_else(
    fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "table.json"
    Table(GPU, {"a": {"cudnn": 1.0}}).save(path)
    before = path.read_bytes()

    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    if fails == "while replacing":
        monkeypatch.setattr(os, "replace", interrupted)
        entries: dict[str, Any] = {"b": {"cudnn": 2.0}}
        expected: type[BaseException] = KeyboardInterrupt
    else:
        entries = {"b": {"cudnn": object()}}
        expected = TypeError
    with pytest.raises(expected):
        Table(GPU, entries).save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["table.json"]


def test_others_may_read_a_table_as_far_as_the_umask_lets_them(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        Table(GPU).save(tmp_path / "table.json")
    finally:
        os.umask(before)
    assert (tmp_path / "table.json").stat().st_mode & 0o777 == 0o644


def test_merging_takes_the_others_launches() -> None:
    mine = Table(GPU, {"a": {"x": 1.0, "y": 2.0}, "b": {"x": 3.0}}, {"torch": "1", "triton": "1"})
    theirs = Table(GPU, {"a": {"y": 9.0}, "c": {"z": 4.0}}, {"torch": "2"})
    merged = mine.merged(theirs)
    assert merged.entries == {"a": {"y": 9.0}, "b": {"x": 3.0}, "c": {"z": 4.0}}
    assert merged.versions == {"torch": "2", "triton": "1"}
    assert mine.entries["a"] == {"x": 1.0, "y": 2.0}


def test_the_users_measurements_overrule_the_shipped_ones(shipped: Path, cache: Path) -> None:
    Table(GPU, {"a": {"cudnn": 1.0}, "b": {"cudnn": 2.0}}).save(shipped / "nvidia-h100-80gb-hbm3.json")
    assert load(GPU).entries == {"a": {"cudnn": 1.0}, "b": {"cudnn": 2.0}}
    Table(GPU, {"a": {"cudnn": 7.0}}).save(user_file(GPU))
    assert load(GPU).entries == {"a": {"cudnn": 7.0}, "b": {"cudnn": 2.0}}


def test_a_broken_user_table_leaves_the_shipped_one(shipped: Path, cache: Path) -> None:
    Table(GPU, {"a": {"cudnn": 1.0}}).save(shipped / "nvidia-h100-80gb-hbm3.json")
    user_file(GPU).parent.mkdir(parents=True)
    user_file(GPU).write_text("{")
    with pytest.warns(RuntimeWarning, match="is ignored"):
        assert load(GPU).entries == {"a": {"cudnn": 1.0}}


def test_an_unknown_gpu_has_an_empty_table(shipped: Path, cache: Path) -> None:
    assert load("NVIDIA GeForce RTX 5090") == Table("NVIDIA GeForce RTX 5090")


@pytest.mark.parametrize(
    ("name", "file"),
    [
        (GPU, "nvidia-h100-80gb-hbm3"),
        ("NVIDIA A100-SXM4-80GB", "nvidia-a100-sxm4-80gb"),
        ("  Tesla/../T4 ", "tesla-t4"),
    ],
)
def test_file_names(name: str, file: str) -> None:
    assert devices.file_stem(name) == file


def test_where_the_users_table_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RESNET_FAST_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    file = "nvidia-h100-80gb-hbm3.json"
    assert user_file(GPU) == tmp_path / ".cache" / "resnet_fast" / "tuning" / file
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert user_file(GPU) == tmp_path / "xdg" / "resnet_fast" / "tuning" / file
    monkeypatch.setenv("RESNET_FAST_CACHE", "~/mine")
    assert user_file(GPU) == tmp_path / "mine" / "tuning" / file
    monkeypatch.setenv("RESNET_FAST_CACHE", "")
    assert flags.cache_folder() == tmp_path / "xdg" / "resnet_fast"


def test_every_shipped_table_can_be_used() -> None:
    """Each was written for this config space, on the GPU that its name says."""
    for path in tables.SHIPPED.glob("*.json"):
        name = json.loads(path.read_text())["gpu"]
        assert path.stem == devices.file_stem(name)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert read(path, name).entries


def test_two_runs_into_one_file_lose_nothing(tmp_path: Path) -> None:
    """Two runs are interleaved (each reads before the other writes), also with two candidates of one launch."""
    path = tmp_path / "cache" / "table.json"
    one, other = read(path, GPU), read(path, GPU)
    assert one == other == Table(GPU)
    add(path, Table(GPU, {"a": {"x": 1.0}}, {"torch": "1"}))
    add(path, Table(GPU, {"b": {"y": None}}))
    both = add(path, Table(GPU, {"a": {"y": 2.0}}, {"triton": "3"}))
    assert both == read(path, GPU)
    assert both.entries == {"a": {"x": 1.0, "y": 2.0}, "b": {"y": None}}
    assert both.versions == {"torch": "1", "triton": "3"}


ADD = """
import sys
from pathlib import Path
from resnet_fast.tuning.tables import Table, add
who, path = sys.argv[1], Path(sys.argv[2])
for number in range(25):
    add(path, Table("gpu", {f"{who}{number}": {"x": 1.0}, "shared": {f"{who}{number}": 2.0}}))
"""


def test_processes_add_side_by_side(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    running = [subprocess.Popen([sys.executable, "-c", ADD, who, str(path)]) for who in "ab"]
    assert [process.wait(120) for process in running] == [0, 0]
    entries = read(path, "gpu").entries
    wanted = {f"{who}{number}" for who in "ab" for number in range(25)}
    assert set(entries) == wanted | {"shared"} and set(entries["shared"]) == wanted


def test_only_a_table_of_this_gpu_may_be_replaced(tmp_path: Path) -> None:
    Table(GPU, {"a": {"x": 1.0}}).save(tmp_path / "mine.json")
    Table("another", {"a": {"x": 1.0}}).save(tmp_path / "other.json")
    (tmp_path / "README.md").write_text("# mine")
    (tmp_path / "data.json").write_text('{"space": 1, "gpu": "x"}')
    check_target(tmp_path / "mine.json", GPU)
    check_target(tmp_path / "new" / "folder" / "t.json", GPU)
    for name in ("other.json", "README.md", "data.json"):
        before = (tmp_path / name).read_bytes()
        with pytest.raises(UserError, match=f"expected a tuning table of {GPU} that can be written, .*name another"):
            check_target(tmp_path / name, GPU)
        assert (tmp_path / name).read_bytes() == before
