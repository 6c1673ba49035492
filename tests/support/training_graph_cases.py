"""A recorder of training steps without a GPU: it records operations on CPU tensors and executes them again.

As on a GPU, a capture executes nothing: what it computed is overwritten by NaN, and what it wrote to is put back. A
launch executes the recorded operations on the same tensors. All graphs of a recorder share memory: a launch overwrites
by NaN what the others computed, except what a backward pass needs from its forward pass, which it uses up.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, TypeVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import resnet_fast
from resnet_fast.blocks import recorder
from tests.support import graph_cases

T = TypeVar("T")


class Tape(TorchDispatchMode):
    """The operations of a capture, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []
        self.made: dict[int, Tensor] = {}  # every tensor keeps its id while it is here
        self.given: dict[int, tuple[Tensor, Tensor]] = {}  # with the values before the capture

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for t in tree_leaves((args, kwargs)):
            if isinstance(t, Tensor) and id(t) not in self.made and id(t) not in self.given:
                self.given[id(t)] = (t, t.detach().clone())
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and id(t) not in self.given:
                self.made[id(t)] = t
        self.operations.append((func, args, kwargs or {}, out))
        return out

    def undo(self) -> None:
        """Leave memory as if nothing had been executed."""
        for t, before in self.given.values():
            t.data.copy_(before)
        given = {t.untyped_storage().data_ptr() for t, _ in self.given.values()}
        self.mine = [t for t in self.made.values() if t.untyped_storage().data_ptr() not in given]
        self.overwrite()

    def overwrite(self) -> None:
        """Let another graph use the memory."""
        for t in self.mine:
            if t.is_floating_point():
                t.data.fill_(float("nan"))

    @torch.no_grad()
    @torch.autocast("cpu", enabled=False)  # a graph has the casts of its capture
    def launch(self) -> None:
        for func, args, kwargs, out in self.operations:
            returns = func._schema.returns
            if any(r.alias_info is not None and not r.alias_info.is_write for r in returns):
                continue  # a view, of memory that the other operations write
            new = func(*args, **kwargs)
            if not returns:
                continue
            pairs = [(out, new)] if len(returns) == 1 else zip(out, new, strict=True)
            for r, (before, after) in zip(returns, pairs, strict=True):
                for old, fresh in zip(tree_leaves(before), tree_leaves(after), strict=True):
                    if r.alias_info is None and isinstance(old, Tensor):
                        old.copy_(fresh)


class TapeRecorder(recorder.Recorder):
    """Record like a CUDA recorder, without the device.

    Attributes:
        broken: raised by the next captures.
        captures: the recorder of each capture.
        given_back: how often memory was given back to the device.
    """

    device_type = "cpu"
    recording: ClassVar[bool] = False
    broken: ClassVar[Exception | None] = None
    captures: ClassVar[list[TapeRecorder]] = []
    given_back: ClassVar[int] = 0
    drained: ClassVar[int] = 0

    def __init__(self, device: torch.device):
        self.device = device
        self.lock = threading.Lock()
        self.tapes: list[Tape] = []

    @staticmethod
    def is_recording() -> bool:
        return TapeRecorder.recording

    def warm_up(self, fn: Callable[[Tensor], object], x: Tensor, layout: torch.memory_format) -> Tensor:
        static = torch.empty_like(x, memory_format=layout).copy_(x)
        for _ in range(recorder.WARM_UPS):
            fn(static)
        return static

    def capture(self, fn: Callable[[Tensor], T], x: Tensor) -> tuple[Callable[[], None], T]:
        TapeRecorder.captures.append(self)
        tape = Tape()
        try:
            with tape:
                y = fn(x)
        finally:
            tape.undo()
        if TapeRecorder.broken is not None:
            raise TapeRecorder.broken
        before = next((t for t in self.tapes if not t.made.keys().isdisjoint(tape.given)), None)
        self.tapes.append(tape)

        def launch() -> None:
            for other in self.tapes:
                if other is not tape and other is not before:
                    other.overwrite()
            tape.launch()
            if before is not None:
                before.overwrite()

        return launch, y

    @contextmanager
    def turn(self) -> Iterator[None]:
        with self.lock:
            yield

    @staticmethod
    def give_back() -> None:
        TapeRecorder.given_back += 1

    def drain(self) -> None:
        TapeRecorder.drained += 1


@pytest.fixture
def tapes(monkeypatch: pytest.MonkeyPatch) -> type[TapeRecorder]:
    """Record training steps on the CPU."""
    monkeypatch.setattr(recorder, "Recorder", TapeRecorder)
    monkeypatch.setattr(recorder, "WARM_UPS", 1)
    fresh: dict[str, Any] = {"captures": [], "recording": False, "broken": None, "given_back": 0, "drained": 0}
    for name, value in fresh.items():
        monkeypatch.setattr(TapeRecorder, name, value)
    resnet_fast.reset_stats()
    return TapeRecorder


def small(dropout: float = 0.0) -> nn.Module:
    """A CIFAR net in training mode, with dropout before its classifier."""
    model = graph_cases.small().train()
    if dropout:
        model.fc = nn.Sequential(nn.Dropout(dropout), model.fc)
    return model


def pair(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Return two accelerated copies: the first runs eagerly, the second is captured."""
    eager, replayed = copy.deepcopy(model), copy.deepcopy(model)
    return resnet_fast.accelerate(eager), resnet_fast.accelerate(replayed, cuda_graph=True)


def batch(n: int) -> Tensor:
    """Return n images (n, 3, 16, 16)."""
    return graph_cases.image(n, 16)


def loss_of(y: Tensor) -> Tensor:
    """Return the loss of outputs (n, classes), each image with a label of its own."""
    return F.cross_entropy(y.float(), torch.arange(len(y)))


def train(model: nn.Module, steps: int = 3, parts: int = 1, amp: bool = False, input_grad: bool = False) -> Any:
    """Train by SGD with momentum. Return all that a user sees: losses, outputs, gradients, weights, random state."""
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    seen: list[Any] = []
    for _ in range(steps):
        for _ in range(parts):
            x = batch(4).requires_grad_(input_grad)
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                y = model(x)
            loss = loss_of(y) / parts
            loss.backward()
            seen += [loss.detach(), y.detach(), x.grad]
        seen += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        optimizer.step()
        optimizer.zero_grad()
    return seen, dict(model.state_dict()), torch.get_rng_state()
