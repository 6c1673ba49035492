"""Data parallel training and activation checkpointing."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint_sequential

import resnet_fast
from resnet_fast.blocks import fused, mapped
from resnet_fast.models import known
from tests.support import foreign_blocks as foreign
from tests.support import nets
from tests.support.nets import Checkpointed, twin


@pytest.fixture
def gloo(tmp_path: Path) -> Iterator[None]:
    """Start a process group of this process alone, over a file."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this torch has no gloo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("gloo")
@pytest.mark.parametrize("static_graph", [False, True])
def test_distributed_data_parallel(static_graph: bool) -> None:
    from torch.nn.parallel import DistributedDataParallel

    stock = nets.basic().train()
    fused = resnet_fast.accelerate(copy.deepcopy(stock))
    x = torch.randn(2, 3, 32, 32)
    wrapped = [DistributedDataParallel(m, static_graph=static_graph) for m in (stock, fused)]
    for _ in range(2):
        with resnet_fast.use_backend("reference"):
            want, got = (nets.train_step(m, x) for m in wrapped)
        nets.assert_equal(got, want)
    for m in wrapped:
        m.eval()
    nets.assert_close_to_eager(wrapped[1], stock, x)


@pytest.mark.usefixtures("gloo")
def test_fully_sharded() -> None:
    """FSDP2 swaps classes and parameters; the blocks must still be right, fused or not."""
    from torch.distributed.fsdp import fully_shard

    stock = nets.basic().train()
    fused = resnet_fast.accelerate(copy.deepcopy(stock))
    x = torch.randn(2, 3, 32, 32)
    for model in (stock, fused):
        for stage in (model.layer1, model.layer2[0], model):
            fully_shard(stage)
    outs = []
    for model in (stock, fused):
        out = model(x)
        out.square().mean().backward()
        grads = {n: p.grad.full_tensor() for n, p in model.named_parameters()}
        outs.append((out.detach(), grads, model.eval()(x).detach()))
    torch.testing.assert_close(outs[1], outs[0], rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("gloo")
def test_a_described_block_is_sharded_before_its_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """FSDP2's class cannot be built anew, and the first call compares the description with a copy of the block."""
    from torch.distributed.fsdp import fully_shard

    monkeypatch.setattr(known, "_registered", {})
    monkeypatch.setattr(fused, "KNOWN", dict(fused.KNOWN))
    resnet_fast.register_block(foreign.Plain, foreign.PLAIN)
    stock, accelerated = nets.twin(nets.randomize(foreign.Plain(3, 8)))
    mapped.fused_class(foreign.Plain, foreign.PLAIN).checked.clear()
    x = torch.randn(2, 3, 16, 16)
    out = fully_shard(accelerated.train())(x)
    nets.assert_equal(out.detach(), stock.train()(x).detach())


@pytest.mark.usefixtures("gloo")
def test_distributed_weights() -> None:
    """A net of DTensors runs the stock layers, in the stock net's layout, and says why."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_module, distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    stock, accelerated = (distribute_module(m, mesh) for m in nets.twin(nets.basic()))
    x = distribute_tensor(torch.randn(2, 3, 32, 32), mesh, [Replicate()])
    resnet_fast.reset_stats()
    with torch.no_grad():
        nets.assert_equal(accelerated(x).to_local(), stock(x).to_local())
    got = "got torch.distributed.tensor.DTensor"
    assert all("weight to be a plain parameter, " + got in text for text in resnet_fast.stats()["fallbacks"])
    assert set(resnet_fast.stats()["calls"]) == {"basic_block/stock", "stem/stock"}


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant: bool, train: bool) -> None:
    stock = nets.bottleneck().train(train)
    fused = resnet_fast.accelerate(copy.deepcopy(stock))
    x = torch.randn(2, 3, 32, 32)
    with resnet_fast.use_backend(
        "reference"
    ):  # the reentrant kind runs forward without autograd, where oneDNN would serve
        want, got = (nets.train_step(Checkpointed(m, reentrant), x) for m in (stock, fused))
    nets.assert_equal(got, want)


def test_checkpoint_sequential() -> None:
    stock = nets.basic().train()
    fused = resnet_fast.accelerate(copy.deepcopy(stock))
    x = torch.randn(2, 64, 8, 8, requires_grad=True)
    grads = []
    for model in (stock, fused):
        blocks = nn.Sequential(*model.layer1, *model.layer2)
        checkpoint_sequential(blocks, 2, x, use_reentrant=False).square().mean().backward()
        grads.append(x.grad.clone())
        x.grad = None
    nets.assert_equal(grads[1], grads[0])


def test_gradient_accumulation_and_clipping() -> None:
    norms = []
    for model in twin():
        for seed in (1, 2):
            x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
            model.train()(x).square().mean().backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
    nets.assert_equal(norms[1], norms[0])
