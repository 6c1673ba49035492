"""Nets with frozen norms of every spelling train in the interpreter: gradients, edits, compilers, DDP."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.parallel import DistributedDataParallel
from torchvision.models import resnet50
from torchvision.models.resnet import Bottleneck
from torchvision.ops import FrozenBatchNorm2d
from triton.runtime import interpreter

import resnet_fast
from resnet_fast.dispatch import record
from tests.support.frozen_norms import Attribute, Constant, EpsOutside
from tests.support.nets import Checkpointed, assert_equal
from tests.support.train_nets import (
    assert_within_budget,
    calls,
    check_step,
    exact_step,
    freeze_norms,
    imagenet,
    images,
    step,
    twin,
)

pytestmark = pytest.mark.interpret


def frozen(kind: str | type[nn.Module] = "FrozenBatchNorm2d") -> Any:
    return freeze_norms(imagenet(Bottleneck), kind)


def _affine_alone(net: Any) -> Any:
    for name, p in net.named_parameters():
        p.requires_grad = "bn" in name or "downsample.1" in name
    return net


def _without_affine(net: Any) -> Any:
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.requires_grad_(False)
    return net


SPELLINGS: dict[str, tuple[Callable[[], Any], torch.dtype]] = {
    "torchvision's FrozenBatchNorm2d": (frozen, torch.bfloat16),
    "detectron2's": (lambda: frozen(Attribute), torch.float32),
    "DETR's": (lambda: frozen(Constant), torch.float16),
    "eval mode": (lambda: frozen("eval mode"), torch.float32),
    "eval mode, affine frozen": (lambda: _without_affine(frozen("eval mode")), torch.float16),
    "eval mode, weights frozen": (lambda: _affine_alone(frozen("eval mode")), torch.float32),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_is_folded_and_as_exact_as_stock(name: str) -> None:
    """Every gradient against float64 and eager's own error."""
    build, dtype = SPELLINGS[name]
    net, (x, labels) = build(), images(2, 9, 8)
    with record.tape() as tape:
        check_step(net, x, labels, dtype)
    ran = [event for event in tape if isinstance(event, record.Ran)]
    assert len(ran) == 3 and all(event.choice.impl.backend == "triton" for event in ran)
    assert all(str(event.state).startswith("training with folded norms") for event in ran), ran


def test_a_look_alike_trains_as_stock_and_says_why() -> None:
    net, (x, labels) = frozen(EpsOutside), images(2, 9, 8)
    resnet_fast.reset_stats()
    fused = resnet_fast.accelerate(copy.deepcopy(net))
    assert_equal(step(fused, x, labels), step(net, x, labels))
    assert all(name.endswith("/stock") for name in calls())
    reasons = resnet_fast.stats()["fallbacks"]
    assert any("to compute (x - running_mean) / sqrt(running_var + eps)" in reason for reason in reasons), reasons


def _edit(norm: Any) -> None:
    with torch.no_grad():
        norm.running_var.mul_(3)


def _exchange(norm: Any) -> None:
    norm.running_mean = norm.running_mean + 0.5


def _load(norm: Any) -> None:
    norm.load_state_dict(
        {name: t + 0.25 for name, t in norm.state_dict().items() if t.is_floating_point()}, strict=False
    )


def _set_eps(norm: Any) -> None:
    norm.eps = 0.5


@pytest.mark.parametrize("kind", [Attribute, "eval mode"])
def test_buffers_that_change_between_steps_are_seen(kind: Any) -> None:
    """In place, exchanged for others, loaded; and eps."""
    net, (x, labels) = frozen(kind).double().float(), images(2, 9, 8)
    fused = twin(net)
    before = step(fused, x, labels)
    for edit in (_edit, _exchange, _load, _set_eps):
        for one in (net, fused):
            edit(one.layer1[0].bn2)
            edit(one.layer2[0].downsample[1])
        got, want = step(fused, x, labels), step(net, x, labels)
        for name, t in want.items():
            if t is not None:
                torch.testing.assert_close(got[name], t, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
        assert not torch.allclose(got["out"], before["out"], rtol=1e-3), edit  # type: ignore[arg-type]
        before = got


def test_checkpointed_stages() -> None:
    net, (x, labels) = frozen(), images(2, 9, 8)
    exact, eager = exact_step(Checkpointed(net), x, labels), step(Checkpointed(copy.deepcopy(net)), x, labels)
    resnet_fast.reset_stats()
    assert_within_budget(step(Checkpointed(twin(net)), x, labels), eager, exact)
    assert calls() == {"bottleneck/triton": 4}


def test_distributed_with_unused_parameters(tmp_path: Path) -> None:
    """A detector's net has layers without a gradient and layers that a step does not use."""
    net, (x, labels) = frozen("eval mode"), images(2, 9, 8)
    net.conv1.requires_grad_(False)
    net.unused = nn.Linear(3, 3)
    plain = step(twin(net), x, labels)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        found = step(DistributedDataParallel(twin(net), find_unused_parameters=True), x, labels)
    finally:
        dist.destroy_process_group()
    assert_equal({name.replace("module.", ""): t for name, t in found.items()}, plain)


def test_transforms_of_torch_func_differentiate_the_layers() -> None:
    """They get PyTorch's operations. With batch statistics PyTorch refuses them, as running statistics are captured."""
    block = twin(nn.Sequential(frozen().layer1[0]))
    x = torch.randn(2, 8, 4, 3, requires_grad=True)

    def loss(x: Tensor) -> Tensor:
        found: Tensor = block(x).square().sum()
        return found

    (want,) = torch.autograd.grad(loss(x), x)
    torch.testing.assert_close(torch.func.grad(loss)(x.detach()).detach(), want, rtol=1e-4, atol=1e-5)


def test_a_compiled_net_equals_an_eager_one() -> None:
    """In one graph, to the last bit."""
    torch._dynamo.reset()
    net, (x, labels) = twin(frozen("eval mode")), images(2, 9, 8)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(copy.deepcopy(net), fullgraph=True, backend=counter)
    found = step(compiled, x, labels)
    assert_equal({name.replace("_orig_mod.", ""): t for name, t in found.items()}, step(net, x, labels))
    assert counter.frame_count == 1


@pytest.mark.slow
def test_a_whole_resnet50_is_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward as a detector's backbone under autocast. The interpreter would take minutes: launches do
    nothing here, and a smaller net shows that the numbers are right."""
    torch._dynamo.reset()
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", lambda *args, **kwargs: None)
    backbone = resnet50(norm_layer=FrozenBatchNorm2d)
    backbone.avgpool = backbone.fc = nn.Identity()
    fused = resnet_fast.accelerate(backbone.train(), backend="triton")
    for part in (fused.conv1, fused.layer1):
        part.requires_grad_(False)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fused, fullgraph=True, backend=counter)
    with torch.autocast("cpu", torch.bfloat16):
        y = compiled(torch.randn(2, 3, 64, 64))
    y.float().sum().backward()
    assert counter.frame_count == 1
    ops = [str(n.target) for graph in counter.graphs for n in graph.graph.nodes]
    assert sum("resnet_fast.bottleneck" in op for op in ops) == 16 and sum("resnet_fast.stem" in op for op in ops) == 1
    trained = [name for name, p in fused.named_parameters() if p.grad is not None]
    assert {name.partition(".")[0] for name in trained} == {"layer2", "layer3", "layer4"} and len(trained) == 42
