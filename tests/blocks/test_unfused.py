"""Blocks of classes that accelerate does not know: named in full, counted at each call, refused in strict mode."""

from __future__ import annotations

import copy
import logging
import pickle

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet as stock

import resnet_fast
from resnet_fast.blocks import unfused
from resnet_fast.blocks.fused import Fused

timm = pytest.importorskip("timm")


class Doubled(stock.BasicBlock):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def net() -> nn.Module:
    model = stock.ResNet(stock.BasicBlock, [2, 1, 1, 1], num_classes=10).eval()
    model.layer1[0] = Doubled(64, 64).eval()
    model.layer1.append(Doubled(64, 64).eval())
    return model


def test_a_block_in_torchscript_is_named() -> None:
    model = stock.ResNet(stock.BasicBlock, [1, 1, 1, 1], num_classes=10).eval()
    model.layer1 = torch.jit.script(model.layer1)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        want = model(x)
        resnet_fast.accelerate(model)
        resnet_fast.reset_stats()
        torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-4)
    (reason,) = resnet_fast.stats()["fallbacks"]
    assert reason.endswith("expected a block in Python, got one that TorchScript compiled, BasicBlock; it runs unfused")


def test_a_model_whose_blocks_are_all_unknown_names_them() -> None:
    with pytest.raises(resnet_fast.UserError, match=rf"describe its blocks \({Doubled.__module__}\.Doubled\) with"):
        resnet_fast.accelerate(nn.Sequential(Doubled(8, 8), Doubled(8, 8)))


REASON = (
    f"expected torchvision.models.resnet.BasicBlock itself, got its subclass {Doubled.__module__}.Doubled; "
    "it runs unfused"
)
LOGGED = f"2 blocks of {Doubled.__module__}.Doubled are not fused: {REASON}"


def calls() -> dict[str, int]:
    return resnet_fast.stats()["calls"]


def test_a_subclass_is_logged_once_counted_and_explained(caplog: pytest.LogCaptureFixture) -> None:
    resnet_fast.reset_stats()
    x = torch.randn(2, 3, 32, 32)
    with caplog.at_level(logging.WARNING, "resnet_fast"), torch.no_grad():
        model = resnet_fast.accelerate(net())
        assert resnet_fast.stats()["fallbacks"] == {LOGGED: 1}
        model(x)
        model(x)
    assert [r.message for r in caplog.records] == [LOGGED]
    assert calls()["basic_block/stock"] == 4
    assert resnet_fast.stats()["fallbacks"][f"basic_block runs its stock layers: {REASON}"] == 4
    told = resnet_fast.explain(model, x)
    assert [(r.layer, r.op) for r in told.rows if r.backend == "stock"] == [
        ("layer1.0", "basic_block"),
        ("layer1.2", "basic_block"),
    ]
    assert f"stock layers: {REASON}  [layer1.0, layer1.2]" in str(told)
    assert "stock convolutions outside fused blocks" not in str(told)
    assert [r.layer for r in told.rows][:3] == ["conv1", "layer1.0", "layer1.1"]


def test_strict_mode_raises_at_the_call_and_at_accelerate() -> None:
    model = net()
    classes = [type(m) for m in model.modules()]
    with resnet_fast.strict(), pytest.raises(resnet_fast.BackendError, match=r"2 blocks of .*Doubled are not fused"):
        resnet_fast.accelerate(model)
    assert [type(m) for m in model.modules()] == classes
    resnet_fast.accelerate(model)
    with torch.no_grad(), resnet_fast.strict(), pytest.raises(resnet_fast.BackendError, match="got its subclass"):
        model(torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_counts_too(again) -> None:  # type: ignore[no-untyped-def]
    model = again(resnet_fast.accelerate(net()))
    resnet_fast.reset_stats()
    with torch.no_grad():
        model(torch.randn(1, 3, 32, 32))
    assert calls()["basic_block/stock"] == 2


def test_tracers_and_compilers_are_not_counted() -> None:
    model = resnet_fast.accelerate(net())
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        model(x)
        resnet_fast.reset_stats()
        torch.jit.trace(model, x, check_trace=False)  # which would call the model once more
        torch.fx.symbolic_trace(model)
        torch.compile(model, backend="eager")(x)
    assert resnet_fast.stats()["fallbacks"] == {}


def test_a_block_that_came_later_asks_for_accelerate() -> None:
    model = resnet_fast.accelerate(stock.ResNet(stock.BasicBlock, [1, 1, 1, 1]).eval())
    model.layer1.append(stock.BasicBlock(64, 64).eval())
    (late,) = unfused.find(model)
    assert late.reason == (
        "expected a block that accelerate() changed, got a torchvision.models.resnet.BasicBlock added later; "
        "call accelerate() again"
    )
    assert unfused.find(resnet_fast.accelerate(model)) == []


@pytest.mark.parametrize(
    ("name", "kind", "blocks"),
    [
        ("skresnet18", "timm.models.sknet.SelectiveKernelBasic", 8),
        ("res2net50_26w_4s", "timm.models.res2net.Bottle2neck", 16),
        ("resnest14d", "timm.models.resnest.ResNestBottleneck", 4),
    ],
)
def test_other_blocks_in_timms_net(name: str, kind: str, blocks: int) -> None:
    plain = timm.create_model(name, pretrained=False, num_classes=10).eval()
    resnet_fast.reset_stats()
    model = resnet_fast.accelerate(copy.deepcopy(plain))
    named = "a residual block of a library that accelerate() knows, or one that register_block() describes"
    expected = f"expected {named}, got {kind}; it runs unfused"
    assert resnet_fast.stats()["fallbacks"] == {f"{blocks} blocks of {kind} are not fused: {expected}": 1}
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-4)
        assert calls()["block/stock"] == blocks
        with resnet_fast.strict(), pytest.raises(resnet_fast.BackendError, match=kind):
            model(x)
    rows = resnet_fast.explain(model, x).rows
    assert sum(r.backend == "stock" and kind in r.why_not["fused"] for r in rows) == blocks


def test_what_is_no_residual_block_is_not_named() -> None:
    from torchvision.models.detection import fasterrcnn_resnet50_fpn

    model = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=4)
    resnet_fast.reset_stats()
    resnet_fast.accelerate(model)
    assert resnet_fast.stats()["fallbacks"] == {} and unfused.find(model) == []
    assert sum(isinstance(m, Fused) for m in model.modules()) == 16
