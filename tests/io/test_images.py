"""resnet_fast/io/images.py: every kind of picture becomes the same kind of tensor, or an error that names the file."""

from __future__ import annotations

import os
import socket
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from resnet_fast.errors import UserError
from resnet_fast.io import images


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


def _levels(found: images.Photo) -> list[int]:
    assert torch.equal(found.pixels[0], found.pixels[1]) and torch.equal(found.pixels[0], found.pixels[2])
    return found.pixels[0].flatten().tolist()


@pytest.mark.parametrize(
    ("values", "levels"),
    [
        ([0, 1, 100, 255], [0, 1, 100, 255]),  # 8 bits, as they are
        ([0, 1, 512, 1023], [0, 0, 128, 255]),  # 10 bits
        ([0, 256, 512, 768], [0, 64, 128, 191]),
        ([0, 16, 2048, 4095], [0, 1, 128, 255]),  # 12 bits
        ([0, 256, 4096, 65535], [0, 1, 16, 255]),  # 16 bits
    ],
)
@pytest.mark.parametrize("kind", ["uint16 png", "uint16 tiff", "int32 tiff", "float32 tiff"])
def test_grey_of_more_than_8_bits_is_scaled_by_the_bits_it_uses(
    kind: str, values: list[int], levels: list[int], tmp_path: Path
) -> None:
    dtype, ending = kind.split()
    Image.fromarray(np.array([values], dtype=dtype)).save(tmp_path / f"g.{ending}")
    assert _levels(images.read(tmp_path / f"g.{ending}")) == levels


def test_a_grey_level_that_is_clear_becomes_white(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 300, 65535]], np.uint16)).save(tmp_path / "t.png", transparency=300)
    assert _levels(images.read(tmp_path / "t.png")) == [0, 255, 255]


def test_a_stated_range_is_taken_as_stated(tmp_path: Path) -> None:
    (tmp_path / "g.pgm").write_bytes(b"P5 3 1 1023\n" + np.array([0, 256, 1023], ">u2").tobytes())
    assert _levels(images.read(tmp_path / "g.pgm")) == [0, 64, 255]
    (tmp_path / "dark.pgm").write_bytes(b"P5 3 1 65535\n" + np.array([0, 256, 1023], ">u2").tobytes())
    assert _levels(images.read(tmp_path / "dark.pgm")) == [0, 1, 4]


def test_floats_up_to_one_are_scaled(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 0.25, 0.5]], np.float32)).save(tmp_path / "f.tiff")
    assert _levels(images.read(tmp_path / "f.tiff")) == [0, 64, 128]
    Image.fromarray(np.ones((1, 2), np.float32)).save(tmp_path / "f.tiff")
    assert _levels(images.read(tmp_path / "f.tiff")) == [255, 255]


@pytest.mark.parametrize(
    ("value", "reason"), [(np.nan, "black"), (np.inf, "black"), (-0.5, "black"), (-1, "black"), (65536, "white")]
)
def test_pixels_without_a_range_are_refused(value: float, reason: str, tmp_path: Path) -> None:
    dtype = np.int32 if isinstance(value, int) else np.float32
    Image.fromarray(np.array([[0, value]], dtype)).save(tmp_path / "f.tiff")
    with pytest.raises(UserError, match=rf"f\.tiff \(.* no defined {reason}\)"):
        images.read(tmp_path / "f.tiff")


def _png16(colours: np.ndarray) -> bytes:
    """Return a PNG of 16 bits per channel, (H, W, 3) or (H, W, 4), which Pillow cannot write."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    height, width, channels = colours.shape
    header = struct.pack(">IIBBBBB", width, height, 16, 2 if channels == 3 else 6, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in colours)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("channels", [3, 4])
def test_colours_of_16_bits_are_scaled_or_refused_but_never_crushed(channels: int, tmp_path: Path) -> None:
    colours = np.full((1, 2, channels), 65535)
    colours[0, 0, :3] = 256, 32768, 65535
    (tmp_path / "c.png").write_bytes(_png16(colours))
    assert images.read(tmp_path / "c.png").pixels[:, 0, 0].tolist() == [1, 128, 255]
    for bits in (8, 10, 12):
        colours[..., :3] = 2**bits - 1
        (tmp_path / "c.png").write_bytes(_png16(colours))
        with pytest.raises(UserError, match=r"c\.png \(16-bit colours of which 12 bits or fewer are used"):
            images.read(tmp_path / "c.png")


def _exif(*entries: tuple[int, int, int, bytes]) -> bytes:
    """Return EXIF of entries (tag, type, count, 4 bytes of value or offset)."""
    body = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + body + bytes(4)


_TURNED = (0x0112, 3, 1, b"\x06\0\0\0")


@pytest.mark.filterwarnings("ignore:Truncated File Read")
@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
@pytest.mark.parametrize(
    "odd",
    [
        (0x0128, 2, 4, b"abc\0"),  # text where a number belongs
        (0x011A, 3, 1, b"\1\0\0\0"),  # a number where a fraction belongs
        (0x8769, 2, 4, b"abc\0"),  # text where an offset belongs
        (0x8769, 4, 1, b"\xff\xff\xff\xff"),  # an offset outside
        (0x9286, 99, 1, bytes(4)),  # a type that there is not
        (0x010F, 4, 1, b"\1\0\0\0"),
        (0x0132, 12, 3, b"\xff\xff\xff\xff"),
    ],
)
def test_an_orientation_beside_an_odd_tag_is_applied(
    odd: tuple[int, int, int, bytes], ending: str, tmp_path: Path
) -> None:
    exif = _exif(odd, _TURNED) if odd[0] < 0x0112 else _exif(_TURNED, odd)
    Image.fromarray(_gradient(20, 30)).save(tmp_path / f"e.{ending}", exif=exif)
    assert images.read(tmp_path / f"e.{ending}").pixels.shape == (3, 30, 20)


def test_all_eight_orientations(tmp_path: Path) -> None:
    for number in range(10):
        exif = Image.Exif()
        exif[0x0112] = number
        upright = Image.fromarray(_gradient(20, 30))
        for ending in ("png", "tiff"):
            upright.save(tmp_path / f"e.{ending}", exif=exif)
            with Image.open(tmp_path / f"e.{ending}") as picture:
                expected = np.array(ImageOps.exif_transpose(picture))
            found = images.read(tmp_path / f"e.{ending}").pixels.permute(1, 2, 0).numpy()
            assert np.array_equal(found, expected)


@pytest.mark.parametrize(
    "content", [b"", b"Exif", b"Exif\0\0II", b"Exif\0\0XX*\0\x08\0\0\0", b"Exif\0\0" + b"\xff" * 40]
)
def test_damaged_metadata_leave_the_picture_as_it_is(content: bytes, tmp_path: Path) -> None:
    Image.fromarray(_gradient(20, 30)).save(tmp_path / "e.png", exif=content or None)
    assert images.read(tmp_path / "e.png").pixels.shape == (3, 20, 30)


_ENDINGS = ("png", "jpg", "tiff", "webp", "gif", "bmp", "ppm", "tga", "ico", "jp2", "avif")


def _saved(folder: Path, ending: str) -> Path:
    path = folder / f"whole.{ending}"
    try:
        options = {"exif": _exif(_TURNED)} if ending in ("png", "jpg", "webp", "avif") else {}
        Image.fromarray(_gradient(16, 24)).save(path, **options)
    except (KeyError, ValueError):
        pytest.skip(f"this Pillow writes no {ending}")
    return path


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("ending", _ENDINGS)
def test_a_damaged_file_is_read_or_named_and_nothing_else(
    ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes are flipped, cut, doubled and zeroed, most of them in the header, which holds sizes and types."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2**18)
    whole = _saved(tmp_path, ending).read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for turn in range(150):
        content = bytearray(whole)
        end = min(len(content), 200) if turn % 2 else len(content)
        for _ in range(1 + turn % 5):
            content[rng.integers(end)] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.integers(256)])
        if turn % 7 == 0:
            content = content[: rng.integers(len(content))]
        path = tmp_path / f"damaged.{ending}"
        path.write_bytes(content)
        try:
            pixels = images.read(path).pixels
            assert pixels.dtype == torch.uint8 and pixels.ndim == 3 and pixels.shape[0] == 3
        except UserError as error:
            refused += 1
            assert str(path) in str(error) and "\n" not in str(error)
    assert refused


@pytest.mark.parametrize(
    "error",
    [RuntimeError, struct.error, TypeError, MemoryError, RecursionError, OverflowError, SyntaxError, EOFError],
)
def test_whatever_pillow_raises_names_the_file(
    error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error("")

    _saved(tmp_path, "png")
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", fail)
    with pytest.raises(UserError, match=rf"whole\.png \({error.__name__.removeprefix('struct.')}\)"):
        images.read(tmp_path / "whole.png")


def test_a_decompression_bomb_is_named(tmp_path: Path) -> None:
    header = struct.pack(">IIBBBBB", 2**20, 2**20, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + bytes(4))
    with pytest.raises(UserError, match=r"bomb\.png \(Image size .* exceeds limit"):
        images.read(tmp_path / "bomb.png")


def test_what_is_no_plain_file_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.jpg"))
        for path in (tmp_path / "pipe.jpg", tmp_path / "socket.jpg", tmp_path, Path("/dev/zero")):
            with pytest.raises(UserError, match="expected a readable picture"):
                images.read(path)
        for name in ("pipe.jpg", "socket.jpg"):
            with pytest.raises(UserError, match=f"{name}, which is no plain file"):
                images.find([tmp_path / name])
    with pytest.raises(UserError, match="a folder with pictures"):
        images.find([tmp_path])


def test_postscript_is_not_handed_to_an_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow's EPS runs Ghostscript, whatever the file is called."""

    def run(*_: object, **__: object) -> None:
        raise AssertionError("executed")

    monkeypatch.setattr("subprocess.check_call", run)
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", run)
    for name in ("a.eps", "b.jpg"):
        Image.fromarray(_gradient()).save(tmp_path / name, "EPS")
        with pytest.raises(UserError, match="no picture of a known kind"):
            images.read(tmp_path / name)
    (tmp_path / "b.jpg").unlink()
    with pytest.raises(UserError, match="a folder with pictures"):
        images.find([tmp_path])


def test_hidden_pictures_are_not_found(tmp_path: Path) -> None:
    for name in (".ipynb_checkpoints/a.png", "__MACOSX/b.png", "sub/._c.png", "sub/d.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(_gradient()).save(tmp_path / name)
    assert images.find([tmp_path]) == [tmp_path / "sub" / "d.png"]
    assert images.find([tmp_path / ".ipynb_checkpoints"]) == [tmp_path / ".ipynb_checkpoints" / "a.png"]


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
