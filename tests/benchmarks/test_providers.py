"""benchmarks/providers.py: competitors compute the same function, keep the model, and say why they cannot run."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock

from resnet_fast.benchmarks import providers
from resnet_fast.errors import UserError
from tests.support.nets import randomize

BY_NAME = {p.name: p for p in providers.INFERENCE}


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    shortcut = nn.Sequential(nn.Conv2d(3, 8, 1, stride=2, bias=False), nn.BatchNorm2d(8))
    return randomize(BasicBlock(3, 8, stride=2, downsample=shortcut)).eval()


@pytest.mark.parametrize(
    "name",
    [
        "eager-nchw",
        "eager-nhwc",
        "folded-nhwc",
        "resnet_fast",
        "resnet_fast-invariant",
        pytest.param("compile", marks=pytest.mark.slow),
        pytest.param("onnxruntime", marks=pytest.mark.slow),
        pytest.param("openvino", marks=pytest.mark.slow),
    ],
)
def test_same_function_and_the_model_is_left_alone(net: nn.Module, name: str) -> None:
    provider, x = BY_NAME[name], torch.randn(2, 3, 9, 11)
    verdict = provider.supports(net, x.dtype, 2, "cpu")
    if not verdict:
        pytest.skip(verdict.reason)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with torch.no_grad():
        expected = net(x)
    prepared = provider.prepare(net, x)
    for _ in range(2):
        torch.testing.assert_close(prepared.call().contiguous(), expected, rtol=1e-4, atol=1e-5)
    assert prepared.precision == "float32"
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert type(net) is BasicBlock and type(net.bn1) is nn.BatchNorm2d
    assert net.conv1.weight.is_contiguous() and not net.training  # type: ignore[operator]


@pytest.mark.slow
def test_openvino_reports_the_precision_that_it_ran_in(net: nn.Module) -> None:
    provider, x = BY_NAME["openvino"], torch.randn(1, 3, 9, 9, dtype=torch.bfloat16)
    if not provider.supports(net, x.dtype, 1, "cpu"):
        pytest.skip("openvino is not installed")
    prepared = provider.prepare(net.bfloat16(), x)
    if providers.cpu_has_bf16():
        assert prepared.precision == "bfloat16" and not prepared.note
    else:
        assert prepared.precision == "float32" and "asked for bf16, ran in f32" in prepared.note


@pytest.mark.parametrize(
    ("name", "dtype", "device", "reason"),
    [
        ("onnxruntime", torch.bfloat16, "cpu", "expected float32, got bfloat16"),
        ("onnxruntime", torch.float32, "cuda", "expected device cpu, got cuda"),
        ("openvino", torch.float16, "cpu", "expected float32 or bfloat16, got float16"),
        ("openvino", torch.float32, "cuda", "expected device cpu, got cuda"),
    ],
)
def test_refusals_say_why(net: nn.Module, name: str, dtype: torch.dtype, device: str, reason: str) -> None:
    verdict = BY_NAME[name].supports(net, dtype, 1, device)
    assert not verdict and verdict.reason.startswith(reason)


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_absent_peer_says_what_to_install(net: nn.Module, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    verdict = BY_NAME[name].supports(net, torch.float32, 1, "cpu")
    assert not verdict and f"no {name}" in verdict.reason and f"; pip install {name}" in verdict.reason


@pytest.mark.parametrize("native", [True, False])
def test_emulated_bfloat16_is_noted(net: nn.Module, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "cpu_has_bf16", lambda: native)
    verdict = BY_NAME["eager-nchw"].supports(net, torch.bfloat16, 1, "cpu")
    assert verdict and ("emulated" in verdict.reason) is not native
    assert not BY_NAME["eager-nchw"].supports(net, torch.float32, 1, "cpu").reason


def test_select_keeps_the_table_order_and_refuses_unknown_names() -> None:
    assert [p.name for p in providers.select(("openvino", "eager-nhwc"))] == ["eager-nhwc", "openvino"]
    with pytest.raises(UserError, match=r"expected providers among eager-nchw, .* got 'tvm'"):
        providers.select(("eager-nchw", "tvm"))


def test_ours_reports_the_precision_that_it_ran_in(net: nn.Module) -> None:
    x = torch.randn(1, 3, 9, 9, dtype=torch.bfloat16)
    prepared = BY_NAME["resnet_fast"].prepare(net.bfloat16(), x)
    assert prepared.call().dtype == torch.bfloat16
    if "onednn" in prepared.note and not providers.cpu_has_bf16():
        assert prepared.precision == "float32" and "ran in float32" in prepared.note
    else:
        assert prepared.precision == "bfloat16" and "ran in" not in prepared.note


def test_ours_says_which_backend_ran(net: nn.Module) -> None:
    prepared = BY_NAME["resnet_fast"].prepare(net, torch.randn(1, 3, 9, 9))
    assert prepared.note.endswith(" x 1") and prepared.note.split()[0] in ("onednn", "reference")
