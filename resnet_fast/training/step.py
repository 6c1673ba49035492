"""One optimizer step: the parts of a batch forward and backward, the check that the loss is a number, the update.

The loss of a batch is the mean over its images, however they are spread: a part of n images counts n/batch. On a GPU
nothing here waits for the device but the check, and that only for the forward pass: its answer is on its way while the
backward pass is queued, and no update is made before it is there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import UserError
from . import diagnosis
from .distributed import World, accumulating
from .loader import LEAST_PART, Part
from .optim import mixing, set_rate
from .recipe import Recipe

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class Normalise:
    """uint8 (n, C, H, W) to float32 (n, 3, H, W) on its device: scaled to 0-1, less the mean, over the deviation.

    A single channel is repeated; ``channels_last`` chooses the memory format.
    """

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device, channels_last: bool):
        shape = (1, len(mean), 1, 1)
        scale = 1 / (255 * torch.tensor(std, dtype=torch.float64).view(shape))
        shift = -torch.tensor(mean, dtype=torch.float64).view(shape) * 255 * scale
        self.scale, self.shift = scale.float().to(device), shift.float().to(device)
        self.format = torch.channels_last if channels_last else torch.contiguous_format

    def __call__(self, pixels: Tensor) -> Tensor:
        x = torch.addcmul(self.shift, pixels.float(), self.scale)
        return x.expand(-1, 3, -1, -1).contiguous(memory_format=self.format)


@dataclass
class Tally:
    """What training saw since the last reset, on the device: loss times images, wrong answers, images."""

    values: Tensor

    @staticmethod
    def empty(device: torch.device) -> Tally:
        return Tally(torch.zeros(3, dtype=torch.float64, device=device))

    def add(self, loss: Tensor, wrong: Tensor, images: int) -> None:
        self.values += torch.stack([loss.double() * images, wrong.double(), torch.full_like(loss, images).double()])

    def read(self, world: World) -> tuple[float, float, int]:
        """(mean loss, share of wrong answers, images) over all processes."""
        loss, wrong, images = world.sum(self.values.cpu().clone()).tolist()
        return loss / max(images, 1), wrong / max(images, 1), int(images)


@dataclass
class Clock:
    """Seconds spent in a step's parts, by name; host time on a GPU, where launches return at once."""

    spent: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, since: float) -> float:
        now = time.perf_counter()
        self.spent[name] = self.spent.get(name, 0.0) + now - since
        return now


class TrainingStep:
    """The training step of ``recipe`` on ``model`` (as :func:`~resnet_fast.training.distributed.spread` left it)."""

    def __init__(
        self,
        recipe: Recipe,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        normalise: Normalise,
        world: World,
        classes: int,
        ema: Any = None,
    ):
        self.recipe, self.model, self.optimizer, self.ema = recipe, model, optimizer, ema
        self.normalise, self.world = normalise, world
        self.mix = mixing(recipe, classes)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=recipe.amp == "float16")
        self.momenta = [
            (m, m.momentum) for m in model.modules() if isinstance(m, _BatchNorm) and m.momentum is not None
        ]
        self.clock = Clock()
        self.sums = Tally.empty(world.device)

    def autocast(self) -> Any:
        dtype = DTYPES.get(self.recipe.amp)
        return torch.autocast(self.world.device.type, dtype or torch.bfloat16, enabled=dtype is not None)

    def __call__(self, parts: Iterator[Part], batch: int, rate: float) -> list[str]:
        """Train on the next ``accumulate`` parts of a batch of ``batch`` images; returns names of unreadable ones.

        Raises :class:`~resnet_fast.training.diagnosis.NotFinite`, before the update, where the loss is no number.
        """
        recipe = self.recipe
        unreadable: list[str] = []
        share_of_batch = self.world.size / batch  # DDP and FSDP average over processes; the loss is a sum over them
        for number in range(recipe.accumulate):
            part = next(parts)
            since = time.perf_counter()
            unreadable += part.unreadable
            if len(part.labels) < LEAST_PART:
                got = f"{len(part.labels)} beside {', '.join(part.unreadable[:3])}"
                raise UserError(f"{LEAST_PART} readable images or more in every part of a batch", got, "mend the files")
            x, labels, targets = self.normalise(part.images), part.labels, part.labels
            if self.mix is not None:
                x, targets = self.mix(x, labels)
            since = self.clock.add("prepare", since)
            last = number == recipe.accumulate - 1
            with accumulating(self.model, last), self._statistics(number):
                with self.autocast():
                    out = self.model(x)
                loss = F.cross_entropy(out.float(), targets, label_smoothing=recipe.label_smoothing)
                planned = len(labels) + len(part.unreadable)
                finite = _asked(loss.detach())
                since = self.clock.add("forward", since)
                self.scaler.scale(loss * (planned * share_of_batch)).backward()
                since = self.clock.add("backward", since)
            self.sums.add(loss.detach(), (out.detach().argmax(1) != labels).sum(), len(labels))
            since = self.clock.add("count", since)
            if not finite():
                where = diagnosis.first_overflow(self.inner, x, self.autocast())
                raise diagnosis.NotFinite(f"the loss is {loss.item()}: {where}")
            self.clock.add("check", since)
        since = time.perf_counter()
        set_rate(self.optimizer, rate)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update_parameters(self.inner)
        self.clock.add("optimizer", since)
        return unreadable

    @contextmanager
    def _statistics(self, number: int) -> Iterator[None]:
        """BatchNorm's momentum in part ``number`` of a step.

        Its running statistics r become (1 - m) r + m * mean(b) with the parts' statistics b, as they do where every
        part is a process of its own. One part after the other with momentum m that would be (1 - m)**n r + ….
        """
        parts = self.recipe.accumulate
        if parts == 1:
            yield
            return
        for norm, momentum in self.momenta:
            norm.momentum = momentum / parts / (1 - (parts - 1 - number) * momentum / parts)
        try:
            yield
        finally:
            for norm, momentum in self.momenta:
                norm.momentum = momentum

    @property
    def inner(self) -> nn.Module:
        """The net itself, without DDP around it."""
        return getattr(self.model, "module", self.model)


def _asked(loss: Tensor) -> Callable[[], bool]:
    """Ask now whether ``loss`` is finite, hear it when the returned function is called; a GPU goes on meanwhile."""
    if loss.device.type == "cpu":
        return lambda: bool(loss.isfinite())
    answer = torch.empty((), dtype=torch.bool, pin_memory=True)
    answer.copy_(loss.isfinite(), non_blocking=True)
    there = torch.cuda.Event()
    there.record()

    def hear() -> bool:
        there.synchronize()
        return bool(answer)

    return hear
