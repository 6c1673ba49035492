"""accelerate and restore: what they change, keep and refuse."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resnet_fast
from resnet_fast.blocks.fused import Fused
from tests.support import nets
from tests.support.nets import twin


def ran(backend: str = "onednn") -> int:
    """Return the op calls that ``backend`` has served since the last reset."""
    return sum(n for call, n in resnet_fast.stats()["calls"].items() if call.endswith(f"/{backend}"))


def snapshot(model: nn.Module) -> list[Any]:
    """Return class, attribute names and attribute values of every module, as a copy or a pickle gets them."""
    return [(name, type(m), {k: id(v) for k, v in m.__reduce_ex__(2)[2].items()}) for name, m in model.named_modules()]


def test_it_works_in_place_and_returns_the_model() -> None:
    model = nets.basic()
    before = {n: id(p) for n, p in model.named_parameters()}
    assert resnet_fast.accelerate(model) is model
    assert {n: id(p) for n, p in model.named_parameters()} == before
    assert isinstance(model, Fused)


def test_a_fused_module_is_still_what_it_was() -> None:
    from torchvision.models import resnet

    model = resnet_fast.accelerate(nets.basic())
    assert isinstance(model, resnet.ResNet)
    assert isinstance(model.layer1[0], resnet.BasicBlock)
    assert type(model.layer1[0]).__name__ == "BasicBlock"
    assert str(model) == str(nets.basic())


@pytest.mark.parametrize("backend", ["auto", "reference", "onednn"])
@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_restore_gives_back_the_stock_model(kind: str, backend: str) -> None:
    model = getattr(nets, kind)().eval()
    before = snapshot(model)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        want = model(x)
        resnet_fast.accelerate(model, backend)(x)
        assert resnet_fast.restore(model) is model
        assert snapshot(model) == before
        nets.assert_equal(model(x), want)


def test_restore_of_a_stock_model_changes_nothing() -> None:
    model = nets.basic()
    before = snapshot(model)
    resnet_fast.restore(model)
    assert snapshot(model) == before


def test_twice_is_once() -> None:
    model = resnet_fast.accelerate(nets.basic())
    once = snapshot(model)
    assert snapshot(resnet_fast.accelerate(model)) == once


def test_calling_again_changes_the_backend() -> None:
    model = resnet_fast.accelerate(nets.basic().eval(), backend="reference")
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        resnet_fast.reset_stats()
        model(x)
        assert (ran("reference"), ran("onednn")) == (6, 0)
        resnet_fast.accelerate(model, backend="auto")
        resnet_fast.reset_stats()
        model(x)
        assert (ran("reference"), ran("onednn")) == (0, 6)
    assert not [m for m in model.modules() if "_resnet_fast_backend" in m.__dict__]


def test_state_dict_goes_either_way() -> None:
    stock, other = nets.bottleneck(), resnet_fast.accelerate(nets.bottleneck())
    want = stock.state_dict()
    assert list(other.state_dict()) == list(want)
    with torch.no_grad():
        other.conv1.weight.add_(1)
    other.load_state_dict(want, strict=True)
    nets.assert_equal(dict(other.state_dict()), dict(want))
    stock.load_state_dict(other.state_dict(), strict=True)


def test_derived_weights_are_not_in_the_state() -> None:
    model = resnet_fast.accelerate(nets.basic().eval())
    before = list(model.state_dict()), snapshot(model)
    with torch.no_grad():
        model(torch.randn(1, 3, 32, 32))
    assert (list(model.state_dict()), snapshot(model)) == before


def test_a_block_alone_can_be_accelerated() -> None:
    block = nets.basic().layer2[0].eval()
    x = torch.randn(2, 64, 9, 9)
    want = block(x)
    resnet_fast.accelerate(block)
    with resnet_fast.use_backend("reference"):
        nets.assert_equal(block(x), want)


def test_blocks_inside_any_model_are_found() -> None:
    net = nets.basic()
    model = nn.Sequential(net.layer1, nn.ModuleDict({"next": net.layer2})["next"]).eval()
    resnet_fast.accelerate(model)
    assert sum(isinstance(m, Fused) for m in model.modules()) == 3


def test_a_shared_block_is_one_block() -> None:
    block = nets.basic().layer1[0].eval()
    model = nn.Sequential(block, block)
    x = torch.randn(1, 64, 8, 8)
    want = model(x)
    with resnet_fast.use_backend("reference"):
        nets.assert_equal(resnet_fast.accelerate(model)(x), want)


def test_a_subclass_with_its_own_forward_is_left_alone() -> None:
    from torchvision.models import resnet

    class Doubled(resnet.BasicBlock):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class Net(resnet.ResNet):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    model = Net(Doubled, [1, 1, 1, 1], num_classes=10).eval()
    model.layer1[0] = resnet.BasicBlock(64, 64).eval()
    x = torch.randn(2, 3, 32, 32)
    want = model(x)
    resnet_fast.accelerate(model)
    assert [type(model), type(model.layer2[0])] == [Net, Doubled]
    assert isinstance(model.layer1[0], Fused)
    with resnet_fast.use_backend("reference"):
        nets.assert_equal(model(x), want)


@pytest.mark.parametrize("bad", [None, "resnet18", torch.ones(1)])
def test_what_is_no_module_is_refused(bad: object) -> None:
    with pytest.raises(resnet_fast.UserError, match=r"expected an nn.Module, got .*; pass the model itself"):
        resnet_fast.accelerate(bad)  # type: ignore[type-var]


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(
        resnet_fast.UserError, match=r"expected a model with blocks of .*BasicBlock.* got Sequential without"
    ):
        resnet_fast.accelerate(nn.Sequential(nn.Conv2d(3, 8, 3)))


def test_an_unknown_backend_is_refused_before_anything_changes() -> None:
    model = nets.basic()
    before = snapshot(model)
    with pytest.raises(resnet_fast.UserError, match=r"expected a backend among .*'warp'"):
        resnet_fast.accelerate(model, backend="warp")
    assert snapshot(model) == before


def test_cuda_graph_is_a_switch() -> None:
    model = nets.basic()
    before = snapshot(model)
    with pytest.raises(resnet_fast.UserError, match="cuda_graph as True or False, got 'no'"):
        resnet_fast.accelerate(model, cuda_graph="no")  # type: ignore[arg-type]
    assert snapshot(model) == before


def graphed(model: nn.Module) -> list[str]:
    return [type(m).__module__ for m in model.modules() if "_resnet_fast_cuda_graph" in m.__dict__]


def test_cuda_graphs_are_switched_on_and_off() -> None:
    model = nets.basic()
    before = snapshot(model)
    state = list(model.state_dict())
    assert graphed(resnet_fast.accelerate(model, cuda_graph=True)) == ["resnet_fast.blocks.net"]
    assert list(model.state_dict()) == state
    once = snapshot(model)
    assert snapshot(resnet_fast.accelerate(model, cuda_graph=True)) == once
    assert graphed(resnet_fast.accelerate(model)) == []
    resnet_fast.accelerate(model, cuda_graph=True)
    assert snapshot(resnet_fast.restore(model)) == before


def test_every_net_in_a_model_gets_its_graphs() -> None:
    model = nn.ModuleDict({"student": nets.basic(), "teacher": nets.bottleneck()})
    assert len(graphed(resnet_fast.accelerate(model, cuda_graph=True))) == 2


def test_cuda_graphs_need_a_whole_net() -> None:
    model = nn.Sequential(nets.basic().layer1)
    before = snapshot(model)
    with pytest.raises(
        resnet_fast.UserError,
        match=r"expected a whole net \(.*torchvision.models.resnet.ResNet.*\) in the model for cuda_graph=True, "
        r"got Sequential without any; call accelerate\(model\) without it",
    ):
        resnet_fast.accelerate(model, cuda_graph=True)
    assert snapshot(model) == before


def test_a_backend_that_cannot_serve_raises_and_does_not_degrade() -> None:
    model = resnet_fast.accelerate(nets.basic(), backend="onednn").train()
    with pytest.raises(resnet_fast.BackendError, match="backend 'onednn' cannot run"):
        model(torch.randn(2, 3, 32, 32))
    model = resnet_fast.accelerate(nets.basic(), backend="triton").eval()
    with pytest.raises(resnet_fast.BackendError, match="backend 'triton' is not available"):
        model(torch.randn(2, 3, 32, 32))


def test_the_context_wins_over_the_models_backend() -> None:
    model = resnet_fast.accelerate(nets.basic(), backend="onednn").eval()
    resnet_fast.reset_stats()
    with resnet_fast.use_backend("reference"), torch.no_grad():
        model(torch.randn(2, 3, 32, 32))
    assert ran("onednn") == 0
    assert ran("reference") == 6


def test_strict_mode_raises_where_a_block_is_not_fused() -> None:
    model = resnet_fast.accelerate(nets.basic()).eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad(), resnet_fast.strict():
        model(x)
        model.layer3[0].relu = nn.GELU()
        with pytest.raises(
            resnet_fast.BackendError, match="strict mode: basic_block runs its stock layers: expected relu"
        ):
            model(x)


def test_strict_mode_by_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    model = resnet_fast.accelerate(nets.basic()).eval()
    model.layer3[0].relu = nn.GELU()
    monkeypatch.setenv("RESNET_FAST_STRICT", "1")
    with torch.no_grad(), pytest.raises(resnet_fast.BackendError, match="strict mode"):
        model(torch.randn(1, 3, 32, 32))


def test_stats_count_the_block_that_fell_back() -> None:
    model = resnet_fast.accelerate(nets.basic()).eval()
    model.layer3[0].relu = nn.GELU()
    resnet_fast.reset_stats()
    with torch.no_grad():
        model(torch.randn(1, 3, 32, 32))
        model(torch.randn(1, 3, 32, 32))
    stats = resnet_fast.stats()
    assert stats["calls"] == {"basic_block/onednn": 8, "basic_block/stock": 2, "stem/onednn": 2}
    ((reason, count),) = stats["fallbacks"].items()
    assert count == 2
    assert "expected relu to be a plain ReLU, got GELU" in reason


def test_the_copy_of_an_accelerated_model_is_independent() -> None:
    _, fused = twin()
    other = copy.deepcopy(fused)
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        before = fused(x)
        other.layer1[0].conv1.weight.mul_(2)
        assert not torch.equal(other(x), before)
        nets.assert_equal(fused(x), before)
