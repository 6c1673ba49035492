"""Noise of the recipe's size, to measure speed: what a net learns from it means nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from ..recipe import Recipe
from .samples import ArraySet, check_pixels


def read_synthetic(recipe: Recipe) -> ArraySet:
    """Return ``subset`` images (by default sixteen batches) with random labels, drawn by the seed of the recipe.

    Raises:
        UserError: The images do not fit into memory.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    n, classes = recipe.subset or 16 * recipe.batch, recipe.classes or 1000
    check_pixels(recipe, n + n // 8, 3)

    def draw(count: int) -> tuple[Tensor, Tensor]:
        x = torch.randint(256, (count, 3, recipe.size, recipe.size), dtype=torch.uint8, generator=generator)
        return x, torch.randint(classes, (count,), generator=generator)

    return ArraySet(draw(n), draw(max(1, n // 8)), [str(i) for i in range(classes)], "noise")
