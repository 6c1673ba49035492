"""Frozen norms of any class: recognised by their buffers and by what they compute."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet
from torchvision.ops.misc import FrozenBatchNorm2d

import resnet_fast
from resnet_fast.blocks import frozen_norms
from tests.support import nets
from tests.support.frozen_norms import Attribute, Constant, EpsOutside


class NoEps(Constant):
    def scale(self) -> Tensor:
        return self.weight * self.running_var.rsqrt()


class NoMean(Constant):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale()[:, None, None] + self.bias[:, None, None]


class OtherInTraining(Constant):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2 if self.training else 1)


class OtherUnderAutograd(Attribute):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).half().to(x.dtype) if x.requires_grad else super().forward(x)


class Raises(Constant):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("not on a CPU")


def net(norm: Any) -> nn.Module:
    """Return two small blocks, the second with a projection."""
    project = nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), norm(16))
    blocks = resnet.BasicBlock(8, 8, norm_layer=norm), resnet.BasicBlock(8, 16, 2, project, norm_layer=norm)
    return nets.randomize(nn.Sequential(*blocks)).eval()


X = torch.randn(2, 8, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("norm", [Constant, Attribute])
def test_a_frozen_norm_of_another_class_is_fused(norm: Any) -> None:
    """Every block is fused in eval, close to fp64; gradients are the stock layers' on a CPU, bit for bit."""
    stock, accelerated = nets.twin(net(norm))
    with torch.no_grad(), resnet_fast.strict():
        accelerated(X)
    nets.assert_close_to_eager(accelerated, stock, X)
    nets.assert_equal(nets.train_step(accelerated.train(), X), nets.train_step(stock.train(), X))
    expected = nets.train_step(stock, X)
    with resnet_fast.use_backend("reference"):
        torch.testing.assert_close(nets.train_step(accelerated, X), expected, rtol=1e-3, atol=1e-4)


def test_eps_comes_from_the_code_or_from_the_instance() -> None:
    norms = [Constant(4), NoEps(4), Attribute(4, 1e-3), Attribute(4, 1e-2)]
    assert all(map(frozen_norms.is_frozen, norms))
    assert list(map(frozen_norms.eps_of, norms)) == [1e-5, 0.0, 1e-3, 1e-2]


@pytest.mark.parametrize("norm", [EpsOutside, NoMean, OtherInTraining, OtherUnderAutograd, Raises])
def test_a_look_alike_is_refused_with_a_sentence(norm: Any) -> None:
    stock, accelerated = nets.twin(net(norm))
    resnet_fast.reset_stats()
    if norm is not Raises:
        with torch.no_grad():
            nets.assert_equal(accelerated(X), stock(X))
        (reason,) = {text.partition(": ")[2] for text in resnet_fast.stats()["fallbacks"]}
    else:
        reason = accelerated[0].unfusable()
    got = (
        f"got RuntimeError from {__name__}.Raises"
        if norm is Raises
        else f"got another result from {norm.__module__}.{norm.__name__}"
    )
    assert reason.startswith("expected bn1 to ") and reason.endswith(f"{got}; it runs unfused")


def test_a_replaced_forward_is_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    _, accelerated = nets.twin(net(Constant))
    assert not accelerated[0].unfusable()
    monkeypatch.setattr(Constant, "forward", lambda self, x: x)
    assert "expected bn1 to run the forward of its class, got another" in accelerated[0].unfusable()


def test_looking_changes_nothing() -> None:
    norm = copy.deepcopy(Attribute(4)).eval()
    norm.register_forward_hook(lambda *_: pytest.fail("called"))
    before, state = torch.get_rng_state(), {name: t.clone() for name, t in norm.state_dict().items()}
    frozen_norms._known.pop(Attribute, None)
    assert frozen_norms.is_frozen(norm)
    nets.assert_equal(dict(norm.state_dict()), state)
    nets.assert_equal(torch.get_rng_state(), before)
    assert not norm.training and norm.eps == 1e-3


def write(norm: Any) -> None:
    norm.running_var.mul_(3)
    norm.bias.add_(1)


def negate(norm: Any) -> None:
    norm.running_var[2].neg_()


def replace(norm: Any) -> None:
    norm.running_mean = torch.linspace(-1, 1, 8)


def without_memory(norm: Any) -> None:
    norm.to("meta")


def of_another_size(norm: Any) -> None:
    norm.weight = torch.ones(3)


@pytest.mark.parametrize("edit", [write, negate, replace])
@pytest.mark.parametrize("norm", [Constant, Attribute, FrozenBatchNorm2d])
def test_edited_buffers_count_from_the_next_call(norm: Any, edit: Any) -> None:
    stock, accelerated = nets.twin(net(norm))
    with torch.no_grad():
        before = accelerated(X)
        for model in (stock, accelerated):
            edit(model[0].bn1)
        torch.testing.assert_close(accelerated(X), stock(X), rtol=1e-4, atol=1e-4, equal_nan=True)
    assert not torch.equal(before, accelerated(X))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_buffers_moved_with_the_model(dtype: torch.dtype) -> None:
    stock, accelerated = nets.twin(net(Constant))
    with torch.no_grad():
        accelerated(X)
    nets.assert_close_to_eager(accelerated.to(dtype), stock.to(dtype), X.to(dtype))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda norm: norm.double(), r"BatchNorm tensors of one dtype.*got float64"),
        (without_memory, r"BatchNorm weight on cpu, where x is, got .*meta"),
        (of_another_size, r"BatchNorm weight of shape \(8,\), got \(3,\)"),
    ],
)
def test_a_norm_moved_by_itself_is_named(edit: Any, message: str) -> None:
    accelerated = nets.twin(net(FrozenBatchNorm2d))[1]
    edit(accelerated[0].bn1)
    with torch.no_grad(), pytest.raises(resnet_fast.UserError, match=message):
        accelerated(X)


@pytest.mark.parametrize(
    "other", [nn.BatchNorm2d(3), nn.Identity(), nn.Conv2d(3, 3, 1), None, F.relu, FrozenBatchNorm2d]
)
def test_other_layers_are_no_frozen_norms(other: Any) -> None:
    assert not frozen_norms.is_frozen(other)


def test_inside_a_compiler_as_outside() -> None:
    torch._dynamo.reset()
    stock, accelerated = nets.twin(net(Constant))
    ops: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        ops.extend(str(node.target) for node in graph.graph.nodes if "resnet_fast" in str(node.target))
        return graph.forward

    with torch.no_grad():
        torch.testing.assert_close(
            torch.compile(accelerated, backend=backend, fullgraph=True)(X), stock(X), rtol=1e-4, atol=1e-5
        )
    assert len(ops) == 2
