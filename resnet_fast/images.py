"""Photographs in, network input out.

Any file that Pillow decodes becomes an 8-bit RGB tensor, whatever its mode, bit depth or EXIF orientation; the
preprocessing is the one that torchvision's ImageNet weights were evaluated with (resize 256, centre crop 224, normalise
by the ImageNet mean and deviation). Without files, three photographs that ship with scikit-image serve as input, so
that a comparison never runs on noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import UserError, missing_package

if TYPE_CHECKING:
    from PIL import Image

BUNDLED = ("chelsea", "coffee", "rocket")
"""Photographs in scikit-image's wheel: chelsea and coffee are CC0, rocket is in the public domain."""

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

MAX_ASPECT = 4
"""Longer pictures are cut to this aspect first: the centre crop drops the rest, and a 1 x 5000 picture scaled until its
short side fits would need gigabytes."""


@dataclass(frozen=True)
class Photo:
    """One decoded picture: ``pixels`` is uint8 RGB of shape (3, H, W)."""

    name: str
    pixels: Tensor


def bundled() -> list[Photo]:
    """The three photographs of scikit-image, read from its installed files. UserError if scikit-image is absent."""
    try:
        from skimage import data
    except ImportError as error:
        raise missing_package(
            "scikit-image",
            "whose photographs are the default input",
            error,
            "bench",
            "give your own pictures with --images",
        ) from error
    return [Photo(name, torch.from_numpy(getattr(data, name)().copy()).permute(2, 0, 1)) for name in BUNDLED]


_HIDDEN = ("__MACOSX", "__pycache__", "@eaDir", "lost+found", "System Volume Information", "$RECYCLE.BIN")


def hidden(name: str) -> bool:
    """Is that a file or folder that a program put beside the user's own: ``.git``, ``._a.jpg``, ``__MACOSX``?"""
    return name.startswith(".") or name in _HIDDEN


def find(paths: Sequence[Path], recursive: bool = True) -> list[Path]:
    """Files among ``paths``; a folder gives every picture below it (in it, if not recursive), by name.

    UserError for a missing path.
    """
    from PIL import Image

    Image.init()
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(
                p
                for p in path.glob("**/*" if recursive else "*")
                if p.suffix.lower() in Image.EXTENSION and p.is_file()
            )
            if not inside:
                raise UserError(
                    "a folder with pictures", f"{path} without any", "name a folder that holds .jpg or .png files"
                )
            files.extend(inside)
        elif path.is_file():
            files.append(path)
        else:
            raise UserError("a picture or a folder of pictures", f"{path}, which does not exist", "check the path")
    return files


def read(path: Path) -> Photo:
    """Decode one file to RGB. UserError that names the file if it is no picture, damaged or cut short."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as picture:
            picture.load()
            rgb = _to_rgb(ImageOps.exif_transpose(picture))
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            "a readable picture", f"{path} ({reason})", "save it again as JPEG or PNG, or leave it out"
        ) from error
    import numpy as np

    return Photo(path.name, torch.from_numpy(np.array(rgb)).permute(2, 0, 1))


def _to_rgb(picture: Image.Image) -> Image.Image:
    """8-bit RGB. Transparency is laid on white: dropping alpha would show whatever colour lies beneath it."""
    import numpy as np
    from PIL import Image

    if picture.mode == "I" or picture.mode.startswith("I;16"):  # 16-bit grey: convert() would clip, not scale
        wide = np.asarray(picture).astype(np.int64).clip(0, 65535)
        return Image.fromarray((wide >> 8).astype(np.uint8)).convert("RGB")
    if picture.mode == "F":
        raise ValueError("floating-point pixels have no defined white")
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        rgba = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return picture.convert("RGB")


def load(paths: Sequence[Path] | None = None, limit: int | None = None) -> list[Photo]:
    """The photographs of ``paths`` (files and folders), at most ``limit`` of them; the bundled ones without paths."""
    if not paths:
        return bundled()[:limit]
    return [read(path) for path in find(paths)[:limit]]


def _trim(pixels: Tensor) -> Tensor:
    """Cut the long side of an extreme picture around its centre, see ``MAX_ASPECT``."""
    from torchvision.transforms.v2 import functional

    height, width = pixels.shape[-2:]
    longest = MAX_ASPECT * min(height, width)
    return functional.center_crop(pixels, [min(height, longest), min(width, longest)])


RESIZE = 256 / 224
"""The short side before the centre crop, over the crop's."""


def centre(size: int, resize: float = RESIZE) -> list[Any]:
    """Transforms that scale the short side to ``resize * size`` (antialiased bilinear) and cut the centre out."""
    from torchvision.transforms import v2

    return [v2.Resize(round(size * resize), antialias=True), v2.CenterCrop(size)]


def preprocess(
    pixels: Tensor,
    size: int = 224,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
    resize: float = RESIZE,
) -> Tensor:
    """ImageNet evaluation preprocessing: uint8 (3, H, W) of any size >= 1 to normalised float32 (3, size, size).

    The short side is scaled to ``resize * size`` (antialiased bilinear), then the centre is cut out: by default the
    evaluation of torchvision's references/classification. ``mean`` and ``std`` of one channel are those of a net that
    was trained on grey pictures: it sees three equal channels.
    """
    from torchvision.transforms import v2

    steps = centre(size, resize)
    if len(mean) == 1:
        steps.append(v2.Grayscale(num_output_channels=3))
    transform = v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])
    return transform(_trim(pixels))


def _augment(pixels: Tensor, size: int, seed: int) -> Tensor:
    """Another crop and flip of the same picture, a function of ``seed`` only; the global generator stays as it was."""
    from torchvision.transforms import v2

    transform = v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=(0.35, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transform(_trim(pixels))


def batch(photos: Sequence[Photo], n: int, size: int = 224, seed: int = 0) -> Tensor:
    """``n`` network inputs, float32 (n, 3, size, size), contiguous NCHW.

    The first ``len(photos)`` are the plain centre crops; after that the photographs come round again with other crops
    and flips. Entry i depends on ``seed`` and i alone, so a batch of 16 is the beginning of a batch of 32.
    """
    if n < 0 or size < 1:
        raise UserError("a batch >= 0 and a size >= 1", f"batch {n}, size {size}", "correct --batch or --size")
    if n and not photos:
        raise UserError("at least one photograph", "none", "give a picture with --images")
    rows = []
    for i in range(n):
        pixels = photos[i % len(photos)].pixels
        rows.append(preprocess(pixels, size) if i < len(photos) else _augment(pixels, size, seed + i))
    return torch.stack(rows) if rows else torch.empty(0, 3, size, size)
