"""explain(): a row per block, the truth about each, and nothing left changed behind it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resnet_fast
from resnet_fast.dispatch import select


@pytest.fixture
def model() -> nn.Module:
    from torchvision.models.resnet import BasicBlock, ResNet

    return resnet_fast.accelerate(ResNet(BasicBlock, [2, 1, 1, 1], num_classes=10).eval())


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 32, 32)


BLOCKS = ["layer1.0", "layer1.1", "layer2.0", "layer3.0", "layer4.0"]


def named(explanation: resnet_fast.Explanation) -> dict[str, Any]:
    return {row.layer: row for row in explanation.rows}


def test_a_row_for_every_block_in_order(model: nn.Module, x: Tensor) -> None:
    found = resnet_fast.explain(model, x)
    assert [row.layer for row in found.rows] == ["conv1", *BLOCKS]
    assert [row.op for row in found.rows] == ["stem"] + ["basic_block"] * 5
    assert {row.backend for row in found.rows} == {"onednn"}
    assert found.device == "cpu"
    assert found.notes == ()


def test_rows_carry_spec_counts_and_floor(model: nn.Module, x: Tensor) -> None:
    row = named(resnet_fast.explain(model, x))["layer2.0"]
    assert row.spec == "N2 8x8 64 -> 3x3/2 128 -> 3x3/1 128 + projection float32 nhwc"
    pixels = 2 * 4 * 4
    assert row.gflop == pytest.approx(2e-9 * pixels * 128 * (64 * 9 + 128 * 9 + 64))
    assert row.megabytes > 4e-6 * 128 * 9 * (64 + 128)
    assert row.floor_ms > 0
    assert row.bound


def test_every_backend_that_was_not_chosen_has_a_reason(model: nn.Module, x: Tensor) -> None:
    row = named(resnet_fast.explain(model, x))["layer1.0"]
    assert set(row.why_not) == {"reference", "triton", "cuda"}
    assert row.why_not["reference"] == "onednn ranks higher"
    assert row.why_not["cuda"].startswith("expected compiled CUDA kernels, got ")


def test_a_request_is_the_reason(model: nn.Module, x: Tensor) -> None:
    with resnet_fast.use_backend("reference"):
        row = named(resnet_fast.explain(model, x))["layer1.0"]
    assert row.backend == "reference"
    assert row.why_not["onednn"] == "backend 'reference' was asked for"


def test_an_unfused_block_is_named_with_its_reason(model: nn.Module, x: Tensor) -> None:
    model.layer3[0].relu = nn.SiLU()
    model.layer1[1].conv2.register_forward_hook(lambda *args: None)
    found = resnet_fast.explain(model, x)
    assert [row.layer for row in found.rows] == ["conv1", *BLOCKS]
    rows = named(found)
    assert rows["layer3.0"].backend == rows["layer1.1"].backend == "stock"
    assert rows["layer3.0"].why_not == {"fused": "expected relu to be a plain ReLU, got SiLU; it runs unfused"}
    assert "conv2 to be a plain Conv2d, got Conv2d with a hook" in rows["layer1.1"].why_not["fused"]
    assert "stock layers: expected relu to be a plain ReLU, got SiLU; it runs unfused  [layer3.0]" in str(found)
    assert rows["layer2.0"].backend == "onednn"


def test_an_unfused_stem_is_named(model: nn.Module, x: Tensor) -> None:
    model.maxpool = nn.AvgPool2d(2)
    row = named(resnet_fast.explain(model, x))["conv1"]
    assert row.backend == "stock"
    assert "expected maxpool to be a plain square MaxPool2d" in row.why_not["fused"]


def test_convolutions_outside_blocks_are_noted(x: Tensor) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            from torchvision.models.resnet import BasicBlock

            self.first = nn.Conv2d(3, 64, 3)
            self.block = BasicBlock(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.first(x))

    found = resnet_fast.explain(resnet_fast.accelerate(Net().eval()), x)
    assert [row.layer for row in found.rows] == ["block"]
    assert found.notes == ("stock convolutions outside fused blocks: first",)
    assert found.notes[0] in str(found)


def test_training_shows_the_fallback_and_leaves_no_trace(model: nn.Module, x: Tensor) -> None:
    model.train()
    model.fc = nn.Sequential(nn.Dropout(0.5), model.fc)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    found = resnet_fast.explain(model, x)
    assert {row.backend for row in found.rows} == {"reference"}
    assert "running statistics" in named(found)["layer1.0"].why_not["onednn"]
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_statistics_are_put_back_after_an_error(model: nn.Module, x: Tensor) -> None:
    class Failing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("on purpose")

    model.train().fc = Failing()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="on purpose"):
        resnet_fast.explain(model, x)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


def test_eval_keeps_the_packed_weights(model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers that did not change are not written, or all derived weights would be computed again."""
    from resnet_fast import derived

    with torch.no_grad():
        model(x)
    made: list[object] = []
    entry = derived._Entry
    monkeypatch.setattr(derived, "_Entry", lambda *args, **kwargs: made.append(args) or entry(*args, **kwargs))
    resnet_fast.explain(model, x)
    with torch.no_grad():
        model(x)
    assert made == []


@pytest.mark.parametrize("train", [True, False])
def test_a_model_made_in_inference_mode(train: bool, x: Tensor) -> None:
    with torch.inference_mode():
        model = resnet_fast.resnet18(num_classes=10).train(train)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        found = resnet_fast.explain(model, x)
    assert len(found.rows) == 9
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


def test_tiles_are_noted_and_shown_once(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "last_level_cache", lambda: 1)
    found = resnet_fast.explain(model, torch.randn(4, 3, 32, 32))
    assert [row.layer for row in found.rows] == ["conv1", *BLOCKS]
    assert found.notes == ("the batch of 4 ran in 4 tiles; rows show one",)
    assert found.rows[0].spec.startswith("N1 ")


def test_json_round_trip(model: nn.Module, x: Tensor) -> None:
    model.layer3[0].relu = nn.SiLU()
    found = resnet_fast.explain(model, x)
    data = json.loads(json.dumps(found.to_dict()))
    assert data["device"] == "cpu"
    assert data["ceilings"] == found.ceilings
    assert [resnet_fast.dispatch.explain.Row(**row) for row in data["rows"]] == list(found.rows)


def test_the_table_is_aligned_and_complete(model: nn.Module, x: Tensor) -> None:
    found = resnet_fast.explain(model, x)
    lines = str(found).splitlines()
    start = lines[0].index("backend")
    for line, row in zip(lines[2:8], found.rows, strict=True):
        assert line.startswith(row.layer)
        assert row.spec in line
        assert line[start:].startswith(row.backend)
    assert any(line.startswith("floors: modelled, from ") for line in lines)
    assert any(line.startswith("not reference: onednn ranks higher  [every layer]") for line in lines)


@pytest.mark.xfail(strict=True, raises=RuntimeError, reason="autocast cannot be asked about the meta device")
def test_an_input_elsewhere_is_explained_without_floors(model: nn.Module) -> None:
    model.to("meta")
    found = resnet_fast.explain(model, torch.empty(1, 3, 32, 32, device="meta"))
    assert found.device == "meta"


def test_timms_pooled_projection_is_a_row_of_its_own() -> None:
    timm = pytest.importorskip("timm")
    model = resnet_fast.accelerate(timm.create_model("resnet26d", pretrained=False).eval())
    rows = named(resnet_fast.explain(model, torch.randn(1, 3, 64, 64)))
    assert rows["layer2.0.downsample.1"].op == "conv_bn_act"
    assert rows["layer2.0"].backend == "onednn"
    assert rows["layer2.0"].spec.count("+ given") == 1
    assert rows["conv1"].backend == "stock"


def test_calls_are_not_recorded_outside(model: nn.Module, x: Tensor) -> None:
    first = resnet_fast.explain(model, x)
    with torch.no_grad():
        model(x)
    assert resnet_fast.explain(model, x) == first
