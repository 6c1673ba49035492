"""benchmarks/run.py: the same command as ``resnet-fast bench``, with one line and exit code 2 for unusable input."""

from __future__ import annotations

import sys

import pytest

from resnet_fast.benchmarks import run


def test_unusable_input_is_one_line_and_exit_code_two(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["run", "--dtype", "float32", "--batch", "many"])
    with pytest.raises(SystemExit) as caught:
        run.main()
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: expected batch sizes such as 1,16, got 'many'; correct --batch\n"
