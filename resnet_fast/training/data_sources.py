"""The table of data sets that a recipe can name. The readers are in :mod:`resnet_fast.training.datasets`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class DataSource:
    """One data set that ``data`` of a recipe can name.

    Attributes:
        reader: ``module:function`` in :mod:`resnet_fast.training.datasets`. The function takes the recipe and returns
            an ``ArraySet`` or a ``FileSet`` (see its module ``samples``).
        data_path: Whether the recipe gives a folder of files with ``data_path``.
        any_size: Whether the images have different sizes, so that each is cropped to the size of the recipe.
    """

    reader: str
    data_path: Literal["none", "optional", "required"] = "optional"
    any_size: bool = False


DATASETS = {
    "digits": DataSource("digits:read_digits", data_path="none"),
    "fashion-mnist": DataSource("fashion_mnist:read_fashion_mnist"),
    "cifar10": DataSource("cifar:read_cifar10"),
    "cifar100": DataSource("cifar:read_cifar100"),
    "folder": DataSource("folders:read_folder", data_path="required", any_size=True),
    "synthetic": DataSource("synthetic:read_synthetic", data_path="none"),
}
"""Name, as ``--data`` takes it -> data set; in the order of ``--help``."""
