"""From a recipe to its training and validation set, their class names, and what normalises the images.

Anything that can be wrong with a data set (a missing file, an empty class folder, a label out of range) is an error
here, before anything is trained.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from ... import limits
from ...errors import UserError
from ...io import images
from ..augment import Augment
from ..data_sources import DATASETS
from ..recipe import Recipe
from .samples import ArraySet, Data, Files, FileSet, InMemory, check_pixels

LEAST_FEATURES = 64
"""Inputs of the classifier, at least, in every net. Its gradients and momenta are as many as its weights."""


def load_data(recipe: Recipe) -> Data:
    """Load the data of ``recipe``.

    Raises:
        UserError: The data is missing, incomplete or too large, or does not fit the recipe.
    """
    if recipe.classes is not None:
        _check_classes(recipe.classes)
    source = DATASETS[recipe.data]
    if source.data_path == "none" and recipe.data_path:
        got = f"{recipe.data_path} with data {recipe.data}, which needs no files"
        raise UserError("data_path with data that is in files", got, "give --data folder, or leave out --data-path")
    module, _, function = source.reader.partition(":")
    found = getattr(importlib.import_module(f".{module}", __package__), function)(recipe)
    return _from_files(recipe, found) if isinstance(found, FileSet) else _from_arrays(recipe, found)


def _from_arrays(recipe: Recipe, found: ArraySet) -> Data:
    """Check the labels, draw the subset, resize once, and measure mean and deviation."""
    (x, y), (x_val, y_val) = found.train, found.val
    for where, labels in (("training", y), ("validation", y_val)):
        _check_labels(labels, recipe.classes or len(found.classes), f"{where} set of {recipe.data}")
    if recipe.subset is not None:
        chosen = _subset(recipe, recipe.subset, len(y))
        x, y = x[chosen], y[chosen]
    check_pixels(recipe, len(x) + len(x_val), x.shape[1])
    x, x_val = _resized(x, recipe.size), _resized(x_val, recipe.size)
    flat = x.transpose(0, 1).flatten(1)
    mean = tuple((c.double().mean() / 255).item() for c in flat)
    std = tuple(max(c.double().std().item() / 255, 1e-3) for c in flat)
    return Data(
        recipe.data,
        InMemory(x, y, Augment.training(recipe)),
        InMemory(x_val, y_val, Augment.none()),
        _names(found.classes, recipe),
        mean,
        std,
        True,
        found.note,
    )


def _from_files(recipe: Recipe, found: FileSet) -> Data:
    """Check the labels and draw the subset; files are normalised as ImageNet's pictures are."""
    root = Path(recipe.data_path or "")
    train = found.train
    if recipe.subset is not None:
        train = [train[i] for i in _subset(recipe, recipe.subset, len(train)).tolist()]
    labels = torch.tensor([label for _, label in found.train])
    _check_labels(labels, recipe.classes or len(found.classes), str(root))
    return Data(
        root.absolute().name,
        Files(train, Augment.training(recipe)),
        Files(found.val, Augment.validation(recipe)),
        _names(found.classes, recipe),
        images.MEAN,
        images.STD,
        False,
        "; ".join(found.notes),
    )


def _check_classes(classes: int) -> None:
    needed = 3 * 4 * LEAST_FEATURES * classes
    limits.check_memory(needed, f"a classifier of {classes:,} classes", "lower classes")


def _check_labels(labels: Tensor, classes: int, where: str) -> None:
    """Raise UserError unless every label is in 0 … classes-1."""
    if len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= classes):
        got = f"{int(labels.min())} … {int(labels.max())} in the {where}"
        raise UserError(f"labels in 0 … {classes - 1}", got, "correct the labels, or raise classes")


def _subset(recipe: Recipe, subset: int, size: int) -> Tensor:
    """Return ``subset`` of the numbers below ``size``, drawn by the recipe's seed."""
    if subset > size:
        raise UserError(f"subset <= {size}, the training images", str(subset), "correct subset")
    return torch.randperm(size, generator=torch.Generator().manual_seed(recipe.seed))[:subset]


def _resized(x: Tensor, size: int) -> Tensor:
    """Resize (N, C, H, W) uint8 to ``size`` x ``size``, antialiased, in slices to save memory."""
    if x.shape[-2:] == (size, size):
        return x
    from torchvision.transforms.v2 import functional

    return torch.cat([functional.resize(part, [size, size], antialias=True) for part in x.split(4096)])


def _names(names: Sequence[str], recipe: Recipe) -> tuple[str, ...]:
    """Return one name per class of the net; classes that the data does not have are numbered."""
    wanted = recipe.classes or len(names)
    return (*names[:wanted], *(f"class {i}" for i in range(len(names), wanted)))


def check_files(data: Data) -> None:
    """Decode every file once.

    Raises:
        UserError: Some cannot be read; the message counts them and names the first.
    """

    def complaint(path: str) -> str:
        try:
            images.read(Path(path))
        except UserError as error:
            return error.got
        return ""

    files = [path for found in (data.train, data.val) if isinstance(found, Files) for path, _ in found.files]
    with ThreadPoolExecutor() as pool:
        bad = [text for text in pool.map(complaint, files) if text]
    if bad:
        raise UserError(
            f"{len(files)} readable images",
            f"{len(bad)} that are not, such as {bad[0]}",
            "repair or remove them, or leave out --strict-data to skip and count them",
        )
