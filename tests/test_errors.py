"""Errors about missing packages name packages that pip can install."""

from __future__ import annotations

import re
from importlib import metadata

import pytest

from resnet_fast.errors import install_command, missing_package
from tests.support import ROOT

REQUIRES = [
    "torch>=2.11",
    "triton; platform_system == 'Linux'",
    'matplotlib>=3.8; extra == "train"',
    'pyyaml>=6; extra == "train" and python_version >= "3.10"',
    "scikit-build-core[setuptools]>=1.0; extra == 'dev'",
]


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "requires", lambda name: REQUIRES)


@pytest.mark.usefixtures("listed")
@pytest.mark.parametrize(
    ("package", "extra", "command"),
    [
        ("pyyaml", "train", "pip install pyyaml matplotlib"),
        ("scikit-build-core", "dev", "pip install scikit-build-core"),
        ("timm", None, "pip install timm"),
    ],
)
def test_command_names_what_the_extra_lists(package: str, extra: str | None, command: str) -> None:
    assert install_command(package, extra) == command


def test_command_without_metadata_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", absent)
    assert install_command("pyyaml", "train") == "pip install pyyaml"


@pytest.mark.usefixtures("listed")
def test_missing_package_is_told_from_one_that_is_broken() -> None:
    absent = missing_package("pyyaml", "which reads recipes", ModuleNotFoundError("No module named 'yaml'"), "train")
    assert str(absent) == ("expected pyyaml, which reads recipes, got no such package; pip install pyyaml matplotlib")
    broken = missing_package("pyyaml", "which reads recipes", ImportError("no symbol"), instead="go without")
    assert "got a package that fails to import: no symbol; pip install pyyaml, or go without" in str(broken)


def test_no_message_names_an_extra_of_a_package_that_no_index_has() -> None:
    files = [*ROOT.glob("resnet_fast/**/*.py"), *ROOT.glob("benchmarks/**/*.py"), *ROOT.glob("docs/**/*.md")]
    files += [ROOT / name for name in ("README.md", "setup.py", "CMakeLists.txt", "Makefile")]
    naming = re.compile(r"resnet[-_]fast\[|pip install resnet")
    assert len(files) > 100
    assert [str(path) for path in files if naming.search(path.read_text(encoding="utf-8"))] == []
