"""Folders of pictures: which folder is a class, which is a half of the data set, and which files are read.

::

    root/train/<class>/…    root/val/<class>/…      two halves; also training, valid, validation, Test and the like
    root/<class>/…                                  a fifth of each class is held out
    root/train/<class>/…                            the same, of train

Every picture below a class folder is read, at any depth, in torchvision's order. A folder named like a half of a data
set is never taken for a class if it contains folders. Links below the root are followed only on request. Hidden files
and folders (``.git``, ``__MACOSX``) are ignored. Everything else that is left out is counted and reported.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ...errors import UserError
from ...io.images import hidden
from ..recipe import Recipe
from .samples import FileSet, Labelled

ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""Endings of the files that are read, in lower case: those of torchvision's ImageFolder."""

_AROUND = "(?:images?|imgs?|pictures?|photos?|pics?|datasets?|data|sets?|splits?|folders?|dirs?)*"
_ROLES = {
    role: re.compile(_AROUND + name + _AROUND)
    for role, name in {
        "train": "train(?:ing)?",
        "val": "(?:val(?:id(?:at(?:e|ion))?)?|dev(?:elopment)?|eval(?:uation)?)",
        "test": "test(?:ing)?",
    }.items()
}


def role(name: str) -> str | None:
    """Return ``train``, ``val`` or ``test`` if a folder named so is a half (``Valid``, ``train_images``), else None."""
    letters = re.sub(r"[\W\d_]+", "", name.lower())
    return next((key for key, pattern in _ROLES.items() if pattern.fullmatch(letters)), None)


def read_folder(recipe: Recipe) -> FileSet:
    """Find the pictures below ``data_path``; see :func:`find`."""
    return find(Path(recipe.data_path or ""), recipe.follow_links)


def find(root: Path, follow_links: bool = False) -> FileSet:
    """Find the data set in ``root``.

    Args:
        root: The folder.
        follow_links: Also read what links below ``root`` point to, except for cycles.

    Raises:
        UserError: It is not clear which folder is a class, or a class has no picture.
    """
    if not os.path.isdir(root):  # also False for a name that is too long
        raise UserError("a folder of images", f"{root}, which is no folder", "correct --data-path")
    train_root, val_root, notes = _halves(root)
    for half in (train_root, val_root):
        _check_link(root, half, follow_links)
    walk = _Walk(root, follow_links)
    classes, train = _classes(train_root, walk)
    if val_root is not None:
        if train_root.samefile(val_root):
            got = f"one: {train_root.name} and {val_root.name} are the same folder"
            raise UserError("two folders, to train and to validate on", got, "correct the link")
        val_classes, val = _classes(val_root, walk)
        if val_classes != classes:
            odd = sorted(set(classes) ^ set(val_classes))
            raise UserError(f"the same classes in {train_root} and {val_root}", f"{odd[:5]} in one of them", "add them")
    if len(classes) < 2:
        raise UserError("two class folders or more", f"only {classes[0]} in {train_root}", "name the folder above them")
    notes += _suspicions(train_root, classes, train)
    if val_root is None:
        train, val = _held_out(train)
    notes += walk.complaints()
    return FileSet(classes, train, val, notes)


def to_validate(root: Path, follow_links: bool = False) -> tuple[list[str], list[Labelled], list[str]]:
    """Find the pictures in ``root`` to validate on: its validation half, or all class folders.

    A single class is enough, and there need not be a training half.

    Returns:
        Classes, files with labels, and sentences about them.

    Raises:
        UserError: There are no class folders, or one has no picture.
    """
    if not os.path.isdir(root):
        raise UserError("a folder of images", f"{root}, which is no folder", "correct --data-path")
    names = _folders(root)
    held = [name for name in names if role(name) == "val"] or [name for name in names if role(name) == "test"]
    trains = [name for name in names if role(name) == "train"]
    if len(held) == 1 and _folders(root / held[0]) and (trains or len(names) == 1):
        place, notes = root / held[0], [f"its validation half, {held[0]}"]
    else:
        place, half, notes = _halves(root)
        if half is not None:
            place = half
        else:
            notes = [f"all class folders of {place}; the fifth that a run on them holds out is --held-out"]
    _check_link(root, place, follow_links)
    walk = _Walk(root, follow_links)
    classes, files = _classes(place, walk)
    return classes, files, [*notes, *walk.complaints()]


def _check_link(root: Path, half: Path | None, follow: bool) -> None:
    """Raise UserError if a half of ``root`` is a link and links are not followed. ``root`` itself may be one."""
    if half is not None and half != root and half.is_symlink() and not follow:
        todo = "set follow_links=true, or name the folder that holds both halves"
        raise UserError(f"a folder {half.name} in {root}", f"a link to {os.readlink(half)}", todo)


def _folders(root: Path) -> list[str]:
    """Return the names of folders and links to folders in ``root``, except hidden ones, in torchvision's order."""
    try:
        with os.scandir(root) as entries:
            return sorted(entry.name for entry in entries if not hidden(entry.name) and _kind(entry) == "folder")
    except OSError as error:
        raise _unreadable(root, error) from error


def _kind(entry: os.DirEntry[str]) -> str:
    """Return ``folder``, ``file``, or "" for a pipe, a socket, a device and a broken link."""
    try:
        return "folder" if entry.is_dir() else "file" if entry.is_file() else ""
    except OSError:  # a cycle of links
        return ""


def _unreadable(path: str | Path, error: OSError) -> UserError:
    return UserError("folders that can be read", f"{path} ({error.strerror})", "fix that, or move it elsewhere")


def _halves(root: Path) -> tuple[Path, Path | None, list[str]]:
    """Return the folder of the training classes, that of the validation classes or None, and notes."""
    names = _folders(root)
    by_role: dict[str | None, list[str]] = {}
    for name in names:
        by_role.setdefault(role(name), []).append(name)
    train, val, test = (by_role.get(key, []) for key in ("train", "val", "test"))
    held = val or test
    if train and held:
        if len(train) > 1 or len(held) > 1:
            got = ", ".join(train + held)
            raise UserError(f"one folder to train and one to validate on in {root}", got, "move the others elsewhere")
        rest = [name for name in names if name not in (train[0], held[0])]
        notes = [] if val else [f"{held[0]} is the validation set"]
        notes += [f"{_some(rest)} next to {train[0]} and {held[0]} not used"] if rest else []
        return root / train[0], root / held[0], notes
    fifth = "a fifth of each class is the validation set, the same for every seed"
    if train and names == train[:1]:
        return root / train[0], None, [f"no validation folder next to {train[0]}: {fifth}"]
    for name in train + held:
        if _folders(root / name):
            missing = "val" if name in train else "train"
            others = _some([other for other in names if other != name])
            raise UserError(
                f"class folders, or one folder to train and one to validate on, in {root}",
                f"{name}, which holds folders of its own, next to {others or 'nothing'}",
                f"name the other half {missing}, or move {name} elsewhere",
            )
    return root, None, [f"no train and val folders: {fifth}"]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _suspicions(root: Path, classes: list[str], files: list[Labelled]) -> list[str]:
    """Return a note if classes seem to be one level down. Raises UserError if those are the halves of a data set."""
    inside: list[set[str]] = [set() for _ in classes]
    above = [len(os.path.join(root, name, "")) for name in classes]
    for path, label in files:
        first, *rest = path[above[label] :].split(os.sep, 1)
        if rest:
            inside[label].add(first)
    halves = [(name, sub) for name, subs in zip(classes, inside, strict=True) for sub in sorted(subs) if role(sub)]
    if {role(sub) for _, sub in halves} >= {"train"} and len({role(sub) for _, sub in halves}) > 1:
        name, sub = halves[0]
        got = f"{name}/{sub} and the like, which would be one class with both halves"
        raise UserError(
            f"train and val above the class folders of {root}", got, "swap the levels: train/CLASS, val/CLASS"
        )
    if len(inside[0]) > 1 and all(subs == inside[0] for subs in inside):
        return [f"every class holds the same folders ({_some(sorted(inside[0]))}): are those the classes?"]
    return []


def _classes(root: Path, walk: _Walk) -> tuple[list[str], list[Labelled]]:
    """Return names and labelled files of the class folders in ``root``. Raises UserError for an empty one, by name."""
    names = _folders(root)
    walk.look_beside(root)
    if not names:
        raise UserError("class folders with images in them", f"none in {root}", "correct --data-path")
    files: list[Labelled] = []
    empty = []
    for label, name in enumerate(names):
        paths = walk.pictures(os.path.join(root, name))
        files += [(path, label) for path in paths]
        if not paths:
            empty.append(name)
    if empty:
        left_out = "".join(f" ({text})" for text in walk.complaints())
        raise UserError(
            f"images ({', '.join(e.strip('.') for e in ENDINGS)}) in every class folder of {root}",
            f"none in {', '.join(empty[:5])}",
            f"fill the folder or remove it{left_out}",
        )
    return names, files


@dataclass
class _Walk:
    """Finds pictures, and counts what it leaves out."""

    root: Path
    follow: bool
    endings: Counter[str] = field(default_factory=Counter)
    links: int = 0
    cycles: int = 0
    odd: int = 0
    stray: int = 0

    def look_beside(self, root: Path) -> None:
        """Count the pictures directly in ``root``, which belong to no class."""
        names = [name for name in os.listdir(root) if not hidden(name) and os.path.isfile(os.path.join(root, name))]
        self.stray += sum(os.path.splitext(name)[1].lower() in ENDINGS for name in names)

    def pictures(self, folder: str) -> list[str]:
        """Return the picture files below ``folder``, in the order of torchvision's ImageFolder."""
        if os.path.islink(folder) and not self.follow:
            self.links += 1
            return []
        above = {_identity(p) for top in (self.root, Path(folder).parent) for p in _upwards(top)}
        found: dict[str, list[str]] = {}
        waiting = [(folder, above)]
        while waiting:
            place, above = waiting.pop()
            inside = above | {_identity(place)}
            if len(inside) == len(above):
                self.cycles += 1
                continue
            found[place] = []
            for entry in self._entries(place):
                kind = _kind(entry)
                if kind == "folder":
                    waiting.append((entry.path, inside))
                elif not kind:
                    self.odd += 1
                elif (ending := os.path.splitext(entry.name)[1].lower()) in ENDINGS:
                    found[place].append(entry.path)
                else:
                    self.endings[ending] += 1
        return [path for place in sorted(found) for path in sorted(found[place])]

    def _entries(self, place: str) -> Iterator[os.DirEntry[str]]:
        """Yield what is in ``place``, except hidden entries and links that are not followed."""
        try:
            with os.scandir(place) as entries:
                for entry in entries:
                    if hidden(entry.name):
                        continue
                    if entry.is_symlink() and not self.follow:
                        self.links += 1
                    else:
                        yield entry
        except OSError as error:
            raise _unreadable(place, error) from error

    def complaints(self) -> list[str]:
        """Return sentences on what was left out."""
        out = []
        if self.endings:
            ordered = sorted(self.endings.items(), key=lambda item: (-item[1], item[0]))
            kinds = [f"{count:,} {ending or 'without one'}" for ending, count in ordered]
            out.append(f"files left out for their ending: {_some(kinds)}")
        if self.stray:
            out.append(f"pictures next to the class folders left out: {self.stray:,}")
        if self.links:
            out.append(f"links not followed: {self.links:,} (follow_links=true follows them)")
        if self.cycles:
            out.append(f"links back to a folder above, left out: {self.cycles:,}")
        if self.odd:
            out.append(f"pipes, sockets, devices and broken links left out: {self.odd:,}")
        return out


def _identity(path: str | Path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _upwards(folder: Path) -> list[Path]:
    whole = folder.resolve()
    return [whole, *whole.parents]


def _held_out(files: list[Labelled]) -> tuple[list[Labelled], list[Labelled]]:
    """Return (training, validation) files: a fifth of each class, at least one, is held out, always the same."""
    by_class: dict[int, list[Labelled]] = {}
    for file in files:
        by_class.setdefault(file[1], []).append(file)
    train: list[Labelled] = []
    val: list[Labelled] = []
    for _, mine in sorted(by_class.items()):
        if len(mine) < 2:
            raise UserError("two images of a class or more", f"only {mine[0][0]}", "add images, or a val folder")
        order = torch.randperm(len(mine), generator=torch.Generator().manual_seed(0)).tolist()
        cut = max(1, len(mine) // 5)
        val += [mine[i] for i in order[:cut]]
        train += [mine[i] for i in order[cut:]]
    return train, val
