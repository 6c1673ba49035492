"""resnet_fast/images.py: every kind of picture becomes the same kind of tensor, or an error that names the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from resnet_fast import images
from resnet_fast.errors import UserError


def _gradient(height: int = 40, width: int = 60) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // (width - 1), y * 255 // (height - 1), (x + y) % 256], -1).astype(np.uint8)


def test_bundled_are_three_colour_photographs() -> None:
    pytest.importorskip("skimage")
    photos = images.load()
    assert [p.name for p in photos] == ["chelsea", "coffee", "rocket"]
    assert all(p.pixels.dtype == torch.uint8 and p.pixels.shape[0] == 3 for p in photos)
    assert photos[0].pixels.shape == (3, 300, 451)


def test_rgb_file_keeps_its_pixels(tmp_path: Path) -> None:
    Image.fromarray(_gradient()).save(tmp_path / "a.png")
    assert np.array_equal(images.read(tmp_path / "a.png").pixels.permute(1, 2, 0).numpy(), _gradient())


def test_grey_is_repeated_over_three_channels(tmp_path: Path) -> None:
    Image.fromarray(_gradient()[..., 0]).save(tmp_path / "g.png")
    pixels = images.read(tmp_path / "g.png").pixels
    assert pixels.shape == (3, 40, 60)
    assert torch.equal(pixels[0], pixels[1]) and torch.equal(pixels[0], torch.from_numpy(_gradient()[..., 0]))


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    wide = np.array([[0, 256, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(wide).save(tmp_path / "w.png")
    assert images.read(tmp_path / "w.png").pixels[0].tolist() == [[0, 1, 128, 255]]


def test_transparent_pixels_become_white(tmp_path: Path) -> None:
    rgba = np.zeros((2, 2, 4), dtype=np.uint8)
    rgba[0, 0] = (10, 20, 30, 255)
    Image.fromarray(rgba).save(tmp_path / "t.png")
    pixels = images.read(tmp_path / "t.png").pixels
    assert pixels[:, 0, 0].tolist() == [10, 20, 30]
    assert pixels[:, 1, 1].tolist() == [255, 255, 255]


def test_palette_with_transparency(tmp_path: Path) -> None:
    picture = Image.new("P", (2, 1))
    picture.putpalette([255, 0, 0, 0, 0, 255])
    picture.putdata([0, 1])
    picture.save(tmp_path / "p.png", transparency=1)
    pixels = images.read(tmp_path / "p.png").pixels
    assert pixels[:, 0, 0].tolist() == [255, 0, 0]
    assert pixels[:, 0, 1].tolist() == [255, 255, 255]


def test_cmyk_jpeg_is_converted(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "c.jpg")
    red, green, blue = images.read(tmp_path / "c.jpg").pixels[:, 4, 4].tolist()
    assert red > 200 and green < 60 and blue < 60


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: shown clockwise by 90 degrees
    Image.fromarray(_gradient(20, 30)).save(tmp_path / "e.png", exif=exif)
    assert images.read(tmp_path / "e.png").pixels.shape == (3, 30, 20)


def test_truncated_file_is_named(tmp_path: Path) -> None:
    Image.fromarray(_gradient(200, 200)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:300])
    with pytest.raises(UserError, match=r"expected a readable picture, got .*cut\.png"):
        images.read(tmp_path / "cut.png")


@pytest.mark.parametrize("content", [b"", b"not a picture"])
def test_foreign_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.jpg").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.jpg"):
        images.read(tmp_path / "x.jpg")


def test_float_pixels_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.ones((2, 2), dtype=np.float32)).save(tmp_path / "f.tiff")
    with pytest.raises(UserError, match="no defined white"):
        images.read(tmp_path / "f.tiff")


def test_folder_is_read_in_order_and_limited(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b.png", "a.png", "sub/c.JPG"):
        Image.fromarray(_gradient()).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not a picture")
    assert [p.name for p in images.load([tmp_path])] == ["a.png", "b.png", "c.JPG"]
    assert [p.name for p in images.load([tmp_path], limit=2)] == ["a.png", "b.png"]


def test_empty_folder_and_missing_path(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a folder with pictures"):
        images.load([tmp_path])
    with pytest.raises(UserError, match="does not exist"):
        images.load([tmp_path / "none.png"])


@pytest.mark.parametrize("shape", [(1, 1), (1, 3000), (3000, 1), (224, 224), (37, 501)])
def test_preprocess_takes_any_size(shape: tuple[int, int]) -> None:
    pixels = torch.full((3, *shape), 128, dtype=torch.uint8)
    out = images.preprocess(pixels, 224)
    assert out.shape == (3, 224, 224) and out.dtype == torch.float32
    expected = (128 / 255 - torch.tensor(images.MEAN)) / torch.tensor(images.STD)
    torch.testing.assert_close(out.amax((1, 2)), expected, rtol=0, atol=1e-5)


def test_preprocess_equals_torchvision_weights_transform() -> None:
    from torchvision.transforms._presets import ImageClassification

    pixels = torch.from_numpy(_gradient(300, 400)).permute(2, 0, 1)
    expected = ImageClassification(crop_size=224, resize_size=256)(pixels)
    one_level = 1 / 255 / min(images.STD)  # v2 rounds a tie of the 8-bit resize differently
    torch.testing.assert_close(images.preprocess(pixels), expected, rtol=0, atol=one_level + 1e-5)
    assert (images.preprocess(pixels) - expected).abs().mean() < one_level / 5


def _photos() -> list[images.Photo]:
    pixels = torch.from_numpy(_gradient(80, 120)).permute(2, 0, 1)
    return [images.Photo("a", pixels), images.Photo("b", pixels.flip(0))]


def test_batch_starts_with_plain_crops_and_repeats_differ() -> None:
    photos = _photos()
    x = images.batch(photos, 6, size=32)
    assert x.shape == (6, 3, 32, 32)
    assert torch.equal(x[0], images.preprocess(photos[0].pixels, 32))
    assert torch.equal(x[1], images.preprocess(photos[1].pixels, 32))
    assert len({tuple(row.flatten().tolist()) for row in x}) == 6


def test_batch_is_a_prefix_of_a_larger_one_and_leaves_the_generator_alone() -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    small, large = images.batch(_photos(), 3, size=16), images.batch(_photos(), 7, size=16)
    assert torch.equal(small, large[:3])
    assert torch.equal(before, torch.random.get_rng_state())
    assert not torch.equal(images.batch(_photos(), 3, size=16, seed=5)[2], small[2])


def test_batch_of_nothing() -> None:
    assert images.batch([], 0, size=16).shape == (0, 3, 16, 16)
    with pytest.raises(UserError, match="at least one photograph"):
        images.batch([], 1)
    with pytest.raises(UserError, match="batch -1"):
        images.batch(_photos(), -1)
