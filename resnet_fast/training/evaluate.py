"""Measure how good a trained net is: top-1, top-5, accuracy per class, and the speed.

Images go through the input pipeline, normalisation and autocast of the training program, so the share of wrong answers
is the one that a run logs for its own validation set. Classes are matched by name: a folder ``cat`` is the class
``cat`` of the weights, whatever its place among the folders.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from .. import packing_budget
from ..errors import UserError, printable
from ..io import images
from ..io.weight_facts import Facts
from ..tools.trained import Trained
from . import loader
from .augment import Augment
from .data_sources import DATASETS
from .datasets import folders
from .datasets.loading import load_data
from .datasets.samples import Files, InMemory, Item, Sample
from .recipe import Recipe
from .restored import Restored
from .step import DTYPES, Normalise

BATCH = 64
TOP = 5


@dataclass(frozen=True)
class EvaluationSet:
    """Images to measure on, labelled with the classes of the weights, and sentences on where they are from."""

    images: InMemory | Files
    labels: Tensor
    said: tuple[str, ...]

    def name(self, index: int) -> str:
        """Return the file of an image, or its number."""
        return self.images.files[index][0] if isinstance(self.images, Files) else str(index)


@dataclass
class ImageResult:
    """One image: its class, the answer and its probability, and whether its class is among the first five answers."""

    name: str
    label: int
    answer: int
    probability: float
    in_top5: bool

    @property
    def right(self) -> bool:
        return self.answer == self.label


@dataclass
class Evaluation:
    """Counts over the images that could be read.

    Attributes:
        classes: The names of the weights' classes.
        per_class: Class number -> [images, right answers, images with their class among the first five answers].
        loss: The mean cross-entropy.
        unreadable: Names of images that could not be read.
        not_finite: Images with NaN or infinity in the outputs; they count as wrong.
        seconds: The time of the whole measurement.
        images_per_s: Images per second, reading included, without the first batch if there are more.
        waiting: The share of that time spent waiting for images.
    """

    classes: tuple[str, ...]
    per_class: dict[int, list[int]] = field(default_factory=dict)
    loss: float = 0.0
    unreadable: list[str] = field(default_factory=list)
    not_finite: int = 0
    seconds: float = 0.0
    images_per_s: float = 0.0
    waiting: float = 0.0

    @property
    def images(self) -> int:
        return sum(counts[0] for counts in self.per_class.values())

    @property
    def top1(self) -> float:
        """Share of right answers."""
        return sum(counts[1] for counts in self.per_class.values()) / max(self.images, 1)

    @property
    def top5(self) -> float:
        """Share of images whose class is among the first five answers."""
        return sum(counts[2] for counts in self.per_class.values()) / max(self.images, 1)

    @property
    def wrong(self) -> int:
        """Images with another answer than their class."""
        return sum(counts[0] - counts[1] for counts in self.per_class.values())

    @property
    def error(self) -> float:
        """Share of wrong answers: what a training run logs as ``val_error``."""
        return self.wrong / max(self.images, 1)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        per_class = [
            {"class": number, "name": self.classes[number], "images": n, "top1": right / n, "top5": five / n}
            for number, (n, right, five) in sorted(self.per_class.items())
        ]
        loss = self.loss if math.isfinite(self.loss) else None  # JSON has no NaN
        out: dict[str, Any] = {
            "images": self.images,
            "top1": self.top1,
            "top5": self.top5,
            "error": self.error,
            "loss": loss,
        }
        out |= {"unreadable": self.unreadable, "not_finite": self.not_finite, "seconds": self.seconds}
        return out | {"images_per_s": self.images_per_s, "waiting": self.waiting, "per_class": per_class}


def evaluation_set(
    restored: Restored, data: str | None = None, data_path: Path | None = None, held_out: bool = False
) -> EvaluationSet:
    """Return the images to measure ``restored`` on.

    Args:
        restored: The net. Without further arguments, the images that its run validated on, as far as the checkpoint or
            the weights tell.
        data: A name of :data:`resnet_fast.training.data_sources.DATASETS`. ``folder`` takes the validation half of
            ``data_path``, or all class folders.
        data_path: The folder of the data.
        held_out: Of a folder without halves, take only the fifth of each class that a run on it does not train on.

    Raises:
        UserError: The data is not known or cannot be read, or its classes are not those of the weights.
    """
    facts, how = restored.trained.facts, restored.recipe
    known = (how.data if how else "") or facts.data
    without_files = known in DATASETS and DATASETS[known].data_path == "none"
    elsewhere = data_path is not None and (not known or without_files)
    kind = data or ("folder" if elsewhere else known)
    if not kind:
        raise UserError(
            "images to validate on", "weights that do not say what they were trained on", "give --data or --data-path"
        )
    names: Sequence[str]
    if how is not None and kind == how.data and data_path in (None, Path(how.data_path or "")):
        found = load_data(how)
        names, said = found.classes, [f"the run's own validation set{': ' * bool(found.note)}{found.note}"]
        val = found.val
    elif kind == "folder":
        names, val, said = _folder(facts, data_path, held_out)
    else:
        path = None if data_path is None else str(data_path)
        found = load_data(Recipe(data=kind, data_path=path, size=facts.size))
        names, val, said = found.classes, found.val, [found.note] if found.note else []
    numbers, how_matched = match_classes(names, restored.trained)
    where = kind if data_path is None else str(data_path)
    return _relabelled(val, numbers, facts, (f"images: {len(val):,} of {where}", *said, how_matched))


def _folder(facts: Facts, path: Path | None, held_out: bool) -> tuple[Sequence[str], Files, list[str]]:
    if path is None:
        raise UserError("the folder of the images", "none", "give --data-path FOLDER")
    if held_out:
        found = folders.find(path)
        return found.classes, Files(found.val, Augment.none()), found.notes
    names, files, notes = folders.to_validate(path)
    return names, Files(files, Augment.none()), notes


def _relabelled(val: InMemory | Files, numbers: Sequence[int], facts: Facts, said: tuple[str, ...]) -> EvaluationSet:
    """Return ``val`` with the class numbers of the weights, and prepared as the weights ask."""
    if isinstance(val, Files):
        steps = images.centre(facts.size, facts.resize)
        if len(facts.mean) == 1:
            steps.append(v2.Grayscale(1))
        files = [(path, numbers[label]) for path, label in val.files]
        return EvaluationSet(
            Files(files, Augment(v2.Compose(steps))), torch.tensor([label for _, label in files]), said
        )
    pixels = val.pixels
    if pixels.shape[1] == 3 and len(facts.mean) == 1:
        pixels = v2.functional.rgb_to_grayscale(pixels)
    labels = torch.tensor(numbers)[val.labels]
    return EvaluationSet(InMemory(pixels, labels, Augment.none()), labels, said)


def match_classes(names: Sequence[str], of: Trained) -> tuple[list[int], str]:
    """Match the classes in ``names`` to those of the weights, by name or by ImageNet's wnid.

    If the classes of the weights have no names, they are matched in order, as torchvision's ImageFolder numbers
    folders. There must be as many.

    Returns:
        The weights' number of each class, and a phrase that says how it was found.

    Raises:
        UserError: The weights do not have one of the classes.
    """
    classes = of.facts.classes
    if not of.named:
        if len(names) != len(classes):
            raise UserError(
                f"{len(classes)} classes, as many as the weights have", str(len(names)), "give --names FILE"
            )
        return list(range(len(names))), "classes matched by order (assumed: the weights name none)"
    by_name: dict[str, list[int]] = {}
    for number, name in enumerate(classes):
        by_name.setdefault(name, []).append(number)
    by_wnid = {wnid: number for number, wnid in enumerate(of.wnids)}
    found: list[int] = []
    unknown: list[str] = []
    for name in map(printable, names):
        numbers = [by_wnid[name]] if name in by_wnid else by_name.get(name, [])
        if len(numbers) > 1:
            raise UserError("class names that occur once", f"{name} for {numbers} in the weights", "give --names FILE")
        found += numbers
        unknown += [] if numbers else [name]
    if unknown:
        some = ", ".join(unknown[:5]) + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
        raise UserError(
            f"classes of the weights ({', '.join(classes[:3])}, …)",
            some,
            "rename the folders, or give the weights' own names with --names FILE",
        )
    twice = (
        [classes[number] for number in set(found) if found.count(number) > 1] if len(set(found)) < len(found) else []
    )
    if twice:
        raise UserError("each class once", f"{twice[0]} under two names", "put their images into one folder")
    return found, f"classes matched by {'wnid' if by_wnid and names[0] in by_wnid else 'name'}"


class _Numbered(Dataset[Sample]):
    """The images of a set, labelled by their index, which identifies those of a batch that could be read."""

    def __init__(self, inner: InMemory | Files):
        self.inner = inner

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, item: Item) -> Sample:
        sample = self.inner[item]
        return Sample(sample.pixels, item[1], sample.name)


def measure_accuracy(
    restored: Restored,
    on: EvaluationSet,
    *,
    batch: int | None = None,
    device: str = "cpu",
    backend: str = "auto",
    workers: int | None = None,
    amp: str | None = None,
    tell: Callable[[list[ImageResult], int, list[str]], None] = lambda results, done, unreadable: None,
) -> Evaluation:
    """Run the net on every image of ``on``.

    Args:
        restored: The net.
        on: The images.
        batch: Images per batch; by default the run's, else 64.
        device: Where the net runs.
        backend: The backend that runs it.
        workers: Processes that read images; None chooses.
        amp: The dtype of autocast; by default that of the run's validation.
        tell: Called after each batch with its results, the number of images done, and names of unreadable ones.

    Raises:
        UserError: No image can be read.
    """
    place = torch.device(device)
    facts, how = restored.trained.facts, restored.recipe
    batch = batch or (min(how.batch // how.accumulate, 512) if how else BATCH)
    dtype = DTYPES.get(amp or facts.amp)
    normalise = Normalise(facts.mean, facts.std, place, how.channels_last if how else True)
    if workers is None:
        workers = loader.workers_of(isinstance(on.images, InMemory), place, 1)
    sampler = loader.ValidationSampler(len(on.images), max(batch, 1), 0, 1)
    parts = loader.Prefetcher(loader.data_loader(_Numbered(on.images), sampler, workers, place), place)
    result = Evaluation(facts.classes)
    restored.trained.net.to(place)
    net = restored.trained.accelerated(backend)
    done, losses = 0, 0.0
    began = warm = time.perf_counter()
    first, waited_before = 0, 0.0
    for part in parts:
        results: list[ImageResult] = []
        result.unreadable += part.unreadable
        if len(part.labels):
            x = normalise(part.images)
            cast = torch.autocast(place.type, dtype or torch.bfloat16, enabled=dtype is not None)
            with torch.no_grad(), cast, packing_budget.at_once():  # as a run validates
                logits = net(x).float()
            results, loss, broken = _judge(logits, part.labels.cpu(), on)
            losses += loss
            result.not_finite += broken
            _count(result, results)
        done += len(part.labels) + len(part.unreadable)
        tell(results, done, list(part.unreadable))
        if not first:
            warm, first, waited_before = time.perf_counter(), done, parts.waited_s
    result.seconds = time.perf_counter() - began
    since, counted, waited = (warm, done - first, parts.waited_s - waited_before)
    if not counted:
        since, counted, waited = began, done, parts.waited_s
    took = max(time.perf_counter() - since, 1e-9)
    result.images_per_s, result.waiting = counted / took, waited / took
    result.loss = losses / max(result.images, 1)
    if not result.images:
        raise UserError(f"readable images among {done}", f"none, first {result.unreadable[0]}", "repair the files")
    return result


def _judge(logits: Tensor, indices: Tensor, on: EvaluationSet) -> tuple[list[ImageResult], float, int]:
    """Return a result per image, the sum of the losses, and the number of images with outputs that are not finite."""
    logits = logits.cpu()
    labels = on.labels[indices]
    finite = logits.isfinite().all(1)
    answers = torch.where(finite, logits.argmax(1), -1)
    five = logits.topk(min(TOP, logits.shape[1])).indices.eq(labels[:, None]).any(1) & finite
    shares = logits.double().softmax(1)
    loss = float(F.cross_entropy(logits, labels, reduction="sum"))
    rows: Iterator[tuple[int, int, int, bool]] = zip(
        indices.tolist(), labels.tolist(), answers.tolist(), five.tolist(), strict=True
    )
    results = [
        ImageResult(on.name(i), label, answer, float(shares[row, answer]) if answer >= 0 else float("nan"), in_five)
        for row, (i, label, answer, in_five) in enumerate(rows)
    ]
    return results, loss, int((~finite).sum())


def _count(result: Evaluation, results: Sequence[ImageResult]) -> None:
    for v in results:
        counts = result.per_class.setdefault(v.label, [0, 0, 0])
        counts[0] += 1
        counts[1] += v.right
        counts[2] += v.in_top5


def worst(result: Evaluation, most: int) -> list[Mapping[str, Any]]:
    """Return the ``most`` classes with the smallest share of right answers, in the order of their numbers."""
    rows = sorted(result.to_dict()["per_class"], key=lambda row: (row["top1"], row["class"]))[:most]
    return sorted(rows, key=lambda row: row["class"])
