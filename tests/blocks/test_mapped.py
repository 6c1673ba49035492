"""Blocks of other libraries that register_block describes: what they compute, and what a wrong description says."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resnet_fast
from resnet_fast import BlockMapping, UserError, register_block
from resnet_fast.blocks import fused, mapped
from resnet_fast.models import known
from tests.support import foreign_blocks as foreign
from tests.support import nets


@pytest.fixture(autouse=True)
def registrations(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Register the described blocks, and forget at the end what a test registers."""
    monkeypatch.setattr(known, "_registered", {})
    register_block(foreign.NormInside, foreign.NORM_INSIDE)
    register_block(foreign.NormInsideStem, foreign.NORM_INSIDE_STEM)
    register_block(foreign.Plain, foreign.PLAIN)
    register_block(foreign.Cifar, foreign.CIFAR)
    yield
    for cls in known._registered:
        fused.KNOWN.pop(cls)


def inside_net() -> nn.Module:
    return nn.Sequential(
        foreign.NormInsideStem(8), foreign.NormInside(8, 4, 16, 2), foreign.NormInside(16, 4, 16), nn.Flatten()
    )


def plain_net(**kwargs: Any) -> nn.Module:
    return nn.Sequential(foreign.Plain(3, 8), foreign.Plain(8, 16, 2, **kwargs))


def calls(model: nn.Module, x: Tensor) -> dict[str, int]:
    resnet_fast.reset_stats()
    with torch.no_grad():
        model(x)
    return resnet_fast.stats()["calls"]


NETS = [
    (inside_net, {"stem/onednn": 1, "bottleneck/onednn": 2}),
    (plain_net, {"basic_block/onednn": 2, "conv_bn_act/onednn": 1}),
    (lambda: plain_net(gate=True), {"basic_block/onednn": 1, "conv_bn_act/onednn": 3}),
    (
        lambda: nn.Sequential(foreign.Cifar(3, 8), foreign.Cifar(8, 8), foreign.Cifar(8, 8, keep=False)),
        {"basic_block/onednn": 3, "conv_bn_act/onednn": 1},
    ),
]
X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("build", "expected"), NETS, ids=["norm inside", "pooled shortcut", "gate", "no shortcut"])
def test_equal_to_the_stock_block(build: Any, expected: dict[str, int]) -> None:
    """In fp32 close to fp64, and with the reference bit for bit: outputs, gradients and running statistics."""
    stock, accelerated = nets.twin(nets.randomize(build()))
    assert list(accelerated.state_dict()) == list(stock.state_dict())
    assert calls(accelerated, X) == expected
    nets.assert_close_to_eager(accelerated, stock, X)
    with torch.no_grad(), resnet_fast.use_backend("reference"):
        nets.assert_equal(accelerated(X), stock(X))
    want = nets.train_step(stock.train(), X)
    with resnet_fast.use_backend("reference"):
        nets.assert_equal(nets.train_step(accelerated.train(), X), want)


def test_training_on_a_cpu_is_the_stock_block_bit_for_bit() -> None:
    stock, accelerated = nets.twin(nets.randomize(plain_net(gate=True)))
    nets.assert_equal(nets.train_step(accelerated.train(), X), nets.train_step(stock.train(), X))


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_stay_fused_and_restore(again: Any) -> None:
    stock, accelerated = nets.twin(inside_net())
    other = again(accelerated)
    assert calls(other, X) == NETS[0][1]
    other = resnet_fast.restore(other)
    assert [type(m) for m in other.modules()] == [type(m) for m in stock.modules()]
    with torch.no_grad():
        nets.assert_equal(other(X), stock(X))


def test_a_pickle_brings_its_mapping(monkeypatch: pytest.MonkeyPatch) -> None:
    data = pickle.dumps(nets.twin(inside_net())[1])
    monkeypatch.setattr(known, "_registered", {})
    assert calls(pickle.loads(data), X) == NETS[0][1]


def test_compilers_and_tracers() -> None:
    """torch.compile keeps the ops in one graph; export and trace record the stock layers."""
    torch._dynamo.reset()
    mapped.fused_class(foreign.Plain, foreign.PLAIN).checked.clear()
    stock, accelerated = nets.twin(nets.randomize(plain_net(gate=True)))
    ops: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        ops.extend(str(node.target).split(".")[1] for node in graph.graph.nodes if "resnet_fast" in str(node.target))
        return graph.forward

    with torch.no_grad():
        want = stock(X)
        torch.testing.assert_close(torch.compile(accelerated, backend=backend, fullgraph=True)(X), want)
        assert ops == ["basic_block", *["conv_bn_act"] * 3]
        nets.assert_equal(torch.export.export(accelerated, (X,)).module()(X), want)
        nets.assert_equal(torch.jit.trace(accelerated, X, check_trace=False)(X), want)


def test_torchscript() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 3, 1, 1), nn.BatchNorm2d(3)

        def forward(self, image: Tensor) -> Tensor:
            return torch.relu(self.norm(self.conv(image)) + image)

    register_block(Block, BlockMapping([("conv", "norm")], None, F.relu))
    stock, accelerated = nets.twin(nets.randomize(Block()))
    assert calls(accelerated, X) == {"conv_bn_act/onednn": 1}
    with torch.no_grad():
        nets.assert_equal(torch.jit.script(accelerated)(X), stock(X))
        nets.assert_equal(accelerated(image=X), accelerated(X))


@pytest.mark.parametrize("path", ["body", "body.0", "body.0.0", "body.1.1", "act", "proj", "proj.1"])
def test_a_hook_inside_sees_its_layer(path: str) -> None:
    stock, accelerated = nets.twin(nets.randomize(foreign.Plain(3, 8)))
    seen = []
    accelerated.get_submodule(path).register_forward_hook(lambda *_: seen.append(path))
    resnet_fast.reset_stats()
    with torch.no_grad():
        nets.assert_equal(accelerated(X), stock(X))
    assert seen == [path]
    (reason,) = resnet_fast.stats()["fallbacks"]
    assert "with a hook or a replaced forward; it runs unfused" in reason


def test_a_replaced_container_is_compared_again() -> None:
    class Same(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    class Doubled(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    for cls, op in ((Same, "basic_block/onednn"), (Doubled, "basic_block/stock")):
        stock, accelerated = nets.twin(nets.randomize(foreign.Plain(3, 8)))
        for model in (stock, accelerated):
            model.body[1] = cls(*model.body[1]).eval()
        assert calls(accelerated, X) == {op: 1}
        with torch.no_grad():
            torch.testing.assert_close(accelerated(X), stock(X), rtol=1e-4, atol=1e-4)


WRONG = [
    (
        {"main": [("body.0.0", "body.0.1", "body.0.2"), ("body.1.0", "body.1.2")]},
        r"Plain with the attribute body\.1\.2, got one without it",
    ),
    ({"activation": "relu"}, "with the attribute relu, got one without it"),
    ({"shortcut": ("skip.0", "skip.1")}, "with the attribute skip, got one without it"),
    ({"main": [("body.1.0", "body.1.1"), ("body.0.0", "body.0.1", "body.0.2")]}, "got .*Error"),
    ({"activation": None}, r"to compute what its mapping says, got a difference of .* in eval mode"),
    ({"main": [("body.0.0", "body.0.1"), ("body.1.0", "body.1.1")]}, "got a difference of"),
    ({"shortcut": None}, "got .*Error|got a difference"),
    (
        {"main": [("body.0.1", "body.0.0", "body.0.2"), ("body.1.0", "body.1.1")]},
        r"expected body\.0\.1 to be a convolution and body\.0\.0 its norm, got them exchanged",
    ),
    ({"shortcut": ("proj.1", "proj.0")}, r"expected proj\.1 to be a convolution and proj\.0 its norm"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_a_wrong_mapping_is_refused_by_accelerate(change: dict[str, Any], message: str) -> None:
    fields = {"main": foreign.PLAIN.main, "shortcut": foreign.PLAIN.shortcut, "activation": "act"} | change
    register_block(foreign.Plain, BlockMapping(**fields))
    model = plain_net()
    with pytest.raises(UserError, match=message):
        resnet_fast.accelerate(model)
    assert not any(isinstance(m, fused.Fused) for m in model.modules())


def test_a_variant_that_the_mapping_forgets_is_refused() -> None:
    resnet_fast.accelerate(plain_net())
    with pytest.raises(UserError, match=r"expected .*Plain to compute what its mapping says"):
        resnet_fast.accelerate(plain_net(scale=True))


@pytest.mark.parametrize(
    ("cls", "mapping", "message"),
    [
        (foreign.Plain(3, 3), foreign.PLAIN, "expected a class of modules, got an instance of Plain"),
        (int, foreign.PLAIN, "expected a class of modules"),
        (foreign.Plain, {"main": []}, "expected a resnet_fast.BlockMapping, got dict"),
        (nn.Bilinear, foreign.PLAIN, r"expected Bilinear.forward\(self, x\), got forward\(self, input1"),
    ],
)
def test_arguments_of_register_block(cls: Any, mapping: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        register_block(cls, mapping)


def test_a_class_with_a_fused_one_is_refused() -> None:
    from torchvision.models.resnet import BasicBlock

    with pytest.raises(UserError, match="expected a class without a fused one, got torchvision"):
        register_block(BasicBlock, foreign.PLAIN)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"main": []}, "at least one layer in main"),
        ({"main": ["gate"]}, "at least one layer in main"),
        ({"main": [("conv", "norm", F.gelu)]}, "an activation as a path"),
        ({"main": [("conv 1",)]}, "a path of attribute names"),
        ({"main": [("conv",), 3]}, "a step of main"),
        ({"main": [("conv",)], "shortcut": ("a", "b", "c", "d")}, "a shortcut as a path"),
        ({"main": [("conv",)], "residual": False, "activation": "act"}, "neither shortcut nor activation"),
    ],
)
def test_arguments_of_a_mapping(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        BlockMapping(**kwargs)
