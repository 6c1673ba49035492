"""The package as pip sees it: its metadata, what the wheel and the sdist hold, and the build's switches."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import resnet_fast
from tests.release import artifacts, contents
from tests.release.artifacts import ReleaseError, build
from tests.support import ROOT
from tests.support.processes import run_python

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Return a copy of the sources, so that a build leaves nothing in the tree under test."""
    pytest.importorskip("scikit_build_core")
    if not (ROOT / ".git").exists():
        pytest.skip("no git here, which lists the sources")
    artifacts.copy_sources(tmp_path / "checkout")
    return tmp_path / "checkout"


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"resnet_fast_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def setup_file() -> ModuleType:
    """Return setup.py as a module: its last line builds only if it is the program."""
    pytest.importorskip("scikit_build_core")
    return load(ROOT / "setup.py")


@pytest.fixture
def backend() -> ModuleType:
    pytest.importorskip("scikit_build_core")
    return load(ROOT / "build_backend.py")


def requirement_names(requirements: list[str]) -> set[str]:
    return {re.split(r"[^\w-]", requirement)[0].lower() for requirement in requirements}


def test_no_requirement_is_a_pin() -> None:
    extras = PROJECT["project"]["optional-dependencies"].values()
    for requirement in itertools.chain(PROJECT["project"]["dependencies"], *extras):
        assert not re.search(r"[^<>!~]==|<(?!=)|~=", requirement.partition(";")[0]), requirement
    assert "torch>=2.11" in PROJECT["project"]["dependencies"]


def test_extras_hold_what_the_code_asks_for_by_name() -> None:
    """Each optional package that an error asks for is in the extra that the error names."""
    asked = re.compile(r"missing_package\(\s*\"([\w-]+)\",\s*\"[^\"]*\",\s*error,\s*\"(\w+)\"")
    found = [
        pair
        for folder in ("resnet_fast", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        for pair in asked.findall(path.read_text(encoding="utf-8"))
    ]
    assert len(found) >= 4
    for package, extra in found:
        assert package in requirement_names(PROJECT["project"]["optional-dependencies"][extra]), package


def test_torch_is_no_build_requirement() -> None:
    assert not requirement_names(PROJECT["build-system"]["requires"]) & {"torch", "torchvision", "triton"}


def test_build_tools_are_the_same_wherever_they_are_listed(backend: ModuleType) -> None:
    line = next(line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith("BUILD_TOOLS"))
    assert set(shlex.split(line.partition(":=")[2])) == set(backend.TOOLS)
    assert set(PROJECT["build-system"]["requires"]) <= set(backend.TOOLS)
    assert shlex.split(backend.INSTALL)[2:] == ["torch", *backend.TOOLS]
    assert set(backend.TOOLS) <= set(PROJECT["project"]["optional-dependencies"]["dev"])


def test_missing_build_tools_are_one_line_with_the_command() -> None:
    # -S: no site-packages, as in an environment that has no build tool.
    done = subprocess.run(
        [sys.executable, "-S", "-c", "import build_backend"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("expected the build tools of resnet_fast, got no scikit-build-core and no setuptools; run ")
    assert "`pip install torch 'scikit-build-core[setuptools]>=1.0' " in line


@pytest.mark.parametrize(
    ("installed", "said"), [("65.5.0", "setuptools 65.5.0"), ("77", ""), ("84.2.1.post1", ""), (None, "no setuptools")]
)
def test_build_tool_that_is_too_old(
    installed: str | None, said: str, backend: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        assert name == "setuptools"
        if installed is None:
            raise metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(backend.metadata, "version", version)
    assert backend.lacking("setuptools>=77") == said


def test_missing_cmake_is_one_line_with_the_command(setup_file: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    setup_file.require_cmake()
    for what in ("cmake", "ninja", "make"):
        monkeypatch.setattr(setup_file.program_search, f"get_{what}_programs", lambda: iter(()))
    with pytest.raises(
        SystemExit, match=r"got no CMake >=3.25 and no ninja and no make; run `pip install cmake ninja`"
    ):
        setup_file.require_cmake()


def test_makefile_refuses_an_old_python_before_it_creates_anything() -> None:
    line = next(line for line in (ROOT / "Makefile").read_text().splitlines() if "sys.version_info" in line)
    code = line.partition("-c '")[2].rpartition("'")[0]
    for version, status in (((3, 9, 18), 1), ((3, 10, 0), 0), ((3, 13, 1), 0)):
        fake = f"import sys; sys.version_info = {version}; {code}"
        done = run_python(fake)
        assert done.returncode == status
        assert done.stderr == (
            "" if status == 0 else "expected Python 3.10 or later, got 3.9; name another with PYTHON=\n"
        )


def test_version_is_written_once() -> None:
    attribute = PROJECT["tool"]["setuptools"]["dynamic"]["version"]["attr"]
    assert attribute == "resnet_fast._version.__version__"
    assert resnet_fast.__version__ == resnet_fast._version.__version__
    assert "version" not in PROJECT["project"]


def test_benchmarks_is_a_subpackage() -> None:
    import resnet_fast.benchmarks

    assert Path(resnet_fast.benchmarks.__file__).parent.name == "benchmarks"
    assert (ROOT / "resnet_fast" / "benchmarks").resolve() == ROOT / "benchmarks"  # in a checkout that is not installed


def test_benchmarks_have_one_import_name() -> None:
    """The folder at the top is importable as ``benchmarks`` too: a second copy of every class."""
    other = re.compile(r"^\s*(?:from|import) benchmarks\b|-m benchmarks\b", re.MULTILINE)
    places = [ROOT / "Makefile", *(ROOT / "docs").rglob("*.md")]
    places += [path for folder in ("resnet_fast", "benchmarks", "tests") for path in (ROOT / folder).rglob("*.py")]
    assert [path for path in places if path != Path(__file__) and other.search(path.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize("name", ["RESNET_FAST_BUILD_NATIVE", "RESNET_FAST_BUILD_CUDA"])
def test_switch_with_a_wrong_value(name: str, setup_file: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "yes")
    with pytest.raises(SystemExit, match=f"expected {name} to be one of auto, 0, 1, got 'yes'"):
        setup_file.native_folder()


def test_switches_that_contradict_each_other(setup_file: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESNET_FAST_BUILD_NATIVE", "0")
    assert setup_file.native_folder() is None
    monkeypatch.setenv("RESNET_FAST_BUILD_CUDA", "1")
    with pytest.raises(SystemExit, match="RESNET_FAST_BUILD_NATIVE"):
        setup_file.native_folder()


def test_without_torch_auto_builds_the_pure_package_and_1_fails(
    setup_file: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(setup_file.importlib.util, "find_spec", lambda name: None)
    assert setup_file.native_folder() is None
    assert "without its native library: no torch" in capsys.readouterr().err
    monkeypatch.setenv("RESNET_FAST_BUILD_NATIVE", "1")
    with pytest.raises(SystemExit, match="no torch in the building environment"):
        setup_file.native_folder()


@pytest.mark.parametrize("missing", ["compiler", "headers"])
def test_without_a_toolchain_auto_builds_the_pure_package_and_1_fails(
    missing: str, setup_file: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    if missing == "compiler":
        monkeypatch.setattr(setup_file.shutil, "which", lambda name: None)
    else:
        monkeypatch.setattr(setup_file.sysconfig, "get_path", lambda name: "/nonexistent")
    monkeypatch.setenv("RESNET_FAST_BUILD_HOST", "auto")
    assert setup_file.native_folder() is None
    assert not setup_file.host_wanted()
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and all({"compiler": "no C++ compiler", "headers": "no Python.h"}[missing] in s for s in said)
    monkeypatch.setenv("RESNET_FAST_BUILD_HOST", "1")
    with pytest.raises(SystemExit, match="expected to build its host module"):
        setup_file.host_wanted()
    monkeypatch.setenv("RESNET_FAST_BUILD_CUDA", "1")
    with pytest.raises(SystemExit, match="expected to build its native library"):
        setup_file.native_folder()


def test_old_torch_is_not_built_against(setup_file: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup_file.metadata, "version", lambda name: "2.9.1+cu130")
    assert setup_file.native_folder() is None
    monkeypatch.setattr(setup_file.metadata, "version", lambda name: "2.11.0+cpu")
    assert setup_file.native_folder() == Path(importlib.util.find_spec("torch").origin).parent


@pytest.mark.parametrize(
    ("listed", "archs"),
    [
        ("", []),
        ("8.0;9.0a", ["80-real", "90a-real"]),
        ("8.6 9.0+PTX", ["86-real", "90"]),
        ("Hopper;9.0+PTX", ["90"]),
        ("Ampere", ["80-real", "86"]),
        ("blackwell", ["100-real", "103-real", "120-real", "121"]),
        ("7.0;7.5;8.0", ["80-real"]),
    ],
)
def test_torchs_list_of_architectures(listed: str, archs: list[str], setup_file: ModuleType) -> None:
    assert setup_file.archs_of_torch(listed) == archs


@pytest.mark.parametrize(
    ("listed", "said"),
    [
        ("sm_90", "expected TORCH_CUDA_ARCH_LIST like '8.0;9.0a;12.0\\+PTX' or the names ampere, .*, got 'sm_90'"),
        ("8.0;Volta", "got 'Volta'"),
        ("7.0;7.5+PTX", "kernels for 7.0, 7.5.PTX of TORCH_CUDA_ARCH_LIST, got 8.0 is the oldest"),
    ],
)
def test_torchs_list_with_nothing_to_build(listed: str, said: str, setup_file: ModuleType) -> None:
    with pytest.raises(SystemExit, match=said):
        setup_file.archs_of_torch(listed)


def test_own_list_of_architectures_comes_first(
    setup_file: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    assert not any("ARCHS" in argument for argument in setup_file.cmake_arguments(tmp_path, False))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0 9.0")
    assert "-DRESNET_FAST_CUDA_ARCHS=80-real;90-real" in setup_file.cmake_arguments(tmp_path, False)
    monkeypatch.setenv("RESNET_FAST_CUDA_ARCHS", "90a-real")
    assert "-DRESNET_FAST_CUDA_ARCHS=90a-real" in setup_file.cmake_arguments(tmp_path, False)


def test_number_of_compilers(setup_file: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CMAKE_BUILD_PARALLEL_LEVEL", raising=False)
    monkeypatch.setenv("MAX_JOBS", "3")
    setup_file.limit_jobs()
    assert os.environ["CMAKE_BUILD_PARALLEL_LEVEL"] == "3"
    monkeypatch.setenv("MAX_JOBS", "5")
    setup_file.limit_jobs()
    assert os.environ["CMAKE_BUILD_PARALLEL_LEVEL"] == "3"  # CMake's own variable comes first
    monkeypatch.setenv("MAX_JOBS", "many")
    with pytest.raises(SystemExit, match="expected MAX_JOBS to be a number of compilers, 1 or more, got 'many'"):
        setup_file.limit_jobs()


def configured(folder: Path, **variables: str) -> tuple[int, str]:
    """Configure with CMake, and return its exit code and its output on one line."""
    nvcc, cmake = shutil.which("nvcc"), shutil.which("cmake")
    if nvcc is None or cmake is None:
        pytest.skip("no nvcc or no cmake here")
    torch_at = Path(importlib.util.find_spec("torch").origin).parent
    options = {"RESNET_FAST_TORCH_DIR": torch_at, "RESNET_FAST_CUDA": "1", "Python_EXECUTABLE": sys.executable}
    command = [cmake, "-S", ROOT, "-B", folder / "build", *[f"-D{k}={v}" for k, v in {**options, **variables}.items()]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return done.returncode, " ".join((done.stdout + done.stderr).split())


@pytest.mark.slow
@pytest.mark.parametrize(("required", "code"), [("1", 1), ("auto", 0)])
def test_toolkit_of_another_major_version(
    required: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvcc = tmp_path / "nvcc"
    version = "[ \"$1\" = --version ] && echo 'Cuda compilation tools, release 7.5, V7.5.1' && exit 0"
    nvcc.write_text(f'#!/bin/sh\n{version}\nexec {shutil.which("nvcc")} "$@"\n')
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDACXX", str(nvcc))
    found, said = configured(tmp_path, RESNET_FAST_CUDA=required)
    assert found == code
    assert re.search(r"missing: a CUDA \d+ toolkit, which this torch was built with, in place of CUDA 7 \(", said)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("asked", "archs", "warns"),
    [
        ("", "80;86-real;89-real;90a-real;100-real;120-real", False),
        ("80-real;90", "80-real;90a-real;90-virtual", False),
        ("90-real;90a-real", "90a-real", False),
        ("all-major", "all-major", True),
    ],
)
def test_architectures_keep_hoppers_kernel_or_say_that_they_do_not(
    asked: str, archs: str, warns: bool, tmp_path: Path
) -> None:
    found, said = configured(tmp_path, RESNET_FAST_CUDA_ARCHS=asked)
    assert found == 0 and f"CUDA architectures of _C: {archs} --" in said
    assert ("without the whole-block kernel of Hopper" in said) == warns


STALE = ("resnet_fast/_C.abi3.so", "resnet_fast/_emulator.cpython-311-x86_64-linux-gnu.so", "resnet_fast/gone.py")
"""What work in a checkout leaves: native modules in place, and in setuptools' folder those and removed modules."""


def test_pure_wheel_and_sdist_hold_what_they_should_and_nothing_else(checkout: Path) -> None:
    left = [checkout / folder / name for folder in (".", "build/lib") for name in STALE]
    left = [path for path in left if path != checkout / "resnet_fast/gone.py"]  # there it would be a new module
    left += [checkout / "tests" / "__pycache__" / "test_spec.cpython-311.pyc", checkout / "csrc" / "_C.so"]
    for path in left:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    wheel, sdist = build(checkout, "wheel", "sdist", RESNET_FAST_BUILD_NATIVE="0")
    assert wheel.name == f"resnet_fast-{resnet_fast.__version__}-py3-none-any.whl"
    assert contents.differences(contents.in_wheel(wheel), contents.of_wheel(contents.sources(), native=False)) == []
    assert contents.differences(contents.in_sdist(sdist), contents.of_sdist(contents.sources())) == []
    held = contents.in_wheel(wheel)
    assert {
        "resnet_fast/py.typed",
        "resnet_fast/benchmarks/null_gpu.cpp",
        "resnet_fast/training/recipes/digits.yaml",
    } <= held
    assert "csrc/kernels/include/resnet_fast/kernels.h" in contents.in_sdist(sdist)
    about = f"resnet_fast-{resnet_fast.__version__}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read(f"{about}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
        said = archive.read(f"{about}/METADATA").decode().splitlines()
    assert {"License-Expression: Apache-2.0", "License-File: LICENSE", "Requires-Python: >=3.10"} <= set(said)


def test_an_installed_program_asks_for_a_checkout_and_torch_stays(checkout: Path) -> None:
    (wheel,) = build(checkout, "wheel", RESNET_FAST_BUILD_NATIVE="0")
    zipfile.ZipFile(wheel).extractall(checkout / "site")
    site = {**os.environ, "PYTHONPATH": str(checkout / "site")}
    code = "from resnet_fast.benchmarks import checkout; checkout.require('this program')"
    done = run_python(code, cwd=checkout / "site", env=site)
    assert "UserError: expected a checkout of the repository for this program, got the installed" in done.stderr
    # What a user has of torch stays: pip would install this wheel and nothing else beside it.
    report = checkout / "report.json"
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", "--report", str(report), str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    installed = [entry["metadata"]["name"] for entry in json.loads(report.read_text())["install"]]
    assert installed == ["resnet_fast"]


@pytest.mark.slow
def test_native_wheel_is_built_and_loads(checkout: Path, tmp_path: Path) -> None:
    (wheel,) = build(checkout, "wheel", RESNET_FAST_BUILD_NATIVE="1", RESNET_FAST_BUILD_CUDA="0")
    assert "-cp310-abi3-" in wheel.name
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    tool = shutil.which("torch-abi-audit", path=str(Path(sys.executable).parent))
    if tool is None:
        pytest.skip("no torch-abi-audit here (pip install torch-abi-audit)")
    library = tmp_path / "site" / "resnet_fast" / "_C.abi3.so"
    audit = [tool, "--check", "both", str(library)]
    audited = subprocess.run(audit, capture_output=True, text=True, timeout=120)
    assert audited.returncode == 0, audited.stdout + audited.stderr
    assert "Min torch:   2.11.0" in audited.stdout
    code = "from resnet_fast import native; print(native.__file__, native.build_info())"
    done = run_python(code, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path / "site")})
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "site") in done.stdout
    assert "'cuda_toolkit': 'none'" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "program",
    ["gpu.check", "gpu.tune", "gpu.bench", "tables.traffic", "tables.cuda_budgets", "host_time", "host_instructions"],
)
def test_programs_of_a_wheel_work_or_name_what_they_need(program: str, checkout: Path, tmp_path: Path) -> None:
    """They never take the folder of installed packages for a checkout and look for tests or docs there."""
    (wheel,) = build(checkout, "wheel", RESNET_FAST_BUILD_NATIVE="0")
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    before = sorted(site.rglob("*.md"))
    command = [
        sys.executable,
        "-m",
        f"resnet_fast.benchmarks.{program}",
        *(["--help"] if program.startswith("host_") else []),
    ]
    environment = {**os.environ, "PYTHONPATH": str(site), "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=site, env=environment, capture_output=True, text=True, timeout=120)
    if program.startswith("host_"):
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode != 0 and re.search(r"expected a checkout .*got the installed package in", done.stderr)
    assert sorted(site.rglob("*.md")) == before


@pytest.mark.slow
def test_host_module_ties_the_wheel_to_this_python(checkout: Path) -> None:
    (wheel,) = build(checkout, "wheel", RESNET_FAST_BUILD_NATIVE="0", RESNET_FAST_BUILD_HOST="1")
    names = {Path(name).name.partition(".")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {"_host", "_emulator", "_ptx", "_sass"} <= names
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert f"-{tag}-{tag}-" in wheel.name


@pytest.mark.slow
def test_cuda_that_was_asked_for_and_is_missing_fails(checkout: Path) -> None:
    with pytest.raises(ReleaseError) as failed:
        build(checkout, "wheel", RESNET_FAST_BUILD_CUDA="1", CUDACXX="/nonexistent/nvcc")
    said = " ".join(str(failed.value).split())
    assert "expected to build the CUDA half" in said
    assert said.endswith("RESNET_FAST_BUILD_NATIVE=0 builds the package without them") and "Traceback" not in said
