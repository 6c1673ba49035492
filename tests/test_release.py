"""What `make release` relies on: it notices an install that changes torch, and its table is that of the package."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.release import contents, environments, first_image, matrix
from tests.release.artifacts import ReleaseError
from tests.support import ROOT
from tests.test_packaging import PROJECT

BEFORE = {"torch": "2.11.0", "nvidia-cublas": "13.1.0.3", "numpy": "2.3.1"}
AFTER = {**BEFORE, "resnet_fast": "0.1.0"}


def test_small_requirements_may_be_added() -> None:
    assert environments.added(BEFORE, {**AFTER, "typer": "0.16", "rich": "14.1"}) == ["rich", "typer"]
    assert environments.added({**BEFORE, "resnet_fast": "0.0.9"}, AFTER) == []


@pytest.mark.parametrize(
    ("after", "said"),
    [
        ({**AFTER, "torch": "2.15.0"}, "torch 2.11.0 became 2.15.0"),
        ({**AFTER, "numpy": "2.4.0"}, "numpy 2.3.1 became 2.4.0"),
        ({name: version for name, version in AFTER.items() if name != "torch"}, "torch 2.11.0 became nothing"),
        ({**AFTER, "nvidia-nccl-cu13": "2.30"}, "nvidia-nccl-cu13 2.30 was added"),
        (BEFORE, "expected resnet_fast to be installed"),
    ],
)
def test_an_install_that_changes_torch_is_noticed(after: dict[str, str], said: str) -> None:
    with pytest.raises(ReleaseError, match=re.escape(said)):
        environments.added(BEFORE, after)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("  Collecting torch>=2.11", True),
        ("  Downloading nvidia_cublas-13.1.0.3-py3-none-manylinux_2_27_x86_64.whl (500 MB)", True),
        ("  Collecting scikit-build-core[setuptools]>=1.0", False),
        ("Requirement already satisfied: torch>=2.11 in ./lib/python3.12/site-packages", False),
    ],
)
def test_a_torch_that_is_fetched_for_a_build_is_noticed(line: str, found: bool) -> None:
    assert bool(matrix.FETCHED.search(f"Processing the sdist\n{line}\n")) == found


def test_environments_are_free_of_this_machines_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_CONSTRAINT", "pins.txt")
    monkeypatch.setenv("PIP_CERT", "ca.pem")
    monkeypatch.setenv("RESNET_FAST_BACKEND", "reference")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    kept = environments.clean()
    assert not {"PIP_CONSTRAINT", "RESNET_FAST_BACKEND", "PYTHONPATH"} & kept.keys()
    assert kept["PIP_CERT"] == "ca.pem" and kept["PIP_CONFIG_FILE"] == "/dev/null"


def test_differences_are_named() -> None:
    assert contents.differences({"a", "junk.so"}, {"a", "py.typed"}) == [
        "py.typed is missing",
        "junk.so does not belong",
    ]


def test_a_python_that_is_not_here_is_named_before_anything_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(matrix, "interpreters", lambda: {"3.11": Path("python3.11")})
    assert matrix.main(["--python", "3.11", "--python", "3.12", "--folder", str(tmp_path / "release")]) == 1
    assert capsys.readouterr().err.startswith(
        "expected interpreters of Python 3.11, 3.12 on PATH or in pyenv's folder, got none of 3.12; install them"
    )
    assert not (tmp_path / "release").exists()


def test_a_wheel_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert first_image.main([str(tmp_path / "none.whl")]) == 1
    assert "expected a wheel, got " in capsys.readouterr().err


def test_the_table_covers_every_version_that_the_package_names() -> None:
    rows = matrix.read()["environments"]
    found = {(row["python"].rpartition(".")[0], matrix.short(row["torch"])) for row in rows}
    assert found == {(python, torch) for python in matrix.PYTHONS for torch in matrix.TORCHES} - matrix.ABSENT.keys()
    assert all(row["errors"].keys() >= {matrix.WAYS[0], matrix.INTERPRETED} for row in rows)
    complete = {
        (row["python"].rpartition(".")[0], matrix.short(row["torch"]))
        for row in rows
        if row["errors"].keys() >= {*matrix.WAYS}
    }
    assert complete == {pair for pair in found if matrix.builds(*pair)}
    assert {torch for _, torch in complete} == {*matrix.TORCHES}
    assert {matrix.PYTHONS[0], matrix.PYTHONS[-1]} <= {python for python, _ in complete}
    named = re.findall(r"Python :: (3\.\d+)$", "\n".join(PROJECT["project"]["classifiers"]), re.MULTILINE)
    assert tuple(named) == matrix.PYTHONS
    assert f">={matrix.PYTHONS[0]}" == PROJECT["project"]["requires-python"]
    assert f"torch>={matrix.TORCHES[0].removesuffix('.0')}" in PROJECT["project"]["dependencies"]


def test_the_page_is_that_of_the_table() -> None:
    table = matrix.read()
    assert matrix.PAGE.read_text() == matrix.page(table, table["environments"])


def test_build_tools_are_those_of_the_makefile() -> None:
    assert matrix.build_tools()[:2] == ["scikit-build-core[setuptools]>=1.0", "setuptools>=77"]
    line = next(line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith("RELEASE_TOOLS"))
    assert line.partition(":=")[2].split() == PROJECT["project"]["optional-dependencies"]["release"]
