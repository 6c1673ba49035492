"""scikit-learn's 1,797 handwritten digits, 8x8 pixels: a data set that needs no files."""

from __future__ import annotations

import torch

from ...errors import missing_package
from ..recipe import Recipe
from .samples import ArraySet


def read_digits(recipe: Recipe) -> ArraySet:
    """Return the digits. A fifth of them, the same for every seed, is the validation set.

    Raises:
        UserError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise missing_package("scikit-learn", "which carries the digits", error, "train") from error
    found = datasets.load_digits()
    x = torch.from_numpy(found.images).mul(255 / 16).round().to(torch.uint8).unsqueeze(1)
    y = torch.from_numpy(found.target).long()
    held_out = torch.zeros(len(y), dtype=torch.bool)
    held_out[torch.randperm(len(y), generator=torch.Generator().manual_seed(0))[: len(y) // 5]] = True
    note = "a fifth of the 1,797 images is the validation set, the same for every seed"
    names = [str(i) for i in range(10)]
    return ArraySet((x[~held_out], y[~held_out]), (x[held_out], y[held_out]), names, note)
