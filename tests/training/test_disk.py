"""Files of a run are written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from resnet_fast.errors import UserError
from resnet_fast.training import disk
from tests.support.checkpoint_cases import full


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "curves.png"
    disk.write_file(path, b"old")
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(
            UserError, match=r"space and permission to write .*curves\.png, got No space left on device"
        ):
            disk.write_file(path, b"new")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["curves.png"]
