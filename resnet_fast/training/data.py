"""Where images come from: a training and a validation set, their classes, and what normalises them.

Every source yields unsigned 8-bit pixels; normalisation runs on the device, on whole batches, so that a quarter of the
bytes crosses to it. What can be wrong with a data set (a missing file, an empty class folder, a label out of range) is
an error here, before anything is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .. import limits
from ..errors import UserError, missing_package
from ..io import images
from ..io.weight_facts import Facts
from . import arrays, folders
from .augment import Augment
from .recipe import Recipe

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts its four files."""

Item = tuple[int, int]
"""(epoch, index): with the epoch in it, an augmented image is a function of the item and the seed alone."""


@dataclass(frozen=True)
class Sample:
    """One image, uint8 (C, H, W), or None where ``name`` could not be read, and its class."""

    pixels: Tensor | None
    label: int
    name: str = ""


class InMemory(Dataset[Sample]):
    """Images (N, C, H, W) uint8 and labels (N) int64 that are already here."""

    def __init__(self, pixels: Tensor, labels: Tensor, augment: Augment):
        self.pixels, self.labels, self.augment = pixels, labels, augment

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, item: Item) -> Sample:
        _, index = item
        return Sample(self.augment(self.pixels[index], item), int(self.labels[index]))


class Files(Dataset[Sample]):
    """Image files and their classes, decoded when asked for. A file that cannot be read is a sample without pixels."""

    def __init__(self, files: Sequence[tuple[str, int]], augment: Augment):
        self.files, self.augment = list(files), augment

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, item: Item) -> Sample:
        path, label = self.files[item[1]]
        try:
            pixels = images.read(Path(path)).pixels
        except UserError as error:
            return Sample(None, label, error.got)
        return Sample(self.augment(pixels, item), label, path)


@dataclass(frozen=True)
class Data:
    """A training and a validation set. ``mean`` and ``std`` are per channel, of pixels scaled to 0-1."""

    name: str
    train: InMemory | Files
    val: InMemory | Files
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    in_memory: bool
    note: str = ""

    def summary(self) -> str:
        """What is in it, in one line: a folder taken for a class by mistake shows here."""
        shown = ", ".join(self.classes[:5]) + (", …" if len(self.classes) > 5 else "")
        sizes = f"{self.train_size:,} training and {self.val_size:,} validation images"
        return f"{self.name}: {sizes} of {len(self.classes):,} classes ({shown})"

    @property
    def train_size(self) -> int:
        return len(self.train)

    @property
    def val_size(self) -> int:
        return len(self.val)

    def facts(self, recipe: Recipe) -> Facts:
        """What the weights of a run on this data say of themselves: the images are as the validation set's."""
        return Facts(
            model=recipe.model,
            size=recipe.size,
            classes=self.classes,
            mean=self.mean,
            std=self.std,
            resize=1.0 if self.in_memory else images.RESIZE,
            shortcut=recipe.shortcut,
            stride_in_1x1=recipe.stride_in_1x1,
            amp=recipe.amp,
            data=recipe.data,
        )


WITHOUT_FILES = ("digits", "synthetic")
"""Data that a folder cannot be given for."""


def load(recipe: Recipe) -> Data:
    """The data of ``recipe``. Raises UserError for whatever would stop or spoil the run later."""
    if recipe.classes is not None:
        _check_classes(recipe.classes)
    if recipe.data == "folder":
        return _folder(recipe)
    if recipe.data in WITHOUT_FILES and recipe.data_path:
        got = f"{recipe.data_path} with data {recipe.data}, which needs no files"
        raise UserError("data_path with data that lie in files", got, "give --data folder, or leave out --data-path")
    loaded = {
        "digits": _digits,
        "fashion-mnist": _fashion_mnist,
        "cifar10": _cifar,
        "cifar100": _cifar,
        "synthetic": _synthetic,
    }[recipe.data](recipe)
    return _in_memory(recipe, *loaded)


def _in_memory(recipe: Recipe, train: Any, val: Any, classes: Sequence[str], note: str) -> Data:
    """Check, choose the subset, resize once, and measure what normalises."""
    (x, y), (x_val, y_val) = train, val
    for where, labels in (("training", y), ("validation", y_val)):
        check_labels(labels, recipe.classes or len(classes), f"{where} set of {recipe.data}")
    if recipe.subset is not None:
        chosen = _subset(recipe, recipe.subset, len(y))
        x, y = x[chosen], y[chosen]
    _check_pixels(recipe, len(x) + len(x_val), x.shape[1])
    x, x_val = _resized(x, recipe.size), _resized(x_val, recipe.size)
    flat = x.transpose(0, 1).flatten(1)
    mean = tuple((c.double().mean() / 255).item() for c in flat)
    std = tuple(max(c.double().std().item() / 255, 1e-3) for c in flat)
    return Data(
        recipe.data,
        InMemory(x, y, Augment.training(recipe)),
        InMemory(x_val, y_val, Augment.none()),
        _named(classes, recipe),
        mean,
        std,
        True,
        note,
    )


LEAST_FEATURES = 64
"""What the classifier of any net sees of an image; its weights, their gradients and their momenta are as many each."""


def _check_classes(classes: int) -> None:
    needed = 3 * 4 * LEAST_FEATURES * classes
    limits.check_memory(needed, f"a classifier of {classes:,} classes", "lower classes")


def _check_pixels(recipe: Recipe, count: int, channels: int) -> None:
    """UserError unless ``count`` images of the recipe's size fit into memory, twice while they are put together."""
    needed = 2 * count * channels * recipe.size**2
    what = f"{count:,} images of {recipe.size}x{recipe.size}"
    limits.check_memory(needed, what, "lower size, or batch and subset")


def check_labels(labels: Tensor, classes: int, where: str) -> None:
    """UserError unless every label is in 0 … classes-1."""
    if len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= classes):
        got = f"{int(labels.min())} … {int(labels.max())} in the {where}"
        raise UserError(f"labels in 0 … {classes - 1}", got, "correct the labels, or raise classes")


def _subset(recipe: Recipe, subset: int, size: int) -> Tensor:
    """``subset`` of the numbers below ``size``, drawn by the recipe's seed."""
    if subset > size:
        raise UserError(f"subset <= {size}, the training images", str(subset), "correct subset")
    return torch.randperm(size, generator=torch.Generator().manual_seed(recipe.seed))[:subset]


def _resized(x: Tensor, size: int) -> Tensor:
    """(N, C, H, W) uint8 at ``size`` x ``size``, antialiased; in slices, for the sake of memory."""
    if x.shape[-2:] == (size, size):
        return x
    from torchvision.transforms.v2 import functional

    return torch.cat([functional.resize(part, [size, size], antialias=True) for part in x.split(4096)])


def _digits(recipe: Recipe) -> tuple[Any, Any, Sequence[str], str]:
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
    return (x[~held_out], y[~held_out]), (x[held_out], y[held_out]), [str(i) for i in range(10)], note


FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


def _fashion_mnist(recipe: Recipe) -> tuple[Any, Any, Sequence[str], str]:
    """The four idx files: in ``data_path``, in torchvision's ``data_path/FashionMNIST/raw``, or in Debian's package."""
    places = [DEBIAN_FASHION_MNIST]
    if recipe.data_path:
        root = Path(recipe.data_path)
        places = [root, root / "FashionMNIST" / "raw"]
    for place in places:
        found = [arrays.idx_file(place, stem) for stem in _IDX]
        if all(found):
            x, y, x_val, y_val = (arrays.read_idx(path) for path in found if path is not None)
            return _pair(x, y), _pair(x_val, y_val), FASHION, f"from {place}"
    raise UserError(
        "Fashion-MNIST's four idx files (train-images-idx3-ubyte and its like, .gz or not)",
        f"none in {' or '.join(map(str, places))}",
        "apt-get install dataset-fashion-mnist, or give torchvision's root with --data-path",
    )


_IDX = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def _pair(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    if len(x) != len(y):
        raise UserError("as many labels as images", f"{len(y)} and {len(x)}", "fetch the files again")
    return x.unsqueeze(1), y.long()


def _cifar(recipe: Recipe) -> tuple[Any, Any, Sequence[str], str]:
    """torchvision's own files: ``data_path/cifar-10-batches-py`` or ``data_path/cifar-100-python``."""
    root = Path(recipe.data_path or "data")
    train, val, classes = arrays.cifar(root, hundred=recipe.data == "cifar100")
    return train, val, classes, f"from {root}"


def _synthetic(recipe: Recipe) -> tuple[Any, Any, Sequence[str], str]:
    """Noise of the recipe's size, for speed runs: what is learnt from it means nothing."""
    generator = torch.Generator().manual_seed(recipe.seed)
    n, classes = recipe.subset or 16 * recipe.batch, recipe.classes or 1000
    _check_pixels(recipe, n + n // 8, 3)

    def draw(count: int) -> tuple[Tensor, Tensor]:
        x = torch.randint(256, (count, 3, recipe.size, recipe.size), dtype=torch.uint8, generator=generator)
        return x, torch.randint(classes, (count,), generator=generator)

    return draw(n), draw(max(1, n // 8)), [str(i) for i in range(classes)], "noise"


def _folder(recipe: Recipe) -> Data:
    """Folders of pictures, see :mod:`resnet_fast.training.folders`."""
    root = Path(recipe.data_path or "")
    found = folders.find(root, recipe.follow_links)
    train = found.train
    if recipe.subset is not None:
        train = [train[i] for i in _subset(recipe, recipe.subset, len(train)).tolist()]
    labels = torch.tensor([label for _, label in found.train])
    check_labels(labels, recipe.classes or len(found.classes), str(root))
    return Data(
        root.absolute().name,
        Files(train, Augment.training(recipe)),
        Files(found.val, Augment.validation(recipe)),
        _named(found.classes, recipe),
        images.MEAN,
        images.STD,
        False,
        "; ".join(found.notes),
    )


def _named(names: Sequence[str], recipe: Recipe) -> tuple[str, ...]:
    """One name per class of the net: where ``recipe.classes`` is more than the data have, the rest are numbers."""
    wanted = recipe.classes or len(names)
    return (*names[:wanted], *(f"class {i}" for i in range(len(names), wanted)))


def check_files(data: Data) -> None:
    """Decode every file once. UserError that counts the unreadable ones and names the first of them."""
    from concurrent.futures import ThreadPoolExecutor

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
            "mend or remove them, or leave out --strict-data to skip and count them",
        )
