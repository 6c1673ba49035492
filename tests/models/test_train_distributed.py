"""Two processes train one net on batches of three and five images, against one process with all eight.

Stock SyncBatchNorm does not train on CPU tensors; the truth is the plain net in float64 in this process.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import resnet_fast
from tests.support.train_nets import cifar, exact_step, fewest_programs, images, loss_of, twin

pytestmark = [pytest.mark.interpret, pytest.mark.slow]

SPLIT = (3, 5)
RATE = 0.5
TOLERANCE = 1e-5


def problem() -> tuple[nn.Module, Tensor, Tensor]:
    """Return the net and the whole batch, the same in every process."""
    torch.manual_seed(1)
    return (cifar(), *images(sum(SPLIT)))


def share(rank: int) -> slice:
    return slice(sum(SPLIT[:rank]), sum(SPLIT[: rank + 1]))


def loss_of_share(out: Tensor, labels: Tensor) -> Tensor:
    """Return this process's part of the mean over the whole batch."""
    return loss_of(out, labels) * len(labels) / sum(SPLIT)


def synced(net: nn.Module, save: str = "raw") -> nn.Module:
    return twin(nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(net)), save)


def plain_step(net: nn.Module, x: Tensor, labels: Tensor) -> dict[str, Any]:
    """Run SyncBatchNorm without a wrapper: gradients are those of this process's part of the loss."""
    model = synced(net)
    out = model(x)
    loss_of_share(out, labels).backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    return {"out": out.detach(), "grads": grads, "buffers": dict(model.named_buffers())}


def data_parallel_step(net: nn.Module, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Return parameters and buffers after a step of SGD in DDP, which averages gradients over processes."""
    model = DistributedDataParallel(twin(net, "recompute"))
    nn.SyncBatchNorm.convert_sync_batchnorm(model.module)  # afterwards: DDP itself takes it on a GPU alone
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    (loss_of_share(model(x), labels) * len(SPLIT)).backward()
    optimizer.step()
    return model.module.state_dict()


def sharded_step(net: nn.Module, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Return the same in FSDP2, with every block and the rest sharded."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model = synced(net).to(memory_format=torch.contiguous_format)  # FSDP2 takes no other parameters
    for part in (*model.layer1, *model.layer2, model):  # type: ignore[misc]
        fully_shard(part)
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    (loss_of_share(model(x), labels) * len(SPLIT)).backward()
    optimizer.step()
    return {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in model.state_dict().items()}


def worker(rank: int, folder: str) -> None:
    """Run every step of this file in one process of two, and save the results to a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=len(SPLIT))
    net, x, labels = problem()
    mine = share(rank)
    found: dict[str, Any] = {}
    with fewest_programs():
        for one in (plain_step, data_parallel_step, sharded_step):
            resnet_fast.reset_stats()
            found[one.__name__] = one(net, x[mine], labels[mine])
            found[f"calls of {one.__name__}"] = dict(resnet_fast.stats()["calls"])
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return the results of each process."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this torch has no gloo")
    folder: Path = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, (str(folder),), nprocs=len(SPLIT))
    return [torch.load(folder / f"{rank}.pt") for rank in range(len(SPLIT))]


@pytest.fixture(scope="module")
def exact() -> dict[str, Tensor]:
    """Return the step of one process with the whole batch, in float64."""
    return exact_step(*problem())  # type: ignore[return-value]


@pytest.fixture(scope="module")
def stepped(exact: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the parameters and buffers after a step of SGD."""
    net = problem()[0].double()
    moved = {n: p.detach() - RATE * exact[f"gradient of {n}"] for n, p in net.named_parameters()}
    return moved | {n: exact[n] for n, _ in net.named_buffers()}


def assert_near(got: Tensor, want: Tensor, name: str) -> float:
    error = ((got.double() - want.double()).norm() / want.double().norm()).item()
    assert error <= TOLERANCE, f"{name}: error {error:.2e}"
    return error


def assert_fused(found: list[dict[str, Any]], what: str) -> None:
    for one in found:
        assert one[f"calls of {what}"] == {"conv_bn_act/triton": 1, "basic_block/triton": 2}


def test_sync_batch_norm_equals_the_whole_batch(found: list[dict[str, Any]], exact: dict[str, Tensor]) -> None:
    """Compares outputs, gradients summed over processes, and running statistics."""
    ranks = [one["plain_step"] for one in found]
    errors = [assert_near(torch.cat([r["out"] for r in ranks]), exact["out"], "out")]
    for name in ranks[0]["grads"]:
        total = sum(r["grads"][name] for r in ranks)
        errors.append(assert_near(total, exact[f"gradient of {name}"], name))
    for rank in ranks:
        for name, buffer in rank["buffers"].items():
            errors.append(assert_near(buffer, exact[name], name))
    print(f"largest error of SyncBatchNorm over two processes: {max(errors):.1e}")
    assert_fused(found, "plain_step")


def test_running_statistics_are_equal_in_both_processes(found: list[dict[str, Any]]) -> None:
    """They are equal bit for bit: the same numbers are merged in the same order."""
    one, other = (f["plain_step"]["buffers"] for f in found)
    for name, buffer in one.items():
        assert torch.equal(buffer, other[name]), name


@pytest.mark.parametrize("what", ["data_parallel_step", "sharded_step"])
def test_a_step_equals_one_process(what: str, found: list[dict[str, Any]], stepped: dict[str, Tensor]) -> None:
    one, other = (f[what] for f in found)
    for name, value in one.items():
        assert torch.equal(value, other[name]), name
        assert_near(value, stepped[name], name)
    assert_fused(found, what)
