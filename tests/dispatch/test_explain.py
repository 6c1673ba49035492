"""explain: one row per block with its backend and the reasons against the others; the model stays unchanged."""

from __future__ import annotations

import json

import pytest
import torch
import torchvision
from torch import nn

import resnet_fast


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return resnet_fast.resnet18(num_classes=10)


def test_rows_of_an_eval_net(net: nn.Module) -> None:
    told = resnet_fast.explain(net.eval(), torch.randn(1, 3, 32, 32))
    layers = [r.layer for r in told.rows]
    assert len(layers) == len(set(layers)) == 9 and "layer2.0" in layers
    assert {r.backend for r in told.rows} == {"onednn"}
    for row in told.rows:
        assert row.gflop > 0 and row.floor_ms > 0 and row.bound and row.why_not["reference"] == "onednn ranks higher"
    text = str(told)
    assert all(layer in text for layer in layers) and "not cuda: expected " in text
    assert json.loads(json.dumps(told.to_dict()))["rows"][0]["backend"] == "onednn"


def test_a_training_net_is_left_as_it_was(net: nn.Module) -> None:
    net.train()
    before = {k: t.clone() for k, t in net.state_dict().items()}
    state = torch.get_rng_state()
    for graph, reason in ((True, "one whose graph is needed"), (False, "running statistics")):
        with torch.set_grad_enabled(graph):
            told = resnet_fast.explain(net, torch.randn(2, 3, 32, 32))
        assert {r.backend for r in told.rows} == {"reference"}
        assert all(reason in r.why_not["onednn"] for r in told.rows)
    torch.set_rng_state(state)
    assert net.training and all(torch.equal(t, before[k]) for k, t in net.state_dict().items())


def test_buffers_come_back_after_an_error(net: nn.Module) -> None:
    net.train()
    before = {k: t.clone() for k, t in net.state_dict().items()}
    with pytest.raises(resnet_fast.UserError):
        resnet_fast.explain(net, torch.randn(2, 5, 32, 32))
    assert all(torch.equal(t, before[k]) for k, t in net.state_dict().items())


def test_a_stock_block_gives_its_reason(net: nn.Module) -> None:
    net.eval()
    handle = net.layer1[0].conv2.register_forward_hook(lambda m, i, o: None)
    try:
        told = resnet_fast.explain(net, torch.randn(1, 3, 32, 32))
    finally:
        handle.remove()
    (row,) = [r for r in told.rows if r.backend == "stock"]
    assert row.layer == "layer1.0" and "hook" in row.why_not["fused"] and "stock layers: " in str(told)


class Detector(nn.Module):
    """Takes a list of images, as torchvision's detectors do."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, images: list[torch.Tensor]) -> torch.Tensor:
        return self.net(torch.stack(images))


def test_a_list_of_images(net: nn.Module) -> None:
    detector = Detector(net.eval())
    told = resnet_fast.explain(detector, list(torch.randn(2, 3, 32, 32)))
    assert told.device == "cpu" and len(told.rows) == 9 and "net.layer2.0" in {r.layer for r in told.rows}


class Training(Detector):
    """Needs targets, as detectors in training do."""

    def forward(self, images: list[torch.Tensor], targets: list[int]) -> torch.Tensor:
        return super().forward(images)[range(len(targets)), targets].sum()


def test_further_arguments_reach_the_model(net: nn.Module) -> None:
    told = resnet_fast.explain(Training(net.train()), list(torch.randn(2, 3, 32, 32)), [0, 1])
    assert len(told.rows) == 9 and all("grad" in row.spec for row in told.rows)


def test_a_stock_net_is_told_to_be_accelerated() -> None:
    told = resnet_fast.explain(torchvision.models.resnet18(weights=None).eval(), torch.randn(1, 3, 32, 32))
    assert not told.rows and "accelerate(model)" in str(told)


def test_what_holds_no_tensor_is_refused(net: nn.Module) -> None:
    with pytest.raises(resnet_fast.UserError, match=r"an nn\.Module, got Tensor"):
        resnet_fast.explain(torch.randn(1, 3, 32, 32), net)  # type: ignore[arg-type]
    with pytest.raises(
        resnet_fast.UserError, match="expected a tensor, or a structure of tensors, got str without any"
    ):
        resnet_fast.explain(net, "cat.jpg")
