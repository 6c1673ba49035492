"""The layers for ``kernels``: as pure as it asks, and equal to the stock forward that they replace.

:mod:`tests.support.hub_package` puts them into models as the library does; test_kernels.py has the library do it.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet as stock

import resnet_fast
from tests.support import hub_package

TORCHVISION: dict[type[nn.Module], str] = {stock.BasicBlock: "BasicBlock", stock.Bottleneck: "Bottleneck"}
X = torch.randn(2, 16, 12, 12, generator=torch.Generator().manual_seed(0))


def net(block: Any = stock.Bottleneck) -> Any:
    """Return two blocks, the first with stride and projection."""
    width = 8 * block.expansion
    shortcut = nn.Sequential(nn.Conv2d(16, width, 1, 2, bias=False), nn.BatchNorm2d(width))
    return nn.Sequential(block(16, 8, 2, downsample=shortcut), block(width, 8)).eval()


def calls(variant: str = "torch-cuda") -> dict[str, int]:
    found: dict[str, int] = hub_package.loaded(variant).stats()["calls"]
    return found


@pytest.fixture(autouse=True)
def _counters() -> None:
    for variant in ("torch-cuda", "torch-cpu"):
        inspect.getmodule(hub_package.loaded(variant).stats).reset_stats()  # type: ignore[union-attr]


@pytest.mark.parametrize("name", hub_package.loaded().layers.__all__)
def test_a_layer_is_pure(name: str) -> None:
    """What kernels 0.17 refuses: a constructor, a member that nn.Module has not, another number of arguments."""
    layer = getattr(hub_package.loaded().layers, name)
    added = {member for member, _ in inspect.getmembers(layer)} - {m for m, _ in inspect.getmembers(nn.Module)}
    assert issubclass(layer, nn.Module) and layer.__init__ is nn.Module.__init__
    assert added == {"has_backward", "can_torch_compile"} and layer.has_backward and layer.can_torch_compile
    assert len(inspect.signature(layer.forward).parameters) == 2


@pytest.mark.parametrize("block", [stock.BasicBlock, stock.Bottleneck])
def test_inference_gives_the_bits_that_accelerate_gives(block: Any) -> None:
    """Which are compared with float64 elsewhere."""
    model = net(block)
    hub = hub_package.put(copy.deepcopy(model), TORCHVISION)
    fused = resnet_fast.accelerate(copy.deepcopy(model))
    with torch.no_grad():
        got = hub(X)
        assert torch.equal(got, fused(X))
        torch.testing.assert_close(got, model(X))
    assert sum(calls().values()) == 2 and not any(name.endswith("/stock") for name in calls())


@pytest.mark.parametrize("block", [stock.BasicBlock, stock.Bottleneck])
def test_training_gives_the_bits_of_the_stock_layers(block: Any) -> None:
    """On a CPU, where the reference runs: outputs, gradients, running statistics and counted batches."""
    model = net(block).train()
    hub = hub_package.put(copy.deepcopy(model), TORCHVISION)
    for m in (model, hub):
        m(X).square().mean().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), hub.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), hub.buffers(), strict=True))
    assert sum(n for name, n in calls().items() if name.endswith("/reference")) == 2


@pytest.mark.interpret
def test_triton_runs_inference_and_training_under_the_package_s_own_name() -> None:
    """The same kernels as ``accelerate``'s, so the same bits, from modules that were loaded beside them."""
    hub, fused = hub_package.put(net(), TORCHVISION), resnet_fast.accelerate(net())
    fused.load_state_dict(hub.state_dict())
    x = X.contiguous(memory_format=torch.channels_last)
    package = hub_package.loaded()
    for training in (False, True):
        hub.train(training), fused.train(training)
        with package.use_backend("triton"), torch.set_grad_enabled(training):
            got = hub(x)
        with resnet_fast.use_backend("triton"), torch.set_grad_enabled(training):
            want = fused(x)
        assert torch.equal(got, want)
    got.sum().backward(), want.sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(hub.parameters(), fused.parameters(), strict=True))
    assert calls() == {"bottleneck/triton": 4}


def test_two_versions_live_in_one_process() -> None:
    first, second = hub_package.loaded("torch-cuda"), hub_package.loaded("torch-cpu")
    ops = [getattr(torch.ops, name) for name in ("resnet_fast", first.__name__, second.__name__)]
    assert len({op.bottleneck.default for op in ops}) == 3
    model = hub_package.put(net(), TORCHVISION, "torch-cpu")
    with torch.no_grad():
        model(X)
    assert sum(calls("torch-cpu").values()) == 2 and not calls()


class Gated(stock.Bottleneck):
    """A Bottleneck with something more in its forward."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh()


def widened(m: nn.Module) -> nn.Module:
    """Return the net after a change of a shortcut that no class shows."""
    m[0].downsample.append(nn.Tanh())  # type: ignore[index, union-attr]
    return m


def test_a_block_that_computes_something_else_runs_its_own_forward() -> None:
    model = net(Gated)
    hub = hub_package.put(copy.deepcopy(model), {Gated: "Bottleneck"})
    with torch.no_grad():
        assert torch.equal(hub(X), model(X))
    assert calls() == {"bottleneck/stock": 2}
    reasons = hub_package.loaded().stats()["fallbacks"]
    assert reasons and all("Gated to compute what its mapping says, got a difference" in reason for reason in reasons)
    with (
        hub_package.loaded().strict(),
        pytest.raises(RuntimeError, match="strict mode: bottleneck runs its stock layers"),
    ):
        hub(X)


def test_a_shortcut_that_changes_between_calls_is_read_again() -> None:
    model = net()
    hub = hub_package.put(copy.deepcopy(model), TORCHVISION)
    with torch.no_grad():
        hub(X)
        torch.testing.assert_close(widened(hub)(X), widened(model)(X))
    assert calls()["bottleneck/stock"] == 1


def test_compiles_to_one_graph_with_the_ops_without_a_call_before() -> None:
    found: list[int] = []
    own = f"{hub_package.loaded().__name__}.bottleneck"

    def backend(graph: Any, _: Any) -> Any:
        found.append(sum(own in str(node.target) for node in graph.graph.nodes))
        return graph

    for change, fused in ((lambda m: m, 2), (widened, 1)):
        torch._dynamo.reset()
        model = change(net())
        hub = hub_package.put(copy.deepcopy(model), TORCHVISION)
        with torch.no_grad():
            torch.testing.assert_close(torch.compile(hub, backend=backend, fullgraph=True)(X), model(X))
        assert found.pop() == fused and not found


def test_a_layer_by_itself_says_what_it_is_for() -> None:
    with pytest.raises(ValueError, match=r"whose forward kernels.kernelize\(\) replaced, got the layer"):
        hub_package.loaded().layers.Bottleneck()(X)
