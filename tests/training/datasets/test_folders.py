"""Folders of pictures: what is a class and what is not, what is read and what is left out, and that it is said."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open

from resnet_fast.errors import UserError
from resnet_fast.training import recipe
from resnet_fast.training.datasets import folders, loading
from resnet_fast.training.loop import train
from resnet_fast.training.options import RunOptions, Watch
from resnet_fast.training.recipe import Recipe


def pictures(root: Path, counts: dict[str, int]) -> Path:
    """``counts`` maps a folder below ``root`` to the number of its JPEGs."""
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.new("RGB", (8, 8), (i, 0, 0)).save(root / name / f"{i:02}.jpg")
    return root


def counts(found: folders.Found) -> tuple[int, int]:
    return len(found.train), len(found.val)


@pytest.mark.parametrize(
    ("training", "validation"),
    [
        ("train", "val"),
        ("train", "valid"),
        ("training", "validation"),
        ("Train", "Val"),
        ("TRAINING", "Testing"),
        ("train_images", "val_images"),
        ("imgs-train", "dev"),
        ("trainset", "testset"),
        ("train2017", "val2017"),
    ],
)
def test_halves_by_every_common_name_are_no_classes(training: str, validation: str, tmp_path: Path) -> None:
    pictures(tmp_path, {f"{training}/cat": 3, f"{training}/dog": 2, f"{validation}/cat": 1, f"{validation}/dog": 1})
    found = folders.find(tmp_path)
    assert found.classes == ["cat", "dog"] and counts(found) == (5, 2)
    assert all(f"/{training}/" in path for path, _ in found.train)
    assert all(f"/{validation}/" in path for path, _ in found.val)


def test_names_that_only_look_like_halves_are_classes(tmp_path: Path) -> None:
    names = ["contest", "restrain", "trainer", "test_tube", "valley", "value"]
    pictures(tmp_path, {name: 2 for name in names})
    assert [folders.role(name) for name in names] == [None] * 6
    assert folders.find(tmp_path).classes == sorted(names)


def test_a_class_of_pictures_named_train_stays_one(tmp_path: Path) -> None:
    pictures(tmp_path, {"aeroplane": 2, "bus": 2, "train": 2})
    assert folders.find(tmp_path).classes == ["aeroplane", "bus", "train"]


def test_test_stays_unseen_beside_val_and_is_said(tmp_path: Path) -> None:
    pictures(tmp_path, {f"{half}/{name}": 2 for half in ("train", "val", "test") for name in ("cat", "dog")})
    found = folders.find(tmp_path)
    assert {Path(path).parts[-3] for path, _ in found.val} == {"val"}
    assert found.notes == ["test next to train and val not used"]


def test_test_for_want_of_val_is_said(tmp_path: Path) -> None:
    pictures(tmp_path, {f"{half}/{name}": 2 for half in ("train", "test") for name in ("cat", "dog")})
    assert folders.find(tmp_path).notes == ["test is the validation set"]


def test_train_alone_gives_up_a_fifth(tmp_path: Path) -> None:
    pictures(tmp_path, {"train/cat": 10, "train/dog": 5})
    found = folders.find(tmp_path)
    assert found.classes == ["cat", "dog"] and counts(found) == (12, 3)
    assert found.notes == [
        "no validation folder next to train: a fifth of each class is the validation set, the same for every seed"
    ]


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        (["train/cat", "train/dog", "training/cat", "val/cat"], "got train, training, val; move the others"),
        (["train/cat", "val/cat", "validation/cat"], "got train, val, validation; move the others"),
        (["train/cat", "train/dog", "photos/cat"], "got train, which holds folders of its own, next to photos; name"),
        (["Test/cat", "Test/dog", "more/cat"], "got Test, which holds folders of its own, next to more; name"),
        (["valid/cat", "valid/dog"], "got valid, which holds folders of its own, next to nothing; name the other half"),
        (["cat/train", "cat/val", "dog/train", "dog/val"], "got cat/train and the like, which would be one class"),
        (["train", "valid"], "class folders with images in them, got none in"),
    ],
)
def test_a_layout_that_would_mix_the_halves_is_refused(layout: list[str], said: str, tmp_path: Path) -> None:
    pictures(tmp_path, {name: 3 for name in layout})
    with pytest.raises(UserError) as refused:
        folders.find(tmp_path)
    assert said in str(refused.value)


def test_classes_that_may_be_one_level_down_are_said(tmp_path: Path) -> None:
    pictures(tmp_path, {f"{half}/{name}": 2 for half in ("entrenar", "validar") for name in ("cat", "dog")})
    assert "every class holds the same folders (cat, dog): are those the classes?" in folders.find(tmp_path).notes


def test_train_and_val_that_are_the_same_folder(tmp_path: Path) -> None:
    pictures(tmp_path, {"train/cat": 2, "train/dog": 2})
    (tmp_path / "val").symlink_to("train")
    with pytest.raises(UserError, match="train and val are the same folder"):
        folders.find(tmp_path, follow_links=True)


def test_hidden_folders_and_files_do_not_count(tmp_path: Path) -> None:
    pictures(tmp_path, {"cat": 2, "dog": 2, ".git": 1, ".ipynb_checkpoints": 2, "__MACOSX/cat": 2})
    pictures(tmp_path / "cat", {".ipynb_checkpoints": 1})
    (tmp_path / "cat" / "._00.jpg").write_bytes(b"a resource fork")
    found = folders.find(tmp_path)
    assert found.classes == ["cat", "dog"] and counts(found) == (2, 2) and len(found.notes) == 1


def test_order_and_depth_are_torchvisions(tmp_path: Path) -> None:
    from torchvision.datasets import ImageFolder

    pictures(tmp_path, {"b": 3, "b/z": 2, "b/z/y": 1, "b/a-b": 1, "b/a": 1, "B": 2, "a": 2})
    expected = ImageFolder(str(tmp_path))
    found = folders.find(tmp_path)
    everything = sorted(expected.samples)
    assert found.classes == expected.classes and sorted(found.train + found.val) == everything
    walk = folders._Walk(tmp_path, False)
    assert walk.pictures(str(tmp_path / "b")) == [path for path, label in expected.samples if label == 2]


@pytest.mark.parametrize("target", ["..", ".", "../../..", "loop"])
@pytest.mark.parametrize("follow", [False, True])
def test_a_link_upwards_adds_no_picture(target: str, follow: bool, tmp_path: Path) -> None:
    pictures(tmp_path / "set", {"cat": 20, "dog": 20})
    (tmp_path / "set" / "cat" / "loop").symlink_to(target)
    found = folders.find(tmp_path / "set", follow)
    assert counts(found) == (32, 8)
    assert {label: sum(1 for _, n in found.train + found.val if n == label) for label in (0, 1)} == {0: 20, 1: 20}
    assert "links" in found.notes[-1] and ": 1" in found.notes[-1]


def test_links_are_followed_only_if_asked(tmp_path: Path) -> None:
    pictures(tmp_path, {"set/cat": 5, "set/dog": 5, "elsewhere": 3, "birds": 2})
    (tmp_path / "set" / "cat" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "dog" / "one.jpg").symlink_to(tmp_path / "elsewhere" / "00.jpg")
    found = folders.find(tmp_path / "set")
    assert counts(found) == (8, 2) and found.notes[-1] == "links not followed: 2 (follow_links=true follows them)"
    found = folders.find(tmp_path / "set", follow_links=True)
    assert counts(found) == (12, 2) and len(found.notes) == 1
    (tmp_path / "set" / "emu").symlink_to(tmp_path / "birds")
    with pytest.raises(UserError, match=r"got none in emu; .* \(links not followed: 3 "):
        folders.find(tmp_path / "set")
    assert folders.find(tmp_path / "set", follow_links=True).classes == ["cat", "dog", "emu"]


def test_a_half_that_is_a_link_is_followed_only_if_asked(tmp_path: Path) -> None:
    pictures(tmp_path, {f"set/train/{name}": 2 for name in ("cat", "dog")} | {"far/cat": 1, "far/dog": 1})
    (tmp_path / "set" / "val").symlink_to(tmp_path / "far")
    for read in (folders.find, folders.to_validate):
        with pytest.raises(UserError, match=r"expected a folder val in .*, got a link to .*far; set follow_links=true"):
            read(tmp_path / "set")
    assert counts(folders.find(tmp_path / "set", follow_links=True)) == (4, 2)
    (tmp_path / "link").symlink_to("set")
    (tmp_path / "set" / "val").unlink()
    assert folders.find(tmp_path / "link").classes == ["cat", "dog"]  # the root is named, not found


def test_pictures_of_no_class_are_counted(tmp_path: Path) -> None:
    pictures(tmp_path, {".": 3, "cat": 2, "dog": 2})
    (tmp_path / "README.md").write_text("x")
    found = folders.find(tmp_path)
    assert counts(found) == (2, 2) and found.notes[-1] == "pictures next to the class folders left out: 3"


def test_a_recipe_may_follow_links(tmp_path: Path) -> None:
    pictures(tmp_path, {"set/cat": 5, "set/dog": 5, "elsewhere": 5})
    (tmp_path / "set" / "cat" / "more").symlink_to(tmp_path / "elsewhere")
    for follow, size in ((False, 8), (True, 12)):
        chosen = {"data": "folder", "data_path": str(tmp_path / "set"), "follow_links": follow}
        assert loading.load_data(recipe.load_recipe(None, chosen)).train_size == size


def test_what_is_left_out_is_counted(tmp_path: Path) -> None:
    pictures(tmp_path, {"cat": 5, "dog": 5})
    for name in ("a.gif", "b.GIF", "noending", "c.avif", "d.txt"):
        (tmp_path / "cat" / name).write_bytes(b"x")
    os.mkfifo(tmp_path / "cat" / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "dog" / "s.jpg"))
    found = folders.find(tmp_path)
    assert counts(found) == (8, 2)
    assert found.notes[1:] == [
        "files left out for their ending: 2 .gif, 1 without one, 1 .avif and 1 more",
        "pipes, sockets, devices and broken links left out: 2",
    ]


def test_an_empty_class_says_what_was_left_out_of_it(tmp_path: Path) -> None:
    pictures(tmp_path, {"cat": 5, "dog": 0})
    (tmp_path / "dog" / "a.gif").write_bytes(b"x")
    with pytest.raises(UserError, match=r"got none in dog; .* \(files left out for their ending: 1 \.gif\)"):
        folders.find(tmp_path)


def test_a_wider_classifier_has_a_name_per_class(tmp_path: Path) -> None:
    pictures(tmp_path, {"cat": 3, "dog": 3})
    chosen = {"data": "folder", "data_path": str(tmp_path), "classes": 1000}
    names = loading.load_data(recipe.load_recipe(None, chosen)).classes
    assert names[:3] == ("cat", "dog", "class 2") and len(names) == 1000 and names[999] == "class 999"
    assert len(loading.load_data(recipe.load_recipe(None, {"classes": 12})).classes) == 12


def test_a_run_says_its_classes_and_sizes(
    tmp_path: Path, tiny: Callable[..., Recipe], options: Callable[..., RunOptions]
) -> None:
    pictures(tmp_path / "set", {"cat": 10, "dog": 10})
    (tmp_path / "set" / "cat" / "a.gif").write_bytes(b"x")
    told: list[str] = []
    chosen = tiny(data="folder", data_path=str(tmp_path / "set"), subset=None, steps=1, classes=4)
    train(chosen, options(), Watch(note=told.append))
    assert "set: 16 training and 4 validation images of 4 classes (cat, dog, class 2, class 3)" in told
    with safe_open(options().out / "model.safetensors", "pt") as file:
        facts = json.loads(file.metadata()["resnet_fast"])
    assert facts["classes"] == ["cat", "dog", "class 2", "class 3"]
    assert any("files left out for their ending: 1 .gif" in text for text in told)
    told.clear()
    train(tiny(steps=1), options("other"), Watch(note=told.append))
    assert "digits: 64 training and 359 validation images of 10 classes (0, 1, 2, 3, 4, …)" in told
