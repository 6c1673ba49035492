"""The lazy loader keeps the cause if a compiled module is missing or does not load."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from resnet_fast import native
from resnet_fast.errors import BackendError


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    native._load.cache_clear()
    yield
    native._load.cache_clear()


def test_missing_library_says_how_to_build_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native.importlib.util, "find_spec", lambda name: None)
    verdict = native.status()
    assert not verdict
    assert "a package built without it" in verdict.reason
    assert "--no-build-isolation" in verdict.reason
    with pytest.raises(BackendError, match=r"resnet_fast\._C"):
        native.build_info()
    with pytest.raises(BackendError, match=r"resnet_fast\._host"):
        native.host_isa()


def test_library_that_does_not_load_keeps_the_loaders_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_library.abi3.so").write_bytes(b"\x7fELF and nothing else")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(native._HOW_TO_BUILD, "broken_library", "build it again")
    module, verdict = native._load("broken_library")
    assert module is None
    assert "cannot be loaded (ImportError: " in verdict.reason
    assert str(tmp_path) in verdict.reason
    assert verdict.reason.endswith("build it again")


def test_a_library_named_by_file_is_the_one_that_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "library.so"
    broken.write_bytes(b"no library at all")
    monkeypatch.setenv("RESNET_FAST_LIBRARY", str(broken))
    verdict = native.status()
    assert not verdict and str(broken) in verdict.reason


def test_loading_is_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(native.importlib.util, "find_spec", lambda name: asked.append(name))
    native.status()
    native.status()
    assert asked == [native.LIBRARY]


def test_built_library_reports_its_facts() -> None:
    if not native.status():
        pytest.skip(native.status().reason)
    info = native.build_info()
    assert set(info) == {
        "compiler",
        "cxx_standard",
        "torch_headers",
        "torch_target",
        "python_api",
        "cuda_toolkit",
        "cuda_archs",
    }
    assert info["torch_target"] == "2.11"
    assert info["python_api"] == "3.10"
    assert (info["cuda_toolkit"] == "none") == (info["cuda_archs"] == "none")


def test_built_host_module_reports_the_cpu() -> None:
    if not native.host_status():
        pytest.skip(native.host_status().reason)
    assert native.host_build_info()["cxx_standard"].isdigit()
    isa = native.host_isa()
    cpuinfo = Path("/proc/cpuinfo")
    if sys.platform == "linux" and isa and cpuinfo.exists():
        flags = next(line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")).split()
        for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16"):
            assert isa[name] == (name in flags), name
