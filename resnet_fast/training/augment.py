"""Random crops and flips of single images, each a function of only the run's seed, the epoch and the image.

torchvision's transforms draw from torch's global generator. It is seeded before each image and restored after it, so
that neither the number of worker processes nor the step at which a run was resumed changes a pixel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms import v2

from ..io import images
from .data_sources import DATASETS
from .recipe import Recipe

_MIX = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio: spreads (seed, epoch, index) over the generator's seeds


def seed_of(*parts: int) -> int:
    """Return one 63-bit seed computed from several small numbers."""
    out = 0
    for part in parts:
        out = ((out ^ (part + 1)) * _MIX) & (2**64 - 1)
        out ^= out >> 29
    return out >> 1


@dataclass(frozen=True)
class Augment:
    """Applies ``transform``, uint8 (C, H, W) to (C, size, size), with a generator seeded by seed, epoch and index."""

    transform: Callable[[Tensor], Tensor] | None
    seed: int | None = None

    @staticmethod
    def none() -> Augment:
        """Return the augmentation that leaves images unchanged."""
        return Augment(None)

    @staticmethod
    def validation(recipe: Recipe) -> Augment:
        """Return torchvision's evaluation: short side to 256/224 of ``size``, then a centre crop."""
        return Augment(v2.Compose(images.centre(recipe.size)))

    @staticmethod
    def training(recipe: Recipe) -> Augment:
        """Return what ``recipe.augment`` names. For images of any size, ``none`` is a centre crop."""
        size = recipe.size
        steps: list[Callable[[Tensor], Tensor]] = []
        if recipe.augment == "imagenet":
            steps.append(v2.RandomResizedCrop(size, antialias=True))
        elif DATASETS[recipe.data].any_size:
            steps += images.centre(size, resize=1.0)
        if recipe.augment == "crop" and recipe.pad:
            steps.append(v2.RandomCrop(size, padding=recipe.pad))
        if recipe.flip and recipe.augment != "none":
            steps.append(v2.RandomHorizontalFlip())
        if not steps:
            return Augment.none()
        return Augment(v2.Compose(steps), recipe.seed)

    def __call__(self, pixels: Tensor, item: tuple[int, int]) -> Tensor:
        if self.transform is None:
            return pixels
        if self.seed is None:
            return self.transform(pixels)
        generator = torch.default_generator  # torch.manual_seed seeds every accelerator too: 150 us, measured
        before = generator.get_state()
        generator.manual_seed(seed_of(self.seed, *item))
        try:
            return self.transform(pixels)
        finally:
            generator.set_state(before)
