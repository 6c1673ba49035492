"""The processes of a run: which one this is, what they agree on, and how a net is spread over them.

``torchrun`` starts the processes and gives each its rank; without it a run has one process. Control messages (stop now?
how many were wrong?) use gloo, so that they never wait for a GPU. Gradients use NCCL on GPUs.

If one process fails, the job fails: the others find the connection closed, and torchrun ends them. They hold back their
own errors for a while, so that the first error is the one reported (:func:`reported`).
"""

from __future__ import annotations

import datetime
import inspect
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import UserError

PARALLEL = ("ddp", "fsdp")
TIMEOUT = datetime.timedelta(minutes=10)
"""How long a process waits for another before it ends with an error: longer than a validation takes."""

HOLD_S = 5.0
"""How long a process other than the first holds back its own error once the first one has met the others. If all have
it, the first one reports it, and its end, which takes Python some seconds on a busy machine, ends the others."""
HOLD_START_S = 60.0
"""How long it waits for the first one before that: processes start at different times, and all read one command."""
HOLD_ELSEWHERE_S = 20.0
"""The same for an error that another process caused: the cause must be reported before its consequences."""

T = TypeVar("T")


class ElsewhereError(UserError):
    """Raised in a process that cannot continue because another one failed."""


@dataclass(frozen=True)
class World:
    """Process ``rank`` of ``size``, on ``device``."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def first(self) -> bool:
        """Whether this process writes the files and prints."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a CPU tensor over all processes in place, and return it."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Return whether ``flag`` is set in any process, the same in all of them."""
        if self.size == 1:
            return flag
        return bool(self.sum(torch.tensor([float(flag)])).item())

    def raise_first(self, error: BaseException | None) -> None:
        """Raise ``error`` if there is one, and ElsewhereError if another process has one, so that none waits for it."""
        failed = self.any(error is not None)
        if error is not None:
            raise error
        if failed:
            raise ElsewhereError("every process to go on", "an error in another process", "see that process's message")

    def shared(self, make: Callable[[], T]) -> T:
        """Call ``make`` in the first process only, and return its result in all. Its error is raised there."""
        found: list[Any] = [None]
        failure: Exception | None = None
        if self.first:
            try:
                found = [make()]
            except Exception as error:
                failure = error
        self.raise_first(failure)
        if self.size > 1:
            dist.broadcast_object_list(found)
        return found[0]

    def union(self, names: Iterable[str]) -> set[str]:
        """Return the names that any process gives."""
        if self.size == 1:
            return set(names)
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, sorted(names))
        return set().union(*found)


def _meet(store: dist.Store, rank: int, size: int) -> str:
    """Return a name that exactly the processes alive now agree on.

    torchrun's store outlives a restart and still has the addresses of the previous processes. A process that reads them
    before they are overwritten waits for dead ones (pytorch/pytorch#135712). torchrun's count of restarts differs
    between nodes. So every process leaves a new word, and the first one's is taken once it has heard all others.
    """
    word = uuid.uuid4().hex
    until = time.monotonic() + TIMEOUT.total_seconds()
    store.set(f"meet/{rank}", word)
    while time.monotonic() < until:
        if rank == 0:
            others = range(1, size)
            heard = [store.get(f"meet/{r}").decode() for r in others]
            store.set("meet/heard", " ".join([word, *heard]))
            if not others or store.check([f"meet/{word}/{r}" for r in others]):
                return word
        else:
            first, *heard = store.get("meet/heard").decode().split()
            if word in heard:
                store.set(f"meet/{first}/{rank}", "")
                return first
        time.sleep(0.02)
    raise UserError(
        f"{size} processes", f"not all of them within {TIMEOUT}", "look for the first error in their output"
    )


@contextmanager
def process_group(backend: str, **how: Any) -> Iterator[None]:
    """Set up the default process group, and take it down with no thread of it at work.

    A gloo thread that still holds a tensor while Python shuts down aborts the process, and torchrun then ends the whole
    job. So all processes meet before they leave: by then every thread has let go of what it sent before.

    Args:
        backend: as in :func:`torch.distributed.init_process_group`, which also takes ``how``.
    """
    # Its functions have the group that exists at their import as a default argument, and so keep that group and its
    # threads to the end of the process. DDP imports it, too late for us: imported here, it finds no group.
    import torch.distributed.nn.functional  # noqa: F401

    dist.init_process_group(backend, **how)
    try:
        yield
        dist.barrier()
    finally:
        dist.destroy_process_group()


@contextmanager
def world(device: str, parallel: str) -> Iterator[World]:
    """Yield this process's place, from torchrun's environment, and set up and take down the process group.

    A group that exists already is used and left as it is.

    Args:
        device: ``cpu`` or a CUDA device.
        parallel: ``ddp`` or ``fsdp``.

    Raises:
        UserError: There is no such device, or ``fsdp`` was asked for without torchrun.
    """
    kind = torch.device(device)
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if kind.type == "cuda":
        local = int(os.environ.get("LOCAL_RANK", kind.index or 0))
        if local >= torch.cuda.device_count():
            raise UserError(
                f"one of the {torch.cuda.device_count()} CUDA devices that PyTorch sees",
                f"cuda:{local}",
                "start fewer processes, or use --device cpu",
            )
        kind = torch.device("cuda", local)
        torch.cuda.set_device(kind)
    if dist.is_initialized():
        yield World(dist.get_rank(), dist.get_world_size(), kind)
        return
    if parallel == "fsdp" and "RANK" not in os.environ:
        raise UserError(
            "torchrun for --parallel fsdp",
            "a single process started without it",
            "start it as `torchrun --nproc-per-node N -m resnet_fast.cli.main train …`",
        )
    if size == 1 and parallel != "fsdp":
        yield World(device=kind)
        return
    store, rank, size = next(dist.rendezvous("env://", timeout=TIMEOUT))
    store = dist.PrefixStore(_meet(store, rank, size), store)
    backend = "cpu:gloo,cuda:nccl" if kind.type == "cuda" else "gloo"
    with process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT):
        yield World(rank, size, kind)


def spread(model: nn.Module, world: World, parallel: str, sync_bn: bool = False) -> nn.Module:
    """Return ``model`` as the step calls it: itself, wrapped in DDP, or sharded in place by FSDP2, block by block.

    Each process keeps its own buffers, which are averaged before they are used (:func:`average_buffers`). DDP would
    discard all but those of the first process.

    Args:
        model: The net on its device.
        world: The processes of the run.
        parallel: ``ddp`` or ``fsdp``.
        sync_bn: Replace BatchNorm by SyncBatchNorm in place. This comes before FSDP2, which holds on to the modules
            with parameters, and after DDP, which refuses SyncBatchNorm on the CPU.
    """
    spread: nn.Module = model
    if world.size > 1 and parallel == "ddp":
        from torch.nn.parallel import DistributedDataParallel

        ids = [world.device.index] if world.device.type == "cuda" else None
        parameters = inspect.signature(DistributedDataParallel).parameters  # torch 2.14 has another name for the same
        name = "forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers"
        own_buffers: dict[str, Any] = {name: False}
        spread = DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True, **own_buffers)
    if sync_bn:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if parallel == "fsdp":
        shard(model)
    return spread


def shard(model: nn.Module) -> None:
    """Shard ``model`` by FSDP2 in place: each residual block is a unit, the rest another one.

    Frozen parameters stay whole in each process: they have no gradient and no optimizer state that sharding could save.
    """
    from torch.distributed.fsdp import fully_shard

    frozen = {p for p in model.parameters() if not p.requires_grad}
    for name, stage in model.named_children():
        if name.startswith("layer"):
            for block in stage.children():
                if any(p.requires_grad for p in block.parameters()):
                    fully_shard(block, ignored_params=frozen)
    fully_shard(model, ignored_params=frozen)


def reshard(model: nn.Module) -> None:
    """Reshard the parameters after a forward pass without a backward pass.

    FSDP2 would keep the outermost unit whole, and averaging, which reads its parameters, would find no shards.
    """
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def average_buffers(model: nn.Module, world: World) -> None:
    """Replace floating-point buffers (running statistics) by their mean over all processes, in place.

    The running mean is linear in the batches seen, so averaging now and then gives the same as averaging in each step.
    """
    if world.size == 1:
        return
    awake = [m for m in model.modules() if m.training]  # frozen statistics are equal already, to the last bit
    buffers = [b for m in awake for b in m.buffers(recurse=False) if b.is_floating_point()]
    if not buffers:
        return
    flat = torch.cat([b.detach().flatten().cpu() for b in buffers])
    world.sum(flat).div_(world.size)
    for buffer, mean in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
        buffer.copy_(mean.view_as(buffer))


def accumulating(model: nn.Module, last: bool) -> Any:
    """Return the context of one part's forward and backward. Gradients are exchanged only in the ``last`` part."""
    from torch.distributed.fsdp import FSDPModule
    from torch.nn.parallel import DistributedDataParallel

    if isinstance(model, FSDPModule):  # has a setting instead of a context
        model.set_requires_gradient_sync(last)
    if isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    return nullcontext()


def speaks() -> bool:
    """Return whether this process prints. It is known before there is a :class:`World`."""
    return int(os.environ.get("RANK", 0)) == 0


def _is_consequence(error: BaseException) -> bool:
    """Return whether ``error`` is due to the end of another process. gloo and NCCL have no class for such errors."""
    if isinstance(error, (ElsewhereError, dist.DistError)):
        return True
    said = ("gloo/", "Connection closed by peer", "Connection reset by peer")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in said)


@contextmanager
def reported() -> Iterator[None]:
    """Under torchrun, record an error that ends this process, so that torchrun's report names the first cause.

    torchrun ends all processes as soon as one has failed, and takes the first error it sees for the cause. So an error
    that several processes may have is held back in all but the first, and one that another process caused in all.
    """
    try:
        yield
    except Exception as error:
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            raise
        consequence = _is_consequence(error)
        if consequence:
            time.sleep(HOLD_ELSEWHERE_S)
        if "TORCHELASTIC_ERROR_FILE" in os.environ:
            from torch.distributed.elastic.multiprocessing.errors import get_error_handler

            get_error_handler().record_exception(error)
        if not consequence and not speaks():
            _await_first()
        raise


def _await_first() -> None:
    """Give the first process the time to report the same error; torchrun ends this one as soon as the first has ended.

    Polls: a signal cannot end a process that waits inside of the store.
    """
    until = time.monotonic() + HOLD_START_S
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        with suppress(dist.DistError, RuntimeError):  # torchrun itself has ended
            store = next(dist.rendezvous("env://", timeout=datetime.timedelta(seconds=HOLD_START_S)))[0]
            while not store.check(["meet/0"]) and time.monotonic() < until:
                time.sleep(0.1)
    time.sleep(HOLD_S)
