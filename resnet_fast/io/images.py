"""Read photographs and turn them into network input.

Any file that Pillow decodes by itself becomes an 8-bit RGB tensor, whatever its mode, bit depth or EXIF orientation;
everything else is an error that names the file. The preprocessing is the evaluation of torchvision's ImageNet weights:
resize to 256, crop the centre 224, normalise by the ImageNet mean and deviation. Without files, three photographs that
ship with scikit-image are the input, so that a comparison never runs on noise.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch import Tensor

from ..errors import UserError, missing_package

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

BUNDLED = ("chelsea", "coffee", "rocket")
"""Photographs in scikit-image's wheel: chelsea and coffee are CC0, rocket is in the public domain."""

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

MAX_ASPECT = 4
"""Longer pictures are cut to this aspect first. The centre crop drops the rest anyway, and scaling the short side of a
1 x 5000 picture would need gigabytes."""


@dataclass(frozen=True)
class Photo:
    """One decoded picture: ``pixels`` is uint8 RGB of shape (3, H, W)."""

    name: str
    pixels: Tensor


def bundled() -> list[Photo]:
    """Return the three photographs of scikit-image, read from its installed files.

    Raises:
        UserError: scikit-image is not installed.
    """
    try:
        from skimage import data
    except ImportError as error:
        raise missing_package(
            "scikit-image",
            "which has the default photographs",
            error,
            "bench",
            "give your own pictures with --images",
        ) from error
    return [Photo(name, torch.from_numpy(getattr(data, name)().copy()).permute(2, 0, 1)) for name in BUNDLED]


_HIDDEN = ("__MACOSX", "__pycache__", "@eaDir", "lost+found", "System Volume Information", "$RECYCLE.BIN")


def hidden(name: str) -> bool:
    """Return whether a file or folder was put there by a program: ``.git``, ``._a.jpg``, ``__MACOSX``."""
    return name.startswith(".") or name in _HIDDEN


def find(paths: Sequence[Path], recursive: bool = True) -> list[Path]:
    """Return the files among ``paths``, with each folder replaced by its pictures, sorted by name.

    Args:
        paths: files and folders.
        recursive: whether to search the subfolders too.

    Raises:
        UserError: a path does not exist or is no regular file, or a folder has no picture.
    """
    from PIL import Image

    Image.init()
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            below = path.glob("**/*" if recursive else "*")
            inside = sorted(p for p in below if _is_picture(p, path, Image.EXTENSION))
            if not inside:
                raise UserError(
                    "a folder with pictures", f"{path} without any", "name a folder that holds .jpg or .png files"
                )
            files.extend(inside)
        elif path.is_file():
            files.append(path)
        else:
            what = "which is no plain file" if os.path.lexists(path) else "which does not exist"
            raise UserError("a picture or a folder of pictures", f"{path}, {what}", "check the path")
    return files


def _is_picture(path: Path, above: Path, kinds: Mapping[str, str]) -> bool:
    """Return whether ``path``, a regular file not hidden below ``above``, has the ending of a picture."""
    if kinds.get(path.suffix.lower(), _EXTERNAL[0]) in _EXTERNAL or any(map(hidden, path.relative_to(above).parts)):
        return False
    return path.is_file()


_EXTERNAL = ("EPS", "WMF", "PDF", "MPEG", "BUFR", "GRIB", "HDF5")
"""Formats that Pillow passes to another program (EPS to Ghostscript, which executes it) or cannot decode at all."""


def read(path: Path) -> Photo:
    """Decode the first picture of a file to RGB, upright by its EXIF orientation.

    Grey pictures of more than 8 bits or of floats are scaled by the range of their values, see :func:`_grey`.

    Raises:
        UserError: the file is no regular file, no picture, damaged, incomplete or too large.
    """
    from PIL import Image, UnidentifiedImageError

    Image.init()
    formats = [name for name in Image.ID if name not in _EXTERNAL]
    try:
        with _opened(path) as file, Image.open(file, formats=formats) as picture:
            deep = any(";16" in str(tile[3]) for tile in getattr(picture, "tile", ()))
            picture.load()
            if deep:
                _check_range(picture)
            pixels = _pixels(picture)
    except Exception as error:  # what a file can raise in Pillow's plugins: RuntimeError, struct.error, MemoryError, …
        reason = (str(error).strip().splitlines() or [""])[0] or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = "no picture of a known kind"
        raise UserError(
            "a readable picture", f"{path} ({reason})", "save it again as JPEG or PNG, or leave it out"
        ) from error
    return Photo(path.name, pixels)


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """Open a regular file; raise ValueError for anything else, without waiting for a pipe."""

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))

    with open(path, "rb", opener=opener) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("no plain file")
        yield file


def _pixels(picture: Image.Image) -> Tensor:
    """Return a loaded picture as uint8 (3, H, W)."""
    import numpy as np
    from PIL import Image

    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    turn = turns.get(_orientation(picture))
    upright = picture if turn is None else picture.transpose(turn)
    upright.format = picture.format
    return torch.from_numpy(np.array(_to_rgb(upright))).permute(2, 0, 1)


def _orientation(picture: Image.Image) -> int:
    """Return the EXIF orientation, 1 if there is none.

    ``ImageOps.exif_transpose`` is not used: it rewrites all tags and fails on a malformed one.
    """
    from PIL import ExifTags

    try:
        return int(picture.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged metadata do not affect the pixels
        return 1


def _to_rgb(picture: Image.Image) -> Image.Image:
    """Convert to 8-bit RGB, with transparency over white; dropping alpha would reveal arbitrary colours."""
    from PIL import Image

    if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):  # convert() would clip, not scale
        return Image.fromarray(_grey(picture)).convert("RGB")
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        rgba = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return picture.convert("RGB")


def _grey(picture: Image.Image) -> np.ndarray:
    """Convert grey values of more than 8 bits, or floats, to uint8 (H, W).

    A file states the width of its integers, but not how many bits the camera used. So white is the largest value of
    the smallest of 8, 10, 12 and 16 bits that holds every pixel; for floats up to 1 it is 1. PGM and JPEG 2000 state
    their white, which Pillow has scaled to 16 bits. A transparent value becomes white.

    Raises:
        ValueError: negative or undefined values, or values that need more than 16 bits.
    """
    import numpy as np

    values = np.asarray(picture)
    least, most = values.min(), values.max()
    if not (np.isfinite(least) and np.isfinite(most) and least >= 0):
        raise ValueError("negative or undefined pixels have no defined black")
    if picture.mode == "F" and most <= 1:
        white = 1
    elif picture.mode != "F" and picture.format in ("PPM", "JPEG2000"):
        white = _WHITE[-1]
    else:
        white = next((limit for limit in _WHITE if most <= limit), 0)
    if not white:
        raise ValueError(f"pixels above {_WHITE[-1]} have no defined white")
    levels = np.rint(values.astype(np.float32) * 255 / white).astype(np.uint8)
    clear = picture.info.get("transparency")
    if isinstance(clear, int):
        levels[values == clear] = 255
    return levels


_WHITE = tuple(2**bits - 1 for bits in (8, 10, 12, 16))


def _check_range(picture: Image.Image) -> None:
    """Raise ValueError for 16-bit colours that use 12 bits or fewer: Pillow keeps the upper 8, so at most 16 levels."""
    extrema = picture.getextrema()
    if picture.mode in ("RGB", "RGBA", "LA", "RGBX") and isinstance(extrema[0], tuple):
        colours = extrema[: 1 if picture.mode == "LA" else 3]
        if max(high for _, high in colours) < 16:
            raise ValueError("16-bit colours of which 12 bits or fewer are used, too dark to be told apart")


def load(paths: Sequence[Path] | None = None, limit: int | None = None) -> list[Photo]:
    """Return the photographs of ``paths`` (files and folders), at most ``limit``; without paths the bundled ones."""
    if not paths:
        return bundled()[:limit]
    return [read(path) for path in find(paths)[:limit]]


def _trim(pixels: Tensor) -> Tensor:
    """Cut the long side of an extreme picture around its centre, see :data:`MAX_ASPECT`."""
    from torchvision.transforms.v2 import functional

    height, width = pixels.shape[-2:]
    longest = MAX_ASPECT * min(height, width)
    return functional.center_crop(pixels, [min(height, longest), min(width, longest)])


RESIZE = 256 / 224
"""The resized short side over the side of the centre crop."""


def centre(size: int, resize: float = RESIZE) -> list[Any]:
    """Return transforms that scale the short side to ``resize * size`` (antialiased bilinear) and crop the centre."""
    from torchvision.transforms import v2

    return [_trim, v2.Resize(round(size * resize), antialias=True), v2.CenterCrop(size)]


def preprocess(
    pixels: Tensor,
    size: int = 224,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
    resize: float = RESIZE,
) -> Tensor:
    """Preprocess one image for evaluation; the defaults are those of torchvision's references/classification.

    Args:
        pixels: uint8 (3, H, W), any size from 1 x 1.
        size: side of the centre crop.
        mean, std: per channel, of pixels scaled to 0-1. One value each is for a net trained on grey images; it gets
            three equal channels.
        resize: the short side is scaled to ``resize * size`` (antialiased bilinear) before the crop.

    Returns:
        Normalised float32 (3, size, size).
    """
    from torchvision.transforms import v2

    steps = centre(size, resize)
    if len(mean) == 1:
        steps.append(v2.Grayscale(num_output_channels=3))
    transform = v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])
    return transform(pixels)


def _augment(pixels: Tensor, size: int, seed: int) -> Tensor:
    """Return a crop and flip of the picture that depend on ``seed`` only; the global generator is left unchanged."""
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
    """Return ``n`` network inputs as float32 (n, 3, size, size), contiguous NCHW.

    The first ``len(photos)`` entries are the plain centre crops; the following ones repeat the photographs with other
    crops and flips. Entry i depends on ``seed`` and i only, so a batch of 16 is the beginning of a batch of 32.

    Raises:
        UserError: a negative batch, a size below 1, or no photograph.
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
