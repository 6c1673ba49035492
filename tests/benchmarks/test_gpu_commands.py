"""benchmarks/gpu: the three commands for a GPU in Triton's interpreter, their cases and what a cut leaves behind."""

from __future__ import annotations

import ast
import copy
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from resnet_fast import devices, numerics
from resnet_fast.benchmarks import page, providers
from resnet_fast.benchmarks.gpu import bench, cases, check, first_contact, nets, tune
from resnet_fast.benchmarks.gpu import session as sessions
from resnet_fast.benchmarks.gpu.session import GpuCase, Settings
from resnet_fast.spec import Verdict
from resnet_fast.tuning import configs, launches, tables, training_configs
from tests.support import ROOT
from tests.support.gpu_sessions import rows

GPU = ROOT / "benchmarks" / "gpu"
OURS = {"resnet_fast", "benchmarks"}
BARE = set(sys.stdlib_module_names) | OURS | {"torch", "triton", "torchvision", "numpy", "pytest"}
ABSENT = ("typer", "rich", "hypothesis", "timm", "matplotlib", "safetensors", "skimage", "onnx", "openvino")


def imported(path: Path, everywhere: bool = True) -> set[str]:
    """Return the top-level names that a file imports; with ``everywhere``, inside functions too."""
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if everywhere else iter(tree.body)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add((node.module or "").split(".")[0])
    return found


def test_the_commands_import_what_a_bare_machine_has() -> None:
    files = sorted(GPU.glob("*.py"))
    assert {"check.py", "tune.py", "bench.py", "session.py"} <= {path.name for path in files}
    for path in files:
        assert imported(path) <= BARE, path.name
    for name in ("harness", "markdown", "memory", "providers", "provenance", "runtimes"):  # theirs of benchmarks/
        assert imported(ROOT / "benchmarks" / f"{name}.py", everywhere=False) <= BARE, name


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return an environment in which packages that a bare machine lacks cannot be imported."""
    folder = tmp_path_factory.mktemp("absent")
    for name in ABSENT:
        (folder / f"{name}.py").write_text(f"raise ImportError('no {name} on a bare machine')\n")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RESNET_FAST_", "TRITON_"))}
    return kept | {"PYTHONPATH": str(folder)}


def command_line(name: str, out: Path) -> list[str]:
    return [sys.executable, "-m", f"resnet_fast.benchmarks.gpu.{name}", "--device", "cpu", "--quick", "--out", str(out)]


def run(name: str, out: Path, env: dict[str, str], *options: str) -> subprocess.CompletedProcess[str]:
    command = [*command_line(name, out), *options]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=500)


BEGINS = {
    "check": ["cold start ", "host ", "second device ", "build", "config ", "net "],
    "tune": ["tune "],
    "bench": ["ceiling ", "inference ", "conv ", "training ", "profile training ", "compiled ", "runtimes "],
}


def expect_results(out: Path, name: str) -> list[dict[str, Any]]:
    """Expect every kind of row, all good, each under its own key, and the environment and the report."""
    found = rows(out, name)
    assert {row["status"] for row in found} <= {"passed", "measured", "refused", "skipped"}
    assert all(row["key"].startswith(f"{row['case']} | Triton interpreter | space {configs.SPACE} | ") for row in found)
    assert len({row["key"] for row in found}) == len(found)
    for begin in BEGINS[name]:
        assert any(row["case"].startswith(begin) for row in found), begin
    known = json.loads((out / "env.json").read_text())
    assert {"torch", "triton", "gpu", "driver", "commit"} <= known.keys()
    assert (name == "bench") == ("ceilings" in known)
    assert (out / "report.md").read_text().startswith("# Triton interpreter")
    shown = page.build([out])
    assert "Triton interpreter" in shown and ("cifar_resnet20" in shown or name != "bench")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["check", "bench"])
def test_a_quick_run_and_its_resumption(name: str, tmp_path: Path, bare: dict[str, str]) -> None:
    first = run(name, tmp_path, bare, "--budget", "450" if name == "check" else "200")
    assert first.returncode == 0, first.stdout + first.stderr
    found = expect_results(tmp_path, name)
    before = os.times()
    again = run(name, tmp_path, bare, "--budget", "100")
    resumed = [row["key"] for row in found if row["case"] != "tests"]  # which are asked for their own rows
    assert again.returncode == 0 and f"{len(resumed)} kept" in again.stdout, again.stdout
    after = os.times()  # of one core, whatever else the machine does
    assert after.children_user + after.children_system - before.children_user - before.children_system < 60
    assert [row["key"] for row in rows(tmp_path, name) if row["case"] != "tests"] == resumed


def test_first_contact_fits_into_five_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever happens: a case that takes longer than its limit ends there, and the build comes after them."""
    limits = {case.name: case.limit_s for case in first_contact.cases(Settings("check"))}
    assert list(limits)[:2] == ["cold start inference", "cold start training"]
    assert sum(limit for name, limit in limits.items() if not name.startswith("second device ")) <= 300
    for others in ("_configs", "_training_configs"):
        monkeypatch.setattr(check, others, lambda settings: [("kernel", GpuCase("config", dict))])
    listed = [case.name for case in check.cases(Settings("check"))]
    assert listed[: len(limits) + 1] == [*limits, "config"]


def test_a_cold_start_that_fails_says_in_which_process_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = first_contact.Kind(False, "cifar_resnet20", 2, 8, "cpu")
    answers = [
        (0, 'noise\ncold start: {"first_s": 9.5, "second_s": 0.1}\nmore noise'),
        (1, "Traceback\nValueError: no"),
    ]
    seen = []

    def run_limited(command: list[str], limit_s: float, env: dict[str, str]) -> tuple[int | None, str]:
        seen.append((env["TRITON_CACHE_DIR"], env["RESNET_FAST_CACHE"]))
        return answers[len(seen) - 1]

    monkeypatch.setattr(first_contact, "run_limited", run_limited)
    with pytest.raises(RuntimeError, match="process 2 of 2: exit code 1: ValueError: no"):
        first_contact.cold_start(kind)
    assert len(set(seen)) == 1 and not Path(seen[0][0]).exists()  # the second process finds the caches of the first
    answers[:] = [answers[0], (0, 'cold start: {"first_s": 0.5, "second_s": 0.1}')]
    seen.clear()
    row = first_contact.cold_start(kind)
    assert (row["first_s"], row["second_step_s"], row["next_process_s"]) == (9.5, 0.1, 0.5)
    assert row["note"] == "9.5 s, in the next process 0.5 s"


def test_without_a_second_gpu_the_row_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(c for c in first_contact.cases(Settings("check")) if c.name.startswith("second device "))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    row = sessions.execute(case)
    assert row["status"] == "skipped" and row["reason"] == "fewer than two CUDA devices here"


@pytest.mark.slow
def test_a_cut_check_keeps_what_it_has_shown(tmp_path: Path, bare: dict[str, str]) -> None:
    command = [*command_line("check", tmp_path), "--only", "cold start"]
    cut = subprocess.Popen(command, cwd=ROOT, env=bare, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert cut.stdout is not None
    said = next(line for line in cut.stdout if "cold start inference" in line)
    cut.kill()
    cut.communicate(timeout=60)
    assert "passed" in said and "in the next process" in said
    (row,) = rows(tmp_path, "check")
    assert row["case"] == "cold start inference" and row["first_s"] > 0 and row["next_process_s"] > 0


@pytest.mark.slow
def test_a_cut_tuning_leaves_whole_rows_and_goes_on(tmp_path: Path, bare: dict[str, str]) -> None:
    cut = subprocess.Popen(
        command_line("tune", tmp_path), cwd=ROOT, env=bare, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert cut.stdout is not None
    said = [line for line, _ in zip(cut.stdout, range(3), strict=False)]
    cut.kill()
    rest = cut.communicate(timeout=60)[0]
    assert ["measured" in line for line in said] == [False, True, True], [*said, rest]
    before, path, table = rows(tmp_path, "tune"), tmp_path / "tune.jsonl", tmp_path / "triton-interpreter.json"
    launches = json.loads(table.read_text())["launches"]
    assert 2 <= len(before) <= len(launches) <= len(before) + 1  # one may be cut between its table and its row
    more = run("tune", tmp_path, bare, "--budget", "200")
    assert more.returncode == 0, more.stdout + more.stderr
    launches = json.loads(table.read_text())["launches"]
    assert len(launches) == 9 and len(expect_results(tmp_path, "tune")) >= 8 and "speedup" in more.stdout
    fresh = run("tune", tmp_path, bare, "--budget", "0.01", "--fresh")  # gone before the first launch
    assert fresh.returncode == 0 and not table.exists() and not path.exists()


@pytest.mark.parametrize("precision", cases.PRECISIONS)
def test_every_shipped_config_runs_on_an_h100_or_no_launch_admits_it(precision: str) -> None:
    gpu = devices.gpu("h100").gpu
    assert gpu is not None
    every = cases.real(precision)
    for kernel, group in cases.ragged(precision).items():
        shipped = {configs.for_dtype(c, group[0].dtype) for c in configs.SHIPPED[kernel]}
        assert all(launch.kernel == kernel and launch.last.tf32 == (precision == "tf32") for launch in group)
        ragged = {c for launch in group for c in configs.candidates(launch, gpu)}
        real = {c for launch in every if launch.kernel == kernel for c in configs.candidates(launch, gpu)}
        assert ragged == real == shipped if precision != "float32" else ragged | real <= shipped


@pytest.mark.parametrize("precision", cases.PRECISIONS)
def test_every_training_config_runs_on_an_h100(precision: str) -> None:
    """Some tiles do not run in fp32: without tensor cores a thread holds fewer sums."""
    gpu = devices.gpu("h100").gpu
    assert gpu is not None
    for kernel, shipped in training_configs.SHIPPED.items():
        every = [one for one in cases.ragged_training(precision) if one.kernel == kernel]
        assert {one.prologue for one in every} == {True, False}
        assert all(one.last.batch_stats != one.folded and one.last.tf32 == (precision == "tf32") for one in every)
        assert any(one.folded for one in every) == (kernel != "conv_fwd")  # whose place kernels of inference take
        wanted = {configs.for_dtype(c, every[0].dtype) for c in shipped}
        for packed in (True, False):
            found = {replace(c, packed=False) for one in every for c in training_configs.candidates(one, gpu, packed)}
            assert found == wanted if precision != "float32" else found <= wanted and found


def test_a_cut_check_has_seen_every_kernel_and_names_are_unique(monkeypatch: pytest.MonkeyPatch) -> None:
    from resnet_fast.backends.triton import device

    monkeypatch.setattr(device, "device_of", lambda _: devices.gpu("h100"))
    found = check.cases(Settings("check", "cpu"))
    assert len({case.name for case in found}) == len(found) > 1000
    contact = len(list(first_contact.cases(Settings("check", "cpu"))))
    first = found[contact : contact + len(launches.KERNELS)]
    assert {case.run.launch.kernel for case in first} == set(launches.KERNELS)  # type: ignore[attr-defined]
    assert not any(configs.needs_proof(case.run.launch, case.run.config) for case in first)  # type: ignore[attr-defined]
    refused = [case.known for case in found if case.known]
    assert refused and all("expected" in row["reason"] for row in refused)
    assert any(row.get("needs_proof") for row in refused) or any(
        configs.needs_proof(case.run.launch, case.run.config) for case in found if isinstance(case.run, check.Proof)
    )


def test_a_wrong_kernel_is_a_failed_row(monkeypatch: pytest.MonkeyPatch) -> None:
    from resnet_fast.backends.triton import problem

    launch = cases.ragged("float32")["conv_bn_act_1x1"][0]
    proof = check.Proof(launch, configs.SHIPPED["conv_bn_act_1x1"][0], "cpu")
    monkeypatch.setattr(problem.Problem, "run", lambda self, config: self.eager() * 1.01)
    row = sessions.execute(GpuCase("wrong", proof))
    assert row["status"] == "failed" and "over the budget" in row["error"]
    monkeypatch.setattr(problem.Problem, "run", lambda self, config: self.eager())
    row = sessions.execute(GpuCase("right", proof))
    assert row["status"] == "passed" and row["ratio"] == 1.0 and row["kernel"] == "conv_bn_act_1x1"


@pytest.mark.parametrize("net", ["resnet18", "resnet50"])
def test_the_problems_by_name_are_those_of_the_accelerated_net(net: str) -> None:
    import resnet_fast
    from resnet_fast.dispatch import record

    model, x = cases.calibrated(net, 1, 64, "cpu", "float32")
    with record.tape() as tape, torch.inference_mode():
        resnet_fast.accelerate(model)(x)
    ran = [entry.spec for entry in tape if isinstance(entry, record.Ran)]
    assert ran == list(cases.specs(net, 1, "float32", 64).values())


@pytest.mark.parametrize("net", ["resnet18", "resnet50"])
def test_the_cudnn_peer_is_the_same_net(net: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def conv_relu(x: Any, w: Any, b: Any, *geometry: Any) -> Any:
        return torch.relu(torch.conv2d(x, w, b, *geometry))

    def conv_add_relu(x: Any, w: Any, z: Any, alpha: float, b: Any, *geometry: Any) -> Any:
        return torch.relu(torch.conv2d(x, w, b, *geometry) + alpha * z)

    monkeypatch.setattr(torch, "cudnn_convolution_relu", conv_relu)
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", conv_add_relu)
    model, x = cases.calibrated(net, 1, 64, "cpu", "float32")
    with torch.inference_mode():
        stock, got = model(x), providers.CudnnFused(model)(x)
        exact = copy.deepcopy(model).double()(x.double())
    report = numerics.compare(got, exact, stock)
    assert report.rel <= 2 * report.eager_rel < 1e-3, report  # type: ignore[operator]


def fabricated(group: tune.Group, ours: float, stock: float) -> tables.Table:
    """Return a table in which the first candidate takes ``ours`` microseconds and every stock form ``stock``."""
    gpu = devices.gpu("h100").gpu
    assert gpu is not None
    table = tables.Table(sessions.INTERPRETER)
    for launch in cases.launches(group.net, group.batch, group.dtype):
        table.entries[str(launch)] = {str(c): ours for c in configs.candidates(launch, gpu)} | {
            str(c): stock for c in configs.stock_candidates(launch)
        }
    return table


def test_the_sums_of_a_net_are_those_of_its_launches() -> None:
    group, device = tune.Group("resnet18", 4), devices.gpu("h100")
    row = tune.summary(group, device, fabricated(group, 10.0, 30.0))
    assert row is not None
    # stock: the stem, 16 convolutions, 3 projections; ours: the same with the projections in the second convolution
    assert row["stock_us"] == pytest.approx(30 * 20) and row["best_us"] == pytest.approx(10 * 17)
    assert row["stages"]["layer2"]["plans"] == {"proj": 1, "conv": 1}
    table = fabricated(group, 10.0, 30.0)
    first = next(iter(cases.launches("resnet18", 4)))
    assert tune.complete(first, table, device)
    table.entries.popitem()
    assert tune.summary(group, device, table) is None


def test_the_bench_begins_with_what_matters_most(monkeypatch: pytest.MonkeyPatch) -> None:
    from resnet_fast.backends.triton import device

    monkeypatch.setattr(device, "device_of", lambda _: devices.gpu("h100"))
    found = [case.name for case in bench.cases(Settings("bench", "cpu"))]
    assert len(set(found)) == len(found)
    kinds = list(dict.fromkeys(name.split()[0] for name in found))
    assert kinds == ["ceiling", "inference", "conv", "training", "profile", "compiled", "runtimes"]
    assert found.index("inference resnet50 batch 256") < found.index("inference resnet50 batch 1")
    convs = [name for name in found if name.startswith("conv ") and name.endswith("batch 256")]
    assert len(convs) == 24  # of 53


def test_a_net_of_ours_that_fails_leaves_the_others_their_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from resnet_fast.backends.triton import device

    monkeypatch.setattr(device, "device_of", lambda _: devices.gpu("h100"))
    monkeypatch.setattr(device, "table_of", lambda _: tables.Table(sessions.INTERPRETER))

    def broken(model: Any, x: Any) -> Any:
        raise ValueError("no such kernel")

    settings = Settings("bench", "cpu", str(tmp_path), quick=True)
    ours = providers.Provider(providers.OURS, False, lambda *_: Verdict.yes(), broken)
    wanted = (providers.GPU_INFERENCE[0], ours, providers.GPU_INFERENCE[5])
    row = sessions.execute(
        GpuCase("net", nets.NetCase(settings, "cifar_resnet20", 1, wanted, dtype="float32", image=8))
    )
    assert row["status"] == "failed" and row["error"] == "resnet_fast: ValueError: no such kernel"
    assert list(row["peers"]) == ["eager NCHW"] and row["skipped"] == {providers.BEST_STOCK: "CUDA graphs need a GPU"}
    eager = row["peers"]["eager NCHW"]
    assert eager["model_error"] == pytest.approx(eager["modelled_ms"] / eager["ms"] - 1, abs=1e-3)
