"""Data sets: who is in which half, the files that are read, and the mistakes that are errors before the first step."""

from __future__ import annotations

import gzip
import os
import pickle
import re
import resource
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from resnet_fast.errors import UserError
from resnet_fast.training import recipe
from resnet_fast.training.data_sources import DATASETS
from resnet_fast.training.datasets import arrays, fashion_mnist, loading, samples
from resnet_fast.training.loop import train
from resnet_fast.training.options import RunOptions, Watch
from resnet_fast.training.recipe import Recipe


def pixels(found: Any) -> Tensor:
    return torch.stack([found[(0, i)].pixels for i in range(len(found))])


def labels(found: Any) -> list[int]:
    return [found[(0, i)].label for i in range(len(found))]


def plain(**values: Any) -> samples.Data:
    return loading.load_data(recipe.load_recipe(None, {"augment": "none", "size": 8} | values))


def test_digits_halves_are_disjoint_whole_and_the_same_for_every_seed() -> None:
    from sklearn.datasets import load_digits

    first, other = plain(), plain(seed=7)
    assert (first.train_size, first.val_size) == (1438, 359) and first.classes == tuple("0123456789")
    assert torch.equal(pixels(first.val), pixels(other.val)) and labels(first.train) == labels(other.train)
    found = load_digits()
    everything = torch.from_numpy(found.images).mul(255 / 16).round().byte().flatten(1).tolist()
    rows = [*pixels(first.train).flatten(1).tolist(), *pixels(first.val).flatten(1).tolist()]
    numbers = [*labels(first.train), *labels(first.val)]
    assert sorted(zip(rows, numbers, strict=True)) == sorted(zip(everything, found.target.tolist(), strict=True))


def test_mean_and_deviation_normalise_the_training_pixels() -> None:
    found = plain(subset=100)
    x = pixels(found.train).double() / 255
    assert found.mean == pytest.approx((x.mean().item(),)) and found.std == pytest.approx((x.std().item(),))


def test_a_subset_is_drawn_by_the_seed() -> None:
    first, again, other = plain(subset=64), plain(subset=64), plain(subset=64, seed=1)
    assert first.train_size == 64 and first.val_size == 359
    assert torch.equal(pixels(first.train), pixels(again.train))
    assert not torch.equal(pixels(first.train), pixels(other.train))


def test_a_subset_larger_than_the_data() -> None:
    with pytest.raises(UserError, match="expected subset <= 1438, the training images, got 1439"):
        plain(subset=1439)


def test_labels_beyond_the_classes() -> None:
    with pytest.raises(UserError, match=r"expected labels in 0 … 6, got 0 … 9 in the training set of digits"):
        plain(classes=7)


def test_synthetic_images_have_the_recipes_shape() -> None:
    found = plain(data="synthetic", batch=4, classes=5)
    assert pixels(found.train).shape == (64, 3, 8, 8) and set(labels(found.train)) <= set(range(5))


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def fashion(folder: Path, packed: bool = True) -> dict[str, np.ndarray]:
    """Four idx files as Zalando publishes them, 20 and 10 images of 28x28."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    made = {}
    for stem, count in (("train", 20), ("t10k", 10)):
        made[f"{stem}-images-idx3-ubyte"] = rng.integers(0, 256, (count, 28, 28), np.uint8)
        made[f"{stem}-labels-idx1-ubyte"] = np.arange(count, dtype=np.uint8) % 10
    for name, array in made.items():
        path = folder / (f"{name}.gz" if packed else name)
        path.write_bytes(gzip.compress(idx(array)) if packed else idx(array))
    return made


@pytest.mark.parametrize(("below", "packed"), [("", True), ("", False), ("FashionMNIST/raw", False)])
def test_fashion_mnist_from_a_folder_or_torchvisions_root(below: str, packed: bool, tmp_path: Path) -> None:
    made = fashion(tmp_path / "x" / below, packed)
    found = plain(data="fashion-mnist", size=28, data_path=str(tmp_path / "x"))
    assert (found.train_size, found.val_size, len(found.classes)) == (20, 10, 10)
    assert np.array_equal(pixels(found.train)[:, 0].numpy(), made["train-images-idx3-ubyte"])
    assert np.array_equal(pixels(found.val)[:, 0].numpy(), made["t10k-images-idx3-ubyte"])
    assert labels(found.val) == list(range(10))


def test_fashion_mnist_from_debians_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fashion(tmp_path / "debian")
    monkeypatch.setattr(fashion_mnist, "DEBIAN", tmp_path / "debian")
    assert str(tmp_path / "debian") in plain(data="fashion-mnist", size=28).note
    with pytest.raises(UserError, match="apt-get install dataset-fashion-mnist"):
        plain(data="fashion-mnist", data_path=str(tmp_path))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
@pytest.mark.parametrize("keep", [0, 3, -1])
def test_an_idx_file_cut_short_is_named(name: str, packed: bool, keep: int, tmp_path: Path) -> None:
    fashion(tmp_path / "x", packed)
    path = tmp_path / "x" / (f"{name}.gz" if packed else name)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=f"expected an idx file of Fashion-MNIST, got .*{name}"):
        plain(data="fashion-mnist", data_path=str(tmp_path / "x"))


def test_an_idx_file_of_something_else_is_named(tmp_path: Path) -> None:
    made = fashion(tmp_path / "x", packed=False)
    images = tmp_path / "x" / "train-images-idx3-ubyte"
    for content in (idx(made["train-labels-idx1-ubyte"]), b"\0\0\x0d" + idx(made[images.name][:5])[3:]):
        images.write_bytes(content)
        with pytest.raises(UserError, match=r"an idx file of Fashion-MNIST, got .*train-images-idx3-ubyte"):
            plain(data="fashion-mnist", data_path=str(tmp_path / "x"))


def test_labels_and_images_of_different_counts(tmp_path: Path) -> None:
    made = fashion(tmp_path / "x", packed=False)
    (tmp_path / "x" / "train-labels-idx1-ubyte").write_bytes(idx(made["train-labels-idx1-ubyte"][:-1]))
    with pytest.raises(UserError, match="expected as many labels as images, got 19 and 20"):
        plain(data="fashion-mnist", data_path=str(tmp_path / "x"))


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The MD5 sums of the published files are known, and made-up ones cannot have them."""
    monkeypatch.setattr(arrays, "genuine", lambda content, md5: True)


def cifar(root: Path, classes: int) -> dict[str, np.ndarray]:
    """The files of CIFAR-10 or CIFAR-100 with 4 images each."""
    rng = np.random.default_rng(0)
    ten = classes == 10
    folder = root / ("cifar-10-batches-py" if ten else "cifar-100-python")
    folder.mkdir()
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"] if ten else ["train", "test"]
    made = {}
    for name in names:
        made[name] = rng.integers(0, 256, (4, 3072), np.uint8)
        entry = {"data": made[name], "labels" if ten else "fine_labels": [0, 1, 2, classes - 1]}
        (folder / name).write_bytes(pickle.dumps(entry))
    meta = {"label_names" if ten else "fine_label_names": [f"class {i}" for i in range(classes)]}
    (folder / ("batches.meta" if ten else "meta")).write_bytes(pickle.dumps(meta))
    return made


@pytest.mark.parametrize(("name", "classes", "size"), [("cifar10", 10, 20), ("cifar100", 100, 4)])
def test_cifar_as_torchvision_unpacks_it(name: str, classes: int, size: int, tmp_path: Path, unchecked: None) -> None:
    made = cifar(tmp_path, classes)
    found = plain(data=name, size=32, data_path=str(tmp_path))
    assert (found.train_size, found.val_size, len(found.classes)) == (size, 4, classes)
    assert labels(found.val) == [0, 1, 2, classes - 1]
    rows = np.concatenate([a for key, a in made.items() if not key.startswith("test")])
    assert np.array_equal(pixels(found.train).flatten(1).numpy(), rows) and len(found.mean) == 3


def test_cifar_that_is_absent_or_damaged_says_what_to_fetch(tmp_path: Path, unchecked: None) -> None:
    with pytest.raises(UserError, match=r"CIFAR10 files below .*; fetch cifar-10-python\.tar\.gz"):
        plain(data="cifar10", data_path=str(tmp_path))
    cifar(tmp_path, 10)
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(b"\x80\x05nothing")
    with pytest.raises(UserError, match="CIFAR10 files below"):
        plain(data="cifar10", data_path=str(tmp_path))


def test_cifar_of_other_content_is_refused_by_its_sums(tmp_path: Path) -> None:
    cifar(tmp_path, 10)
    with pytest.raises(UserError, match=r"data_batch_1 is corrupted or another file"):
        plain(data="cifar10", data_path=str(tmp_path))


def pictures(root: Path, counts: dict[str, int]) -> None:
    """JPEGs of 12x10 pixels: ``counts`` maps a class folder to how many."""
    rng = np.random.default_rng(0)
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (10, 12, 3), np.uint8)).save(root / name / f"{i:02}.jpg")


def folder(root: Path, **values: Any) -> samples.Data:
    return plain(data="folder", data_path=str(root), **values)


def test_imagenets_layout(tmp_path: Path) -> None:
    pictures(tmp_path / "train", {"cat": 3, "dog": 2})
    pictures(tmp_path / "val", {"cat": 1, "dog": 2})
    found = folder(tmp_path)
    assert (found.train_size, found.val_size, found.classes) == (5, 3, ("cat", "dog"))
    assert labels(found.train) == [0, 0, 0, 1, 1] and labels(found.val) == [0, 1, 1]
    assert pixels(found.train).shape == (5, 3, 8, 8) and found.note == ""


def test_bare_class_folders_hold_out_a_fifth_of_each(tmp_path: Path) -> None:
    pictures(tmp_path, {"cat": 10, "dog": 5})
    found, other = folder(tmp_path), folder(tmp_path, seed=3)
    assert (found.train_size, found.val_size) == (12, 3) and sorted(labels(found.val)) == [0, 0, 1]
    assert found.val.files == other.val.files and not set(found.val.files) & set(found.train.files)
    assert "a fifth of each class" in found.note


def test_an_empty_class_folder_is_named(tmp_path: Path) -> None:
    pictures(tmp_path, {"cat": 2, "dog": 0, "emu": 2})
    (tmp_path / "dog" / "notes.txt").write_text("no picture")
    with pytest.raises(UserError, match=r"in every class folder of .*, got none in dog;"):
        folder(tmp_path)


def test_train_and_val_of_different_classes(tmp_path: Path) -> None:
    pictures(tmp_path / "train", {"cat": 2, "dog": 2})
    pictures(tmp_path / "val", {"cat": 2, "emu": 2})
    with pytest.raises(UserError, match=r"the same classes in .*got \['dog', 'emu'\] in one of them"):
        folder(tmp_path)


def test_a_train_folder_alone_is_no_class(tmp_path: Path) -> None:
    pictures(tmp_path / "train" / "images", {"cat": 4, "dog": 4})
    with pytest.raises(UserError, match="expected two class folders or more"):
        folder(tmp_path)


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="which is no folder"):
        folder(tmp_path / "absent")
    with pytest.raises(UserError, match="class folders with images in them"):
        folder(tmp_path)
    pictures(tmp_path, {"cat": 1, "dog": 4})
    with pytest.raises(UserError, match=r"two images of a class or more, got only .*cat"):
        folder(tmp_path)


def test_a_folders_subset_and_labels_are_checked_too(tmp_path: Path) -> None:
    pictures(tmp_path, {"cat": 5, "dog": 5})
    assert folder(tmp_path, subset=6).train_size == 6
    with pytest.raises(UserError, match="expected subset <= 8, the training images, got 9"):
        folder(tmp_path, subset=9)
    with pytest.raises(UserError, match="expected labels in 0 … 0"):
        folder(tmp_path, classes=1)


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """Two classes of 8 and 4 images; one to train on and one to validate on are cut short."""
    root = tmp_path / "images"
    pictures(root / "train", {"cat": 8, "dog": 8})
    pictures(root / "val", {"cat": 4, "dog": 4})
    for path in (root / "train" / "cat" / "03.jpg", root / "val" / "dog" / "01.jpg"):
        path.write_bytes(path.read_bytes()[:200])
    return root


def test_an_unreadable_image_is_skipped_counted_and_told_once(
    damaged: Path, tiny: Callable[..., Recipe], options: Callable[..., RunOptions]
) -> None:
    told: list[str] = []
    chosen = tiny(data="folder", data_path=str(damaged), subset=None, augment="none", epochs=3)
    result = train(chosen, options(), Watch(note=told.append))
    assert [line["unreadable"] for line in result.epochs] == [2, 2, 2]
    assert [line["val_images"] for line in result.epochs] == [7, 7, 7]
    skipped = [text for text in told if text.startswith("skipped")]
    assert len(skipped) == 2 and "03.jpg" in skipped[0] and "01.jpg" in skipped[1]


def test_a_pipe_that_takes_a_pictures_place_is_skipped(
    damaged: Path, tiny: Callable[..., Recipe], options: Callable[..., RunOptions]
) -> None:
    """After the files were listed: before, it is left out."""
    found = loading.load_data(tiny(data="folder", data_path=str(damaged), subset=None))
    path = damaged / "train" / "cat" / "00.jpg"
    path.unlink()
    os.mkfifo(path)
    sample = found.train[(0, 0)]
    assert sample.pixels is None and sample.name == f"{path} (no plain file)"
    with pytest.raises(UserError, match=r"3 that are not, such as .*00\.jpg \(no plain file\)"):
        loading.check_files(found)


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1)])
def test_an_extreme_picture_is_cut_before_it_is_enlarged(size: tuple[int, int], tmp_path: Path) -> None:
    """Scaled until its short side is 224, 1 x 5000 pixels would be a gigabyte."""
    pictures(tmp_path, {"cat": 2, "dog": 2})
    for path in tmp_path.rglob("*.jpg"):
        Image.new("RGB", size).save(path)
    found = folder(tmp_path, size=224)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for half in (found.train, found.val):
        sample = half[(0, 0)]
        assert sample.pixels is not None and sample.pixels.shape == (3, 224, 224)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


def test_strict_data_is_an_error_before_the_first_step(
    damaged: Path, tiny: Callable[..., Recipe], options: Callable[..., RunOptions]
) -> None:
    ticks: list[Any] = []
    chosen = tiny(data="folder", data_path=str(damaged), subset=None)
    with pytest.raises(UserError, match=r"expected 24 readable images, got 2 that are not, such as .*03\.jpg"):
        train(chosen, options(strict_data=True), Watch(step=ticks.append))
    assert ticks == []


def test_a_batch_without_readable_images_is_an_error(
    damaged: Path, tiny: Callable[..., Recipe], options: Callable[..., RunOptions]
) -> None:
    for path in (damaged / "train").rglob("*.jpg"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="2 readable images or more in every part of a batch, got 0"):
        train(tiny(data="folder", data_path=str(damaged), subset=None), options())


def test_the_pages_table_lists_every_data_set() -> None:
    page = (Path(__file__).parents[3] / "docs" / "training.md").read_text()
    table = page.split("## Data\n\n")[1].split("\n\n")[0]
    first_cells = [row.split("|")[1] for row in table.splitlines()[2:]]
    assert re.findall(r"`([\w-]+)`", " ".join(first_cells)) == list(DATASETS)
