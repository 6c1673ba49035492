"""Whole nets train on our kernels in the interpreter, with everything that users do to a net between two steps."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

import resnet_fast
from tests.support.nets import Checkpointed, assert_equal
from tests.support.train_nets import (
    all_gradients,
    assert_values_within_budget,
    assert_within_budget,
    build,
    calls,
    check_step,
    cifar,
    exact_step,
    fewest_programs,
    images,
    loss_of,
    step,
    twin,
)

pytestmark = pytest.mark.interpret

SIZES = {"bottleneck": (19, 16), "basic": (19, 16), "cifar": (8, 7)}


@pytest.fixture(autouse=True)
def _fast() -> Iterator[None]:
    resnet_fast.reset_stats()
    with fewest_programs():
        yield


@pytest.mark.parametrize(("kind", "save"), [("bottleneck", "recompute"), ("cifar", "raw")])
def test_a_step_is_as_exact_as_stock(kind: str, save: str) -> None:
    net, (x, labels) = build(kind), images(2, *SIZES[kind])
    check_step(net, x, labels, torch.float32, save)
    assert sum(calls().values()) == 3
    assert all(name.endswith("/triton") for name in calls())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "dtype", "save"),
    [
        ("bottleneck", torch.float16, "raw"),
        ("basic", torch.float16, "recompute"),
        ("cifar", torch.bfloat16, "raw"),
    ],
)
def test_steps_in_16_bit_are_as_exact_as_stock(kind: str, dtype: torch.dtype, save: str) -> None:
    """Takes the median over seven nets: rounding flips a ReLU in one net of four, ours or stock's, and every gradient
    before it jumps by up to a hundred times the rounding. The median does not."""
    ours, stock = [], []
    for seed in range(7):
        torch.manual_seed(seed)
        net, (x, labels) = build(kind), images(2, *SIZES[kind])
        got, exact = step(twin(net, save), x, labels, dtype), exact_step(net, x, labels)
        eager = step(copy.deepcopy(net), x, labels, dtype)
        assert_values_within_budget(got, eager, exact, dtype)
        report = all_gradients(got, eager, exact)
        ours.append(report.rel)
        stock.append(report.eager_rel)
    assert median(ours) <= 2 * median(stock), (ours, stock)


@pytest.mark.slow
def test_sgd_with_momentum_and_eval_between() -> None:
    """Weights, running statistics and eval outputs follow stock's over three steps."""
    stock, (x, labels) = cifar(), images()
    fused = twin(stock)
    optimizers = [torch.optim.SGD(m.parameters(), 0.05, momentum=0.9, weight_decay=1e-3) for m in (stock, fused)]
    for _ in range(3):
        for model, optimizer in zip((stock, fused), optimizers, strict=True):
            step(model.train(), x, labels)
            optimizer.step()
        with torch.no_grad():
            before = stock.eval()(x)
            torch.testing.assert_close(fused.eval()(x), before, rtol=1e-3, atol=1e-4)
    for (name, want), got in zip(stock.state_dict().items(), fused.state_dict().values(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    assert all(name.endswith("/triton") for name in calls())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_fine_tuning_with_a_frozen_stage(dtype: torch.dtype) -> None:
    net, (x, labels) = cifar(), images()
    for part in (net.conv1, net.bn1, net.layer1):
        part.requires_grad_(False).eval()
    before = {n: b.clone() for n, b in net.named_buffers()}
    fused = check_step(net, x, labels, dtype)
    for name, parameter in fused.named_parameters():
        assert (parameter.grad is None) == name.startswith(("conv1", "bn1", "layer1"))
    for name, buffer in fused.named_buffers():
        assert torch.equal(buffer, before[name]) == name.startswith(("bn1", "layer1"))
    assert all(name.endswith("/triton") for name in calls())


def test_fine_tuning_with_all_norms_in_eval() -> None:
    """gamma and beta still learn; no statistic changes."""
    net, (x, labels) = cifar(), images()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.eval()
    before = {n: b.clone() for n, b in net.named_buffers()}
    fused = check_step(net, x, labels, torch.float16)
    assert_equal(dict(fused.named_buffers()), before)
    assert all(p.grad is not None for p in fused.parameters())


def test_frozen_batch_norm() -> None:
    """Trains a detector's backbone, where norms consist of buffers."""

    def freeze(module: nn.Module) -> None:
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                frozen = FrozenBatchNorm2d(child.num_features, eps=child.eps)
                frozen.load_state_dict({k: v for k, v in child.state_dict().items() if "tracked" not in k})
                setattr(module, name, frozen)
            else:
                freeze(child)

    net, (x, labels) = cifar(), images()
    freeze(net)
    net.conv1.requires_grad_(False)
    check_step(net, x, labels, torch.float16)
    assert all(name.endswith("/triton") for name in calls())


@pytest.mark.parametrize("group", [False, True])
def test_sync_batch_norm_of_one_process(group: bool, tmp_path: Path) -> None:
    """Without a group, or alone in one, it equals a plain norm bit for bit."""
    plain, (x, labels) = cifar(), images()
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain))
    if group:
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert_equal(step(twin(synced), x, labels), step(twin(plain), x, labels))
    finally:
        if group:
            dist.destroy_process_group()
    assert all(name.endswith("/triton") for name in calls())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_images_stay_in_nhwc(layout: torch.memory_format) -> None:
    """Checks the images between stages in forward and the gradients between them in backward."""
    seen: list[Tensor] = []

    def watch(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        seen.append(out)
        out.register_hook(seen.append)

    net, (x, labels) = twin(cifar()), images(2, 8, 8)
    for stage in (net.layer1, net.layer2):
        stage.register_forward_hook(watch)
    with torch.autocast("cpu", torch.float16):
        loss_of(net(x.contiguous(memory_format=layout)), labels).backward()
    assert len(seen) == 4
    for t in seen[:3]:  # the last one in backward is that of layer1's output; layer2's comes from the pooling
        assert t.dtype == torch.float16
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in (*seen[:2], seen[3]))
    assert all(name.endswith("/triton") for name in calls())


@pytest.mark.slow
def test_grad_scaler() -> None:
    """A scale that overflows is halved and its step skipped; afterwards weights follow stock's."""
    stock, (x, labels) = cifar(), images()
    fused = twin(stock)
    scales, before = [], copy.deepcopy(stock.state_dict())
    for model in (stock, fused):
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
        for expect_step in (False, True):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = loss_of(model(x), labels)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update(None if not expect_step else 2.0**8)
            moved = not torch.equal(model.layer1[0].conv1.weight, before["layer1.0.conv1.weight"])
            assert moved == expect_step
            if not expect_step:
                scales.append(scaler.get_scale())
                scaler.update(2.0**8)
    assert scales == [2.0**23] * 2
    for got, want in zip(fused.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-3)


def test_copies_and_checkpoints_go_on_bit_for_bit() -> None:
    """A deep copy (EMA) and a state_dict in a fresh net, taken between steps, make the same next step."""
    x, labels = images()
    net = twin(cifar())
    step(net, x, labels)
    torch.optim.SGD(net.parameters(), 0.1).step()
    averaged, fresh = copy.deepcopy(net), twin(cifar(), save="recompute")
    fresh.load_state_dict(net.state_dict())
    want = step(net, x, labels)
    assert_equal(step(averaged, x, labels), want)
    assert_equal(step(fresh, x, labels), want)
    assert all(name.endswith("/triton") for name in calls())


@pytest.mark.slow
def test_eval_uses_what_training_left() -> None:
    net, (x, labels) = cifar(), images()
    fused = twin(net)
    with torch.no_grad():
        first = fused.eval()(x)
    step(fused.train(), x * 2 + 1, labels)
    stock = resnet_fast.restore(copy.deepcopy(fused)).eval()
    with torch.no_grad():
        second = fused.eval()(x)
        torch.testing.assert_close(second, stock(x), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(first, second, rtol=1e-2)


def test_activation_checkpointing() -> None:
    """Statistics are counted twice, as in stock PyTorch; ``recompute`` combines two kinds of recomputation."""
    net, (x, labels) = cifar(), images()
    got = step(Checkpointed(twin(net, save="recompute")), x, labels)
    exact = exact_step(Checkpointed(net), x, labels)
    assert_within_budget(got, step(Checkpointed(copy.deepcopy(net)), x, labels), exact)
    assert calls() == {"basic_block/triton": 4}


def test_a_hook_inside_a_block_unfuses_that_block_alone() -> None:
    seen = []
    net, (x, labels) = cifar(), images()
    net.layer2[0].conv1.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    exact, eager = exact_step(net, x, labels), step(copy.deepcopy(net), x, labels)
    fused = twin(net)
    seen.clear()
    resnet_fast.reset_stats()
    assert_within_budget(step(fused, x, labels), eager, exact)
    assert seen == [(2, 16, 4, 4)]
    assert calls() == {"conv_bn_act/triton": 1, "basic_block/triton": 1, "basic_block/stock": 1}


def test_backward_twice_through_one_graph() -> None:
    """The forward's saved tensors stay valid: a second backward adds the same gradients, bit for bit."""
    net, (x, labels) = twin(cifar(), save="recompute"), images()
    with torch.autocast("cpu", torch.float16):
        loss = loss_of(net(x), labels)
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in net.parameters()]  # type: ignore[union-attr]
    loss.backward()
    for p, grad in zip(net.parameters(), once, strict=True):
        assert_equal(p.grad, 2 * grad)
