"""Fashion-MNIST: 70,000 grey pictures of clothes, 28x28 pixels, in four idx files."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from ...errors import UserError
from ..recipe import Recipe
from . import arrays
from .samples import ArraySet

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
"""The folder of Debian's package dataset-fashion-mnist."""
FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
NAMES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


def read_fashion_mnist(recipe: Recipe) -> ArraySet:
    """Read the four files from ``data_path``, torchvision's ``data_path/FashionMNIST/raw``, or Debian's package.

    Raises:
        UserError: A file is absent, is no idx file, or has another number of labels than images.
    """
    places = [DEBIAN]
    if recipe.data_path:
        root = Path(recipe.data_path)
        places = [root, root / "FashionMNIST" / "raw"]
    for place in places:
        found = [arrays.idx_file(place, stem) for stem in FILES]
        if all(found):
            x, y, x_val, y_val = (arrays.read_idx(path) for path in found if path is not None)
            return ArraySet(_pair(x, y), _pair(x_val, y_val), NAMES, f"from {place}")
    raise UserError(
        "Fashion-MNIST's four idx files (train-images-idx3-ubyte and its like, .gz or not)",
        f"none in {' or '.join(map(str, places))}",
        "apt-get install dataset-fashion-mnist, or give torchvision's root with --data-path",
    )


def _pair(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    if len(x) != len(y):
        raise UserError("as many labels as images", f"{len(y)} and {len(x)}", "fetch the files again")
    return x.unsqueeze(1), y.long()
