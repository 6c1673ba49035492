"""Files are written whole or not at all, targets are checked before the work, and locks hold between processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from resnet_fast.errors import UserError
from resnet_fast.io import safe_files
from tests.support.processes import in_threads


def ours(content: bytes) -> bool:
    return content.startswith(b"ours")


def check(path: Path, make_folder: bool = False) -> Path:
    return safe_files.check_target(path, "a report", ours, make_folder=make_folder)


def test_a_new_an_empty_and_an_own_file_may_be_written(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "own").write_bytes(b"ours, of yesterday")
    (tmp_path / "link").symlink_to(tmp_path / "own")
    for name in ("new", "empty", "own", "link"):
        assert check(tmp_path / name) == tmp_path / name
    assert check(tmp_path / "a" / "b" / "new", make_folder=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "link", "own"]


def test_anything_else_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# mine\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "README.md")
    (tmp_path / "broken").symlink_to(tmp_path / "absent")
    os.mkfifo(tmp_path / "pipe")
    for name, why in (
        ("broken", "a link to nothing"),
        ("README.md", "there already, and not a report"),
        ("link", "there already, and not a report"),
        ("folder", "a folder"),
        ("pipe", "no regular file"),
        ("README.md/x", "Not a directory"),
        ("absent/x", "No such file or directory"),
    ):
        with pytest.raises(UserError, match=rf"expected a report that can be written, got .*\({why}.*; name another"):
            check(tmp_path / name)
    with pytest.raises(UserError, match="Not a directory"):
        check(tmp_path / "README.md" / "x" / "y", make_folder=True)
    for path in (tmp_path / ("n" * 300), tmp_path / ("n" * 300) / "x"):
        with pytest.raises(UserError, match="File name too long"):
            check(path, make_folder=True)
    assert (tmp_path / "README.md").read_text() == "# mine\n"


def test_only_a_plain_file_is_read_and_no_more_of_it_than_allowed(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "link").symlink_to("file")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    assert safe_files.read_plain(tmp_path / "file", 5) == safe_files.read_plain(tmp_path / "link") == b"12345"
    for name, why in (("pipe", "No plain file"), ("zero", "No plain file"), ("none", "No such file")):
        with pytest.raises(OSError, match=why):
            safe_files.read_plain(tmp_path / name)
    with pytest.raises(OSError, match="More than 4 bytes"):
        safe_files.read_plain(tmp_path / "file", 4)


def test_a_large_file_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(safe_files.LARGEST + 1)
    with pytest.raises(UserError, match="there already"):
        safe_files.check_target(tmp_path / "large", "a report", lambda content: True)
    seen: list[int] = []
    safe_files.check_target(tmp_path / "large", "a report", lambda content: not seen.append(len(content)), largest=None)
    assert seen == [safe_files.LARGEST]


def test_write_whole_keeps_links_and_follows_the_umask(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    before = os.umask(0o027)
    try:
        safe_files.write_whole(tmp_path / "link", b"new")
    finally:
        os.umask(before)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"
    assert (tmp_path / "real").stat().st_mode & 0o777 == 0o640
    safe_files.write_whole(tmp_path / ("n" * 250), b"a name as long as the system takes")
    assert len(list(tmp_path.iterdir())) == 3


COUNT = """
import sys, time
from pathlib import Path
from resnet_fast.io import safe_files
path = Path(sys.argv[1])
for _ in range(20):
    with safe_files.locked(path):
        number = int(path.read_text())
        time.sleep(0.002)
        safe_files.write_whole(path, str(number + 1).encode())
"""


def test_a_lock_holds_between_processes(tmp_path: Path) -> None:
    path = tmp_path / "number"
    path.write_text("0")
    running = [subprocess.Popen([sys.executable, "-c", COUNT, str(path)]) for _ in range(3)]
    assert [process.wait(120) for process in running] == [0, 0, 0]
    assert path.read_text() == "60"


def test_a_lock_holds_between_threads(tmp_path: Path) -> None:
    path, inside, most = tmp_path / "x", [0], [0]

    def work() -> None:
        for _ in range(50):
            with safe_files.locked(path):
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                inside[0] -= 1

    in_threads(work, work, work, work)
    assert most == [1]
