"""benchmarks/runtimes.py: a row for each runtime, whatever is installed. The libraries themselves need a GPU.

Where a test says "fake", :mod:`tests.support.fake_runtimes` stands for the library.
"""

from __future__ import annotations

import copy
import importlib.util
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from resnet_fast import devices, numerics
from resnet_fast.benchmarks import providers, runtimes
from resnet_fast.benchmarks.gpu import bench, cases, nets, report
from resnet_fast.benchmarks.gpu import session as sessions
from resnet_fast.benchmarks.gpu.session import GpuCase, Settings
from resnet_fast.spec import Verdict
from resnet_fast.tuning import tables
from tests.support import fake_runtimes

NAMES = ["TensorRT, CUDA graph", "Torch-TensorRT, CUDA graph", "cuDNN frontend, CUDA graph"]
EAGER = providers.GPU_INFERENCE[0]


@pytest.fixture(autouse=True)
def _h100(monkeypatch: pytest.MonkeyPatch) -> None:
    from resnet_fast.backends.triton import device

    monkeypatch.setattr(device, "device_of", lambda _: devices.gpu("h100"))
    monkeypatch.setattr(device, "table_of", lambda _: tables.Table(sessions.INTERPRETER))


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return a function that makes only these packages seem to be installed."""

    def only(*names: str) -> None:
        find = importlib.util.find_spec
        known = {*runtimes.INSTALL}
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda n, *a: (n in names or None) if n in known else find(n, *a)
        )

    return only


def row(*peers: providers.Provider) -> dict[str, Any]:
    settings = Settings("bench", "cpu", quick=True)
    case = nets.NetCase(settings, "cifar_resnet20", 1, peers, dtype="float32", image=8)
    return sessions.execute(GpuCase("net", case))


def on_cpu(number: int, prepare: providers.Prepare) -> providers.Provider:
    """Return a runtime as it is, but for a CPU and without a CUDA graph."""
    return replace(runtimes.RUNTIMES[number], supports=lambda *_: Verdict.yes(), prepare=prepare)


def test_a_runtime_that_is_absent_has_a_row_with_the_reason(installed: Callable[..., None]) -> None:
    installed()
    found = row(*runtimes.RUNTIMES)
    assert found["status"] == "skipped" and list(found["skipped"]) == NAMES
    for name, package in zip(NAMES, ("tensorrt", "torch_tensorrt", "cudnn"), strict=True):
        assert found["skipped"][name].startswith(f"{package} is not installed; pip install ")
        assert found["skipped"][name] in found["reason"]


def test_a_runtime_without_its_libraries_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As TensorRT's bindings do that were installed without them."""
    (tmp_path / "cudnn.py").write_text("raise ImportError('libcudnn.so.9: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    verdict = runtimes.RUNTIMES[2].supports(nn.Identity(), torch.bfloat16, 1, "cuda")
    assert verdict.reason.startswith("cudnn is installed and does not load: ImportError: libcudnn.so.9: cannot open")


def test_a_dtype_that_is_not_compared_says_so() -> None:
    for runtime in runtimes.RUNTIMES:
        verdict = runtime.supports(nn.Identity(), torch.float32, 1, "cuda:0")
        assert verdict.reason.startswith("expected float16 or bfloat16, got float32")


def test_fake_libraries_that_refuse_a_net_leave_their_words_in_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(module: Any, **options: Any) -> None:
        assert options["ir"] == "dynamo" and options["require_full_compilation"]
        raise RuntimeError("no converter for aten.add")

    monkeypatch.setattr(runtimes, "onnx_bytes", lambda model, x: b"")
    monkeypatch.setitem(sys.modules, "tensorrt", fake_runtimes.tensorrt("In node 3: UNSUPPORTED_NODE"))
    monkeypatch.setitem(sys.modules, "torch_tensorrt", SimpleNamespace(compile=refuse, __version__="0.fake"))
    found = row(EAGER, on_cpu(0, runtimes.tensorrt), on_cpu(1, runtimes.torch_tensorrt))
    assert found["status"] == "measured" and list(found["peers"]) == [EAGER.name]
    assert found["errors"] == {
        NAMES[0]: "RuntimeError: TensorRT's parser refuses the network: In node 3: UNSUPPORTED_NODE",
        NAMES[1]: "RuntimeError: no converter for aten.add",
    }


def test_a_fake_tensorrt_runs_the_exported_net_and_is_compared_with_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    monkeypatch.setitem(sys.modules, "tensorrt", fake_runtimes.tensorrt())
    found = row(EAGER, on_cpu(0, runtimes.tensorrt))
    assert list(found["peers"]) == [EAGER.name, NAMES[0]] and not found["errors"]
    assert 0 < found["peers"][NAMES[0]]["difference"] < 1e-5 and found["peers"][NAMES[0]]["ms"] > 0
    assert [part["stock"] for part in found["peers"].values()] == [True, False]


def test_the_report_takes_no_runtime_for_stock_and_shows_the_reasons() -> None:
    part = {"images_per_s": 1.0, "modelled_ms": 1.0, "model": "roofline", "model_error": 0.0}
    peers = {EAGER.name: part | {"ms": 4.0, "stock": True}, NAMES[0]: part | {"ms": 1.0, "stock": False}}
    whole = {"kind": "inference", "batch": 1, "case": "runtimes", "precision": "float16", "peers": peers}
    text = report._inference([whole | {"skipped": {NAMES[1]: "torch_tensorrt is not installed"}, "errors": {}}])
    assert re.search(r"TensorRT, CUDA graph +\| +1\.000 \| +1 \| +4\.00 \|", text)
    assert "- Torch-TensorRT, CUDA graph: torch_tensorrt is not installed" in text


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (lambda y: y[:, :3], "expected an output of shape (1, 10), got (1, 3)"),
        (lambda y: y * torch.nan, "expected a finite output, got a difference of nan from the first competitor"),
    ],
)
def test_an_output_that_cannot_be_the_net_s_is_not_timed(wrong: Any, reason: str) -> None:
    def prepare(model: nn.Module, x: torch.Tensor) -> providers.PreparedCall:
        return providers.PreparedCall(lambda: wrong(model(x)).detach(), "float32")

    found = row(EAGER, on_cpu(2, prepare))
    assert list(found["peers"]) == [EAGER.name] and found["errors"] == {NAMES[2]: f"ValueError: {reason}"}


@pytest.mark.parametrize("net", ["resnet18", "resnet50"])
def test_graphs_of_a_fake_cudnn_compute_the_net(net: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cudnn", fake_runtimes.cudnn())
    model, x = cases.calibrated(net, 1, 64, "cpu", "bfloat16")
    with torch.inference_mode():
        exact, stock = copy.deepcopy(model).double()(x.double()), model(x)
    prepared = runtimes.cudnn_frontend(model, x)
    report = numerics.compare(prepared.call(), exact, stock)
    assert report.rel <= 2 * report.eager_rel, report  # type: ignore[operator]
    assert torch.equal(prepared.call(), prepared.call()) and prepared.note == "cuDNN frontend 0.fake, cuDNN 0"


def test_the_bench_lists_a_case_per_batch_and_dtype(installed: Callable[..., None]) -> None:
    for present in (False, True):
        installed(*(["cudnn"] if present else []))
        found = {c.name: c for c in bench.cases(Settings("bench", "cpu")) if c.name.startswith("runtimes ")}
        assert list(found) == [
            f"runtimes resnet50 batch {batch}, {dtype}" for dtype in ("bfloat16", "float16") for batch in (256, 1)
        ]
        peers = [peer.name for peer in found["runtimes resnet50 batch 1, float16"].run.peers]  # type: ignore[attr-defined]
        assert peers == ([EAGER.name, *NAMES, *providers.ANCHORS] if present else NAMES)
