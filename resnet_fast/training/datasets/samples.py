"""Images and labels: what a reader returns, and the training and validation set that a run uses.

Every data set yields unsigned 8-bit pixels. They are normalised on the device, in whole batches, so that a quarter of
the bytes is copied to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from torch.utils.data import Dataset

from ... import limits
from ...errors import UserError
from ...io import images
from ...io.weight_facts import Facts
from ..augment import Augment
from ..recipe import Recipe

Item = tuple[int, int]
"""(epoch, index): with the epoch in it, an augmented image depends only on the item and the seed."""

Labelled = tuple[str, int]
"""(path of a picture, number of its class)."""


@dataclass(frozen=True)
class ArraySet:
    """What a reader of arrays returns.

    Attributes:
        train: Images (N, C, H, W) uint8 and labels (N) int64 to train on.
        val: The same to validate on.
        classes: The name of each class, by number.
        note: A sentence about the data, or "".
    """

    train: tuple[Tensor, Tensor]
    val: tuple[Tensor, Tensor]
    classes: Sequence[str]
    note: str = ""


@dataclass
class FileSet:
    """What a reader of picture files returns: files with labels, the class names by number, sentences about them."""

    classes: list[str]
    train: list[Labelled]
    val: list[Labelled]
    notes: list[str]


@dataclass(frozen=True)
class Sample:
    """One image, uint8 (C, H, W), and its class. ``pixels`` is None if the file ``name`` could not be read."""

    pixels: Tensor | None
    label: int
    name: str = ""


class InMemory(Dataset[Sample]):
    """Images (N, C, H, W) uint8 and labels (N) int64 in memory."""

    def __init__(self, pixels: Tensor, labels: Tensor, augment: Augment):
        self.pixels, self.labels, self.augment = pixels, labels, augment

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, item: Item) -> Sample:
        _, index = item
        return Sample(self.augment(self.pixels[index], item), int(self.labels[index]))


class Files(Dataset[Sample]):
    """Image files and their classes, decoded on access. A file that cannot be read is a sample without pixels."""

    def __init__(self, files: Sequence[Labelled], augment: Augment):
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
        """Return the contents in one line, which shows if a folder was taken for a class by mistake."""
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
        """Return what the weights of a run on this data say of themselves; images are prepared as for validation."""
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


def check_pixels(recipe: Recipe, count: int, channels: int) -> None:
    """Raise UserError unless ``count`` images of the recipe's size fit into memory twice, as building them needs."""
    needed = 2 * count * channels * recipe.size**2
    what = f"{count:,} images of {recipe.size}x{recipe.size}"
    limits.check_memory(needed, what, "lower size, or batch and subset")
