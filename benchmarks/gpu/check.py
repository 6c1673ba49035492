"""``python3 -m resnet_fast.benchmarks.gpu.check``: check everything that needs a GPU.

    contact   seconds of a cold start, the host's time per step, a second GPU (first_contact.py): the first five minutes
    build     the native library, out of tree, where there is a toolkit; the next steps run with it
    first     one config of every kernel, so that even a cut run has seen them all
    tests     ``pytest -m gpu``
    sanitizer the smallest case of every CUDA kernel under compute-sanitizer's memcheck and racecheck
    nets      accelerated nets against stock ones and fp64
    configs   every shipped config of every kernel, on ragged launches and on those of real nets

A kernel's error to fp64 may be at most twice eager's (numerics.py). Configs that the rules do not admit for a launch
are listed with the reason.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from resnet_fast import flags
from resnet_fast.errors import named
from resnet_fast.spec import LaunchSpec
from resnet_fast.tuning import configs
from resnet_fast.tuning.configs import Config

from . import cases as cases_of
from . import first_contact, report
from .session import ROOT, GpuCase, Row, Session, Settings, Skipped, begin, execute, run_limited, settings_from
from .worker import WorkerPool

BUILD_LIMIT_S = 150.0
SANITIZER_LIMIT_S = 90.0
BUILT = ROOT / "build" / "gpu" / "_C.abi3.so"
"""The library that the step ``build`` leaves for the tests."""

TESTS_SHARE = 0.4
"""Part of the remaining budget that the tests may take: the configs after them are the longer list."""

NETS = ("resnet50", "resnet18", "resnext50_32x4d")


def cases(settings: Settings) -> list[GpuCase]:
    """List what workers run, in order: first contact, one config per kernel, the nets, every other config."""
    found = [*_configs(settings), *_training_configs(settings)]
    first: dict[str, GpuCase] = {}
    for kernel, case in found:
        if case.known is None:
            first.setdefault(kernel, case)
    names = {case.name for case in first.values()}
    rest = [case for _, case in found if case.name not in names]
    return [*first_contact.cases(settings), *first.values(), *_nets(settings), *rest]


def _configs(settings: Settings) -> Iterator[tuple[str, GpuCase]]:
    """(kernel, case) of every launch and shipped config, the most important precision first."""
    from resnet_fast.backends.triton.device import device_of

    gpu = device_of(torch.device(settings.device)).gpu
    assert gpu is not None
    for launch in _quick_launches() if settings.quick else _all_launches():
        few = (1 if launch.last.tf32 else 2) if settings.quick else None
        judged = cases_of.judged(launch, gpu)
        admitted = [config for config, verdict in judged if verdict]
        # an eight-warp config is not the one to begin with
        admitted.sort(key=lambda config: configs.needs_proof(launch, config))
        for config in admitted[:few]:
            yield launch.kernel, GpuCase(f"config {launch} :: {config}", Proof(launch, config, settings.device))
        for config, verdict in judged:
            if not verdict:
                row = facts(launch, config) | {"status": "refused", "reason": verdict.reason}
                yield launch.kernel, GpuCase(f"config {launch} :: {config}", dict, known=row)


def _training_configs(settings: Settings) -> Iterator[tuple[str, GpuCase]]:
    """The same for a training step's kernels, packed and exact."""
    from resnet_fast.backends.triton.device import device_of

    gpu = device_of(torch.device(settings.device)).gpu
    assert gpu is not None
    if settings.quick:
        every: list[LaunchSpec] = [one for one in cases_of.ragged_training("float16") if one.last.ci == 16]
    else:
        every = [one for precision in cases_of.PRECISIONS for one in cases_of.ragged_training(precision)]
        every += cases_of.real_training()
    for launch in every:
        for config, _ in cases_of.judged(launch, gpu)[: 1 if settings.quick else None]:
            yield launch.kernel, GpuCase(f"config {launch} :: {config}", Proof(launch, config, settings.device))


def _all_launches() -> Iterator[LaunchSpec]:
    for precision in cases_of.PRECISIONS:
        for group in cases_of.ragged(precision).values():
            yield from group
        yield from cases_of.real(precision)


def _quick_launches() -> Iterator[LaunchSpec]:
    for precision in ("float16", "tf32"):
        for group in cases_of.ragged(precision).values():
            yield min(group, key=LaunchSpec.macs)


def precision_of(launch: LaunchSpec) -> str:
    return "tf32" if launch.last.tf32 else launch.dtype


def facts(launch: LaunchSpec, config: Config) -> Row:
    proof = configs.needs_proof(launch, config)
    return {
        "kernel": launch.kernel,
        "precision": precision_of(launch),
        "config": str(config),
        **({"needs_proof": True} if proof else {}),
    }


class Proof:
    """Compare one launch with one config with fp64 and eager's own error."""

    def __init__(self, launch: LaunchSpec, config: Config, device: str) -> None:
        self.launch, self.config, self.device = launch, config, device

    def __call__(self) -> Row:
        from resnet_fast.backends.triton.training.problem import launch_problem

        # eager's own error is the budget: TF32's where the kernel may round to TF32, and only there
        with cases_of.cudnn_tf32(self.launch.last.tf32), torch.inference_mode():
            random = launch_problem(self.launch, self.device)
            if not configs.needs_proof(self.launch, self.config) or torch.device(self.device).type != "cuda":
                found = random.check(self.config)
            else:
                found = self._proved(random)
        return facts(self.launch, self.config) | error_row(found)

    def _proved(self, random: Any) -> Any:
        """Check a config, and keep the verdict for this user's planner."""
        from resnet_fast.backends.triton import proofs
        from resnet_fast.backends.triton.device import table_of

        table = table_of(torch.device(self.device))
        try:
            found = random.check(self.config)
        except AssertionError as error:
            proofs.keep(table, [(self.launch, self.config, named(error))])
            raise
        proofs.keep(table, [(self.launch, self.config, "")])
        return found


def error_row(found: Any) -> Row:
    """Return a row's part of an error report: errors relative to fp64, and the largest ones."""
    ratio = found.ratio
    return {
        "error": None,
        "rel": found.rel,
        "eager_rel": found.eager_rel,
        "ratio": round(ratio, 3) if ratio is not None and ratio < 1e6 else None,
        "max_abs": found.max_abs,
    }


def _nets(settings: Settings) -> Iterator[GpuCase]:
    if settings.quick:
        net = _Net("cifar_resnet20", "float32", 1, 8, settings.device)
        yield GpuCase("net cifar_resnet20 float32 batch 1", net, limit_s=120)
        return
    for name in NETS:
        for dtype in ("bfloat16", "float32"):
            net = _Net(name, dtype, 2, 224, settings.device)
            yield GpuCase(f"net {name} {dtype} batch 2", net, limit_s=150, needs_s=15)


class _Net:
    """Compare an accelerated net in eval mode with the stock one, both with fp64."""

    def __init__(self, name: str, dtype: str, batch: int, image: int, device: str) -> None:
        self.name, self.dtype, self.batch, self.image, self.device = name, dtype, batch, image, device

    def __call__(self) -> Row:
        with cases_of.cudnn_tf32(False):
            return self._compared()

    def _compared(self) -> Row:
        import resnet_fast
        from resnet_fast import numerics

        model, x = cases_of.calibrated(self.name, self.batch, self.image, self.device, self.dtype)
        double = copy.deepcopy(model).double()
        with torch.inference_mode():
            want, eager = double(x.double()), model(x)
            del double
            resnet_fast.reset_stats()
            out = resnet_fast.accelerate(model, backend="triton")(x)
        ran = resnet_fast.stats()["calls"]
        stock = sorted(call for call in ran if not call.endswith("/triton"))
        if stock or not ran:
            raise AssertionError(f"expected every block on triton, got {', '.join(stock) or 'no fused call'}")
        k = max(m.weight[0].numel() for m in model.modules() if isinstance(m, nn.Conv2d))
        return error_row(numerics.assert_close(out, want, eager, k)) | {"launched": ran}


def build(session: Session) -> Row:
    """Compile ``csrc`` out of tree for this GPU, and load the library.

    Raises:
        Skipped: without a compiler or sources.
        RuntimeError: with the step that failed and its first error.
    """
    settings = session.settings
    sources = sorted((ROOT / "csrc" / "kernels").glob("*.cu"))
    cmake = shutil.which("cmake") or shutil.which("cmake", path=str(Path(sys.executable).parent))
    nvcc = shutil.which("nvcc") or _cuda_home_nvcc()
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if not sources:
        raise Skipped("csrc/kernels has nothing to compile")
    lacks = [name for name, tool in (("cmake", cmake), ("a C++ compiler", compiler)) if tool is None]
    if settings.on_gpu and nvcc is None:
        lacks.append("nvcc")
    if lacks:
        raise Skipped(f"no {', no '.join(lacks)}")
    assert cmake is not None
    where = importlib.util.find_spec("torch")
    assert where is not None and where.origin is not None
    BUILT.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="resnet_fast_build_") as folder:
        options = [
            "-DRESNET_FAST_NATIVE=ON",
            f"-DRESNET_FAST_TORCH_DIR={Path(where.origin).parent}",
            f"-DRESNET_FAST_CUDA={int(settings.on_gpu)}",
            f"-DPython_EXECUTABLE={sys.executable}",
        ]
        if settings.on_gpu:
            major, minor = torch.cuda.get_device_capability()
            options.append(f"-DRESNET_FAST_CUDA_ARCHS={major}{minor}{'a' if major >= 9 else ''}-real")
        if shutil.which("ninja"):
            options.append("-GNinja")
        env = os.environ | {"PATH": os.pathsep.join([os.environ.get("PATH", ""), str(Path(nvcc or cmake).parent)])}
        load = f"import torch; torch.ops.load_library({folder!r} + '/_C.abi3.so')"
        steps = {
            "configuring": [cmake, "-S", str(ROOT), "-B", folder, *options],
            "compiling": [cmake, "--build", folder, "--parallel"],
            "loading": [sys.executable, "-c", f"{load}; print(torch.ops.resnet_fast_native.build_info())"],
        }
        end = session.clock.left - min(BUILD_LIMIT_S, session.clock.left / 2)
        output = ""
        for what, command in steps.items():
            code, output = run_limited(command, session.clock.left - end, env=env)
            if code != 0:
                lines = [line for line in output.splitlines() if re.search(r"error|Error", line)] or output.splitlines()
                reason = "stopped at its time limit" if code is None else f"exit code {code}"
                raise RuntimeError(f"{what}: {reason}: {lines[0].strip() if lines else ''}")
        shutil.copy(Path(folder) / BUILT.name, BUILT)
    return {"build": dict(line.split("=", 1) for line in output.splitlines() if "=" in line)}


def use_built() -> None:
    """Let this process and its children load the library of :func:`build`, from this run or an earlier one."""
    if BUILT.exists():
        os.environ[flags.LIBRARY] = str(BUILT)


def sanitize(session: Session) -> Row:
    """Run the ``smallest`` tests of the CUDA kernels under compute-sanitizer, one tool after the other."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        raise Skipped("no compute-sanitizer")
    if not BUILT.exists():
        raise Skipped("no native library was built")
    tests = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "-k", "smallest"]
    done = []
    for check in ("memcheck", "racecheck"):
        command = [tool, "--tool", check, "--error-exitcode", "9", *tests, str(ROOT / "tests" / "backends" / "cuda")]
        code, output = run_limited(command, min(SANITIZER_LIMIT_S, session.clock.left / 2))
        if code != 0:
            lines = [line for line in output.splitlines() if "=========" in line or "rror" in line]
            reason = "stopped at its time limit" if code is None else f"exit code {code}"
            raise RuntimeError(f"{check}: {reason}: {' '.join(lines[:3])[:400]}")
        done.append(check)
    return {"note": ", ".join(done)}


def _cuda_home_nvcc() -> str | None:
    path = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "nvcc"
    return str(path) if path.exists() else None


def gpu_test_files(root: Path = ROOT / "tests") -> list[Path]:
    """Return the test files with a test for a GPU."""
    mark = re.compile(r"\bmark\.gpu\b")
    return [path for path in sorted(root.rglob("test_*.py")) if mark.search(path.read_text())]


def run_tests(session: Session, files: list[Path]) -> None:
    """Run ``pytest -m gpu`` over ``files``: a row per test, without those that have passed before."""
    if not files:
        session.record("tests", {"status": "skipped", "reason": "no test file has the mark gpu"})
        return
    prefix = "test "
    passed = [
        row["case"].removeprefix(prefix)
        for row in session.store.rows.values()
        if row["case"].startswith(prefix) and row["status"] == "passed" and row["key"] == session.key(row["case"])
    ]
    session.counts["kept"] = session.counts.get("kept", 0) + len(passed)
    limit = session.clock.left * TESTS_SHARE
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", f"{__package__}.pytest_rows"]
        command += ["-p", "no:cacheprovider", f"--rows={rows}", *(f"--deselect={test}" for test in passed)]
        code, output = run_limited([*command, *map(str, files)], limit)
        begun = _record_tests(session, rows, prefix)
    if code is None:
        session.left += [f"tests after {begun}" if begun else "tests"]
    elif begun:
        error = f"pytest ended with exit code {code} in this test"
        session.record(prefix + begun, {"status": "failed", "error": error})
    elif code not in (0, 1, 5):  # 5: nothing was left to run
        lines = [line for line in output.splitlines() if line.strip()]
        reason = next((line for line in lines if "rror" in line), lines[-1] if lines else "")
        session.record("tests", {"status": "failed", "error": f"pytest ended with exit code {code}: {reason[:200]}"})
    else:
        session.record("tests", {"status": "passed", "note": f"{len(files)} files"})


def _record_tests(session: Session, rows: Path, prefix: str) -> str:
    """Record every finished test; return the name of one that has only begun."""
    begun = ""
    for line in rows.read_text().splitlines() if rows.exists() else []:
        row = json.loads(line)
        if "status" not in row:
            begun = row["test"]
            continue
        name = row.pop("test")
        begun = "" if name == begun else begun
        session.record(prefix + name, row)
    return begun


def main() -> int:
    settings = settings_from("check", (__doc__ or "").splitlines()[0])
    session = begin(settings)
    everything = cases(settings)
    contact = list(first_contact.cases(settings))
    first = [case for case in everything[len(contact) :] if case.known is None][: len(configs.SHIPPED)]
    building = GpuCase("build", lambda: build(session))
    sanitizing = GpuCase("sanitizer", lambda: sanitize(session))
    try:
        with WorkerPool(f"{__package__}.check", session) as alone:  # nothing else compiles or computes meanwhile
            alone.run(session.todo(contact))
        for case in session.todo([building]):
            session.record(case.name, execute(case))
        use_built()
        size = 1 if settings.quick else (8 if settings.on_gpu else 2)
        with WorkerPool(f"{__package__}.check", session, min(size, os.cpu_count() or 1)) as pool:
            pool.run(session.todo(first))
            if not settings.on_gpu:
                session.record("tests", {"status": "skipped", "reason": "needs a CUDA device"})
            elif settings.only in "tests" and session.clock.left > 0:
                run_tests(session, gpu_test_files())
            if settings.on_gpu and settings.only in "sanitizer" and session.clock.left > 0:
                for case in session.todo([sanitizing]):
                    session.record(case.name, execute(case))
            names = {case.name for case in (*contact, *first)}
            pool.run(session.todo(case for case in everything if case.name not in names))
    finally:
        report.write(settings)
    known = [GpuCase(row["case"], dict) for row in session.store.rows.values() if row["case"].startswith("test")]
    return session.finish([building, *everything, *known])


if __name__ == "__main__":
    sys.exit(main())
