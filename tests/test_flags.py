"""Environment switches are read when used, and a bad value is an error."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from resnet_fast import flags
from resnet_fast.errors import UserError
from tests.support import ROOT


@pytest.mark.parametrize("flag", flags.ALL, ids=lambda f: f.name)
def test_default_choices_and_whitespace(flag: flags.Flag, monkeypatch: pytest.MonkeyPatch) -> None:
    assert flag.read() == flag.default and flag.default in flag.choices and flag.meaning
    monkeypatch.setenv(flag.name, "")
    assert flag.read() == flag.default
    for value in flag.choices:
        monkeypatch.setenv(flag.name, f" {value.upper()} ")
        assert flag.read() == value


@pytest.mark.parametrize("flag", flags.ALL, ids=lambda f: f.name)
@pytest.mark.parametrize("value", ["yes", "tensorrt", "3", " ", "0,1"])
def test_a_bad_value_is_an_error(flag: flags.Flag, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(flag.name, value)
    with pytest.raises(UserError, match=f"expected {flag.name} to be one of .*, got .*; unset it") as caught:
        flag.read()
    assert repr(value) in str(caught.value)


def test_zero_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not flags.STRICT.enabled() and flags.BATCH_TILE.enabled()
    monkeypatch.setenv("RESNET_FAST_STRICT", "1")
    monkeypatch.setenv("RESNET_FAST_BATCH_TILE", "0")
    assert flags.STRICT.enabled() and not flags.BATCH_TILE.enabled()


def test_names_are_distinct_and_carry_the_prefix() -> None:
    names = [flag.name for flag in flags.ALL]
    assert len(set(names)) == len(names) and all(name.startswith("RESNET_FAST_") for name in names)


def test_check_backend() -> None:
    assert all(flags.check_backend(name) == name for name in flags.BACKENDS)
    with pytest.raises(UserError, match=r"expected a backend among auto, .*, got 'tpu'; use 'auto'"):
        flags.check_backend("tpu")


def test_every_variable_of_the_build_is_in_the_table() -> None:
    """setup.py cannot import the package, so its names and choices are checked here."""
    text = (ROOT / "setup.py").read_text()
    read = set(re.findall(r"RESNET_FAST_(?:BUILD_[A-Z]+|CUDA_ARCHS)", text))
    assert read == {flag.name for flag in flags.BUILD}
    for name, choices in re.findall(r'switch\("(RESNET_FAST_[A-Z_]+)", ([^)]*)\)', text):
        flag = next(flag for flag in flags.BUILD if flag.name == name)
        assert sorted(re.findall(r'"(\w+)"', choices)) == sorted(flag.choices) and f'"{flag.default}"' in choices


def test_unknown_variables_come_with_the_close_match() -> None:
    found = flags.unknown({"RESNET_FAST_CAHCE": "x", "RESNET_FAST_FOO_BAR": "1", "RESNET_FAST_CACHE": "y", "HOME": "/"})
    assert found == {
        "RESNET_FAST_CAHCE": "did you mean RESNET_FAST_CACHE?",
        "RESNET_FAST_FOO_BAR": "`resnet-fast env` lists the switches",
    }


def test_paths_that_cannot_be_meant_are_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RESNET_FAST_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="expected RESNET_FAST_CACHE to name a folder"):
        flags.cache_folder()
    monkeypatch.setenv("RESNET_FAST_LIBRARY", str(tmp_path / "absent.so"))
    with pytest.raises(UserError, match="expected RESNET_FAST_LIBRARY to name a file"):
        flags.LIBRARY_FILE.read()


def test_a_switch_is_read_at_each_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RESNET_FAST_STRICT", raising=False)
    assert not flags.STRICT.enabled()
    monkeypatch.setenv("RESNET_FAST_STRICT", "1")
    assert flags.STRICT.enabled()
    monkeypatch.delenv("RESNET_FAST_STRICT")
    assert not flags.STRICT.enabled()
    monkeypatch.setattr(os, "environ", {"RESNET_FAST_STRICT": "1"})
    assert flags.STRICT.enabled()
