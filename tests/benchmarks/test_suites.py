"""benchmarks/suites: each case computes what the net computes inside."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from resnet_fast.benchmarks import suites
from resnet_fast.benchmarks.suites.case import capture
from resnet_fast.models import registry


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return registry.build("resnet18").eval()


X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_models_is_the_net_itself(net: nn.Module) -> None:
    (case,) = suites.cases("models", "resnet18", net, X)
    assert case.module is net and case.x is X and case.name == "resnet18"


def test_blocks_are_one_of_each_kind_on_inner_activations(net: nn.Module) -> None:
    cases = suites.cases("blocks", "resnet18", net, X)
    assert [c.name for c in cases] == [
        f"resnet18.{b}" for b in ("layer1.0", "layer2.0", "layer2.1", "layer3.0", "layer3.1", "layer4.0", "layer4.1")
    ]
    with torch.no_grad():
        inner = net.maxpool(net.relu(net.bn1(net.conv1(X))))
        assert torch.equal(cases[0].x, inner)
        assert torch.equal(cases[1].x, net.layer1(inner))


def test_ops_are_one_of_each_shape_and_fuse_to_the_same_function(net: nn.Module) -> None:
    cases = {c.name.removeprefix("resnet18."): c for c in suites.cases("ops", "resnet18", net, X)}
    assert list(cases)[:5] == ["conv1", "layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv1", "layer2.0.conv2"]
    assert "layer2.0.downsample.0" in cases and "layer1.1.conv1" not in cases
    with torch.inference_mode():
        assert torch.equal(cases["layer1.0.conv1"].x, net.maxpool(cases["conv1"].module(X)))
        assert torch.equal(cases["layer1.0.conv2"].x, cases["layer1.0.conv1"].module(cases["layer1.0.conv1"].x))
        for name, case in cases.items():
            expected = case.module(case.x)
            assert (expected.min() < 0) == (name.endswith("conv2") or "downsample" in name)
            torch.testing.assert_close(case.module.accelerated()(case.x), expected, rtol=1e-4, atol=1e-5)  # type: ignore[operator]


def test_capture_removes_its_hooks_even_after_a_failure(net: nn.Module) -> None:
    with pytest.raises(RuntimeError):
        capture(net, torch.zeros(1, 4, 32, 32), {"fc": net.fc})
    assert not net.fc._forward_pre_hooks
