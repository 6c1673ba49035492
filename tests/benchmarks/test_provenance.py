"""benchmarks/provenance.py: plain values, and no failure where git or /proc is missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from resnet_fast.benchmarks import provenance


def test_collect_is_plain_json() -> None:
    found = json.loads(json.dumps(provenance.collect("cpu")))
    assert found["torch"] == torch.__version__.split("+")[0] or found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads() and found["device"] == "cpu" and found["cpu"]


def test_commit_is_empty_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert provenance.commit() == ""


def test_commit_is_empty_outside_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "provenance.py"))
    assert provenance.commit() == ""


def test_missing_package_is_said() -> None:
    assert provenance.version("no-such-package-here") == "not installed"
