"""CIFAR-10 and CIFAR-100: 60,000 colour pictures, 32x32 pixels, in torchvision's own files."""

from __future__ import annotations

from pathlib import Path

from ..recipe import Recipe
from . import arrays
from .samples import ArraySet


def read_cifar10(recipe: Recipe) -> ArraySet:
    """Read ``data_path/cifar-10-batches-py``; see :func:`~resnet_fast.training.datasets.arrays.read_cifar`."""
    return _read(recipe, hundred=False)


def read_cifar100(recipe: Recipe) -> ArraySet:
    """Read ``data_path/cifar-100-python``; see :func:`~resnet_fast.training.datasets.arrays.read_cifar`."""
    return _read(recipe, hundred=True)


def _read(recipe: Recipe, hundred: bool) -> ArraySet:
    root = Path(recipe.data_path or "data")
    train, val, names = arrays.read_cifar(root, hundred=hundred)
    return ArraySet(train, val, names, f"from {root}")
