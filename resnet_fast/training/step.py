"""One optimizer step: forward and backward of each part of a batch, the check that the loss is finite, the update.

The loss of a batch is the mean over its images, however they are spread: a part of n images counts n/batch. On a GPU
only the check waits for the device, and only for the forward pass: its answer is copied while the backward pass is
queued, and the update comes after it.
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
    """Converts uint8 (n, C, H, W) to float32 (n, 3, H, W): scales to 0-1, subtracts the mean, divides by the deviation.

    A single channel is repeated three times.

    Args:
        mean: Per channel, of pixels scaled to 0-1.
        std: Per channel, of pixels scaled to 0-1.
        device: Where the images are.
        channels_last: The memory format of the result.
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
    """Sums since the last reset, float64 (3) on the device: loss times images, wrong answers, images."""

    values: Tensor

    @staticmethod
    def empty(device: torch.device) -> Tally:
        return Tally(torch.zeros(3, dtype=torch.float64, device=device))

    def add(self, loss: Tensor, wrong: Tensor, images: int) -> None:
        self.values += torch.stack([loss.double() * images, wrong.double(), torch.full_like(loss, images).double()])

    def read(self, world: World) -> tuple[float, float, int]:
        """Return (mean loss, share of wrong answers, images) over all processes."""
        loss, wrong, images = world.sum(self.values.cpu().clone()).tolist()
        return loss / max(images, 1), wrong / max(images, 1), int(images)


@dataclass
class Clock:
    """Seconds spent in the parts of a step, by name. On a GPU it is the time of the host: launches return at once."""

    spent: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, since: float) -> float:
        now = time.perf_counter()
        self.spent[name] = self.spent.get(name, 0.0) + now - since
        return now


class TrainingStep:
    """The training step of ``recipe`` on ``model``, which :func:`~resnet_fast.training.distributed.spread` returned."""

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
        """Train on the next ``accumulate`` parts.

        Args:
            parts: The parts of this process.
            batch: Images of the whole batch, over all processes.
            rate: The learning rate.

        Returns:
            Names of images that could not be read.

        Raises:
            resnet_fast.training.diagnosis.NotFinite: The loss is not finite. The update is not made.
            UserError: A part has too few readable images.
        """
        recipe = self.recipe
        unreadable: list[str] = []
        share_of_batch = self.world.size / batch  # DDP and FSDP average over processes; the loss is a sum over them
        for number in range(recipe.accumulate):
            part = next(parts)
            since = time.perf_counter()
            unreadable += part.unreadable
            if len(part.labels) < LEAST_PART:
                got = f"{len(part.labels)} without {', '.join(part.unreadable[:3])}"
                raise UserError(
                    f"{LEAST_PART} readable images or more in every part of a batch", got, "repair the files"
                )
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
                finite = _start_check(loss.detach())
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
        """Set the momentum of BatchNorm for part ``number`` of a step.

        The running statistics r become (1 - m) r + m * mean(b), where b are the statistics of the parts, as if each
        part were a process. With momentum m for each part in turn they would become (1 - m)**n r + ….
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
        """The net without DDP around it."""
        return getattr(self.model, "module", self.model)


def _start_check(loss: Tensor) -> Callable[[], bool]:
    """Start to check whether ``loss`` is finite. The returned function waits for the answer; a GPU works meanwhile."""
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
