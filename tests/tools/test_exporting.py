"""resnet_fast/tools/exporting.py: files that other programs run without this package."""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import resnet_fast
from resnet_fast.errors import UserError
from resnet_fast.io.weight_facts import Facts
from resnet_fast.models import registry
from resnet_fast.tools import exporting
from tests.support.processes import run_python

FACTS = Facts("cifar_resnet20", 16, ("cat", "dög"), (0.5,) * 3, (0.25,) * 3, 1.0)

ALONE = """
import json, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "resnet_fast":
            raise ImportError("blocked")
sys.meta_path.insert(0, Blocked())
import torch
x = torch.load("x.pt")
"""

PT2 = (
    ALONE
    + """
extra = {"resnet_fast.json": ""}
program = torch.export.load("net.pt2", extra_files=extra)
torch.save(program.module()(x), "y.pt")
facts = json.loads(extra["resnet_fast.json"])
assert facts["classes"] == ["cat", "dög"] and facts["size"] == 16, facts
assert not any(name.startswith("resnet_fast") for name in sys.modules)
"""
)

ONNX = (
    ALONE
    + """
import onnxruntime
session = onnxruntime.InferenceSession("net.onnx", providers=["CPUExecutionProvider"])
torch.save(torch.from_numpy(session.run(None, {"input": x.numpy()})[0]), "y.pt")
facts = json.loads(session.get_modelmeta().custom_metadata_map["resnet_fast"])
assert facts["classes"] == ["cat", "dög"] and facts["size"] == 16, facts
"""
)


@pytest.fixture
def net() -> nn.Module:
    return registry.build("cifar_resnet20", num_classes=2, shortcut="A").eval()


def _alone(code: str, x: torch.Tensor, folder: Path) -> torch.Tensor:
    """Return what a process without this package computes."""
    torch.save(x, folder / "x.pt")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
    done = run_python(code, cwd=folder, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "y.pt")


@pytest.mark.slow
@pytest.mark.parametrize(("suffix", "code"), [(".pt2", PT2), (".onnx", ONNX)])
def test_a_file_runs_where_the_package_is_not(suffix: str, code: str, net: nn.Module, tmp_path: Path) -> None:
    if suffix == ".onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    accelerated = resnet_fast.accelerate(net)
    before = type(accelerated)
    checked = exporting.export(accelerated, FACTS, tmp_path / f"net{suffix}")
    assert type(accelerated) is before and checked.inputs == 4 and checked.relative <= 1e-5
    x = torch.randn(5, 3, 16, 16)  # another batch than any that was exported or checked
    with torch.no_grad():
        torch.testing.assert_close(_alone(code, x, tmp_path), resnet_fast.restore(net)(x), rtol=1e-4, atol=1e-5)
    content = (tmp_path / f"net{suffix}").read_bytes()
    assert exporting.facts_in(content, suffix) == FACTS
    assert str(Path(__file__).parents[2]).encode() not in content  # where it was made is nobody's business


def test_a_fixed_batch_and_a_second_export(net: nn.Module, tmp_path: Path) -> None:
    out = tmp_path / "net.pt2"
    real = torch.randn(3, 3, 16, 16)
    checked = exporting.export(net, FACTS, out, batch=2, inputs=real)
    assert checked.largest == 0.0 and checked.inputs == 6  # one random batch, two of the three real inputs
    with pytest.raises(Exception, match=r"(?i)shape|size|guard|expected"):
        torch.export.load(str(out)).module()(torch.randn(3, 3, 16, 16))
    exporting.export(net, FACTS, out)
    assert [p.name for p in tmp_path.iterdir()] == ["net.pt2"]
    assert torch.export.load(str(out)).module()(torch.randn(3, 3, 16, 16)).shape == (3, 2)


@pytest.mark.parametrize("name", ["w.pt2", "w.onnx", "foreign.pt2"])
def test_what_is_no_export_stays(name: str, net: nn.Module, tmp_path: Path) -> None:
    out = tmp_path / name
    torch.save(net.state_dict(), out) if name != "foreign.pt2" else torch.export.save(
        torch.export.export(nn.Linear(1, 1), (torch.zeros(1, 1),)), out
    )
    before = out.read_bytes()
    with pytest.raises(UserError, match="it would be lost"):
        exporting.export(net, FACTS, out)
    assert out.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_outputs_that_differ_leave_no_file(net: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return net(x) * 1.001

    monkeypatch.setattr(exporting, "_load_pt2", lambda path: ("torch.export", Wrong()))
    with pytest.raises(UserError, match=r"agree with the net within 0\.0001 .* got 0\.001"):
        exporting.export(net, FACTS, tmp_path / "net.pt2")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_a_full_disk_is_said_and_leaves_the_earlier_export(suffix: str, net: nn.Module, tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    exporting.export(net, FACTS, tmp_path / f"net{suffix}")
    earlier = (tmp_path / f"net{suffix}").read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(earlier) // 2, before[1]))
    try:
        with pytest.raises(UserError, match=r"expected space and permission to write .*, got File too large"):
            exporting.export(net, FACTS, tmp_path / f"net{suffix}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [earlier]


def test_weights_that_overflow_are_not_exported(net: nn.Module, tmp_path: Path) -> None:
    with torch.no_grad():
        net.fc.weight.fill_(3e38)  # type: ignore[union-attr]
    with pytest.raises(UserError, match="NaN or infinity"):
        exporting.export(net, FACTS, tmp_path / "net.pt2")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("net.pth", {}, r"ending in \.pt2 or \.onnx"),
        ("none/net.pt2", {}, "that can be written"),
        ("net.pt2", {"opset": 20}, "--opset with an .onnx file"),
        ("net.onnx", {"opset": 9}, "--opset in 18"),
        ("net.onnx", {"opset": 999}, "--opset in 18"),
    ],
)
def test_unusable_requests(name: str, options: dict[str, int], message: str, net: nn.Module, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    with pytest.raises(UserError, match=message):
        exporting.export(net, FACTS, tmp_path / name, **options)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("missing", ["onnx", "onnxscript"])
def test_a_missing_package_is_named(
    missing: str, net: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UserError, match=rf"pip install {missing}.*or export to a \.pt2 file"):
        exporting.export(net, FACTS, tmp_path / "net.onnx")


@pytest.mark.slow
def test_an_opset_is_the_one_asked_for(net: nn.Module, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    exporting.export(net, FACTS, tmp_path / "net.onnx", opset=18, batch=1)
    model = onnx.load(tmp_path / "net.onnx")
    assert [entry.version for entry in model.opset_import if entry.domain == ""] == [18]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1
    assert json.loads({e.key: e.value for e in model.metadata_props}["resnet_fast"])["model"] == "cifar_resnet20"
