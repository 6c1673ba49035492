"""A classifier from a file of weights: its net, what its pictures go through, its classes' names, what was assumed.

A file that says nothing of itself may be anybody's. What is taken for granted then (ResNet-50, ImageNet's classes and
preprocessing) is collected as sentences, so that a program can say it once.
"""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError, printable
from ..io import images, safe_files, weight_facts, weights
from ..io.weight_facts import Facts
from ..models import registry
from ..models.accelerate import accelerate

IMAGENET_CLASSES, IMAGENET_SIZE = 1000, 224
DEFAULT_MODEL = "resnet50"


@dataclass(frozen=True)
class Trained:
    """``net``: the stock module on the CPU in eval mode. ``facts``: the net, images and names (one per row of fc).

    ``said``: sentences on where the net, the names and the preprocessing come from. ``wnids``: ImageNet's synset of
    each class where the classes are ImageNet's, else empty. ``named``: are the names more than numbers?
    """

    net: nn.Module
    facts: Facts
    said: tuple[str, ...]
    wnids: tuple[str, ...] = ()
    named: bool = True

    def inputs(self, pixels: Tensor) -> Tensor:
        """uint8 (3, H, W) to the net's input, float32 (3, size, size)."""
        return images.preprocess(pixels, **self.facts.look)

    def accelerated(self, backend: str = "auto") -> nn.Module:
        """The net with fused blocks, channels last, where it has any. It is this ``net``, changed in place."""
        net = self.net.to(memory_format=torch.channels_last)
        return net if self.facts.model in registry.COMPARED else accelerate(net, backend=backend)


def load(path: Path, model: str | None = None, names: Path | None = None) -> Trained:
    """The classifier in ``path``, a file that :func:`resnet_fast.io.weights.open_file` reads.

    ``model``: its net, in place of what the file says; ``names``: a text file with one class name per line. Raises
    UserError for whatever does not fit together.
    """
    if model is not None:
        registry.image_size(model)  # an unknown net is said before files are read
    file = weights.open_file(path)
    said = [f"weights: {path}{_entry(file)}"]
    return build(file.state, file.facts, str(path), said, model, names)


def untrained(model: str, seed: int = 0) -> Trained:
    """A net with the random weights that ``seed`` gives and its builder's number of classes, which have no names."""
    net = weights.seeded(lambda: registry.build(model), seed).eval()
    classes = weights.num_classes(net.state_dict())
    names = tuple(f"class {i}" for i in range(classes))
    facts = Facts(model, registry.image_size(model), names, images.MEAN, images.STD, images.RESIZE)
    said = (f"net: {model} (as asked)", f"weights: random, seed {seed}", _look(facts, False))
    return Trained(net, facts, said, named=False)


def build(
    state: Mapping[str, Tensor],
    facts: Facts | None,
    where: str,
    said: list[str],
    model: str | None = None,
    names: Path | None = None,
) -> Trained:
    """The classifier of ``state`` and what it says of itself; ``where`` names it in complaints."""
    classes = weights.num_classes(state)
    name, variant, origin = _net(facts, where, model)
    try:
        net = registry.build(name, num_classes=classes, **variant)
    except UserError as error:
        raise weight_facts.refusal(error.expected, error.got, where) from error
    weights.apply(net, state)
    labels, wnids, named, told = _names(name, classes, facts, where, names)
    known = facts is not None
    facts = facts or Facts(name, registry.image_size(name), labels, images.MEAN, images.STD, images.RESIZE)
    facts = replace(facts, model=name, classes=labels, **variant)
    said = [f"net: {name} ({origin})", *said, f"classes: {classes}, {told}", _look(facts, known)]
    return Trained(net.eval(), facts, tuple(said), wnids, named)


def _net(facts: Facts | None, where: str, model: str | None) -> tuple[str, dict[str, Any], str]:
    """(name, variant, where that is from)."""
    if facts is not None and model in (None, facts.model):
        if facts.model not in registry.names():
            raise weight_facts.refusal("the name of a net", repr(facts.model)[:60], where)
        return facts.model, facts.variant, "as the file says"
    plain: dict[str, Any] = {"shortcut": None, "stride_in_1x1": False}
    if model is not None:
        against = "" if facts is None else f", though the file says {printable(facts.model)}"
        return model, plain, f"as asked{against}"
    return DEFAULT_MODEL, plain, "assumed: --model names another"


def _names(
    model: str, classes: int, facts: Facts | None, where: str, path: Path | None
) -> tuple[tuple[str, ...], tuple[str, ...], bool, str]:
    """(one name per class, wnids, are they names, where they are from)."""
    if path is not None:
        return names_of_file(path, classes), (), True, f"names of {path}"
    if facts is not None:
        if len(facts.classes) > classes:
            got = f"{len(facts.classes)} names"
            raise weight_facts.refusal(f"at most {classes} class names, the rows of the last layer,", got, where)
        rest = tuple(f"class {i}" for i in range(len(facts.classes), classes))
        told = "names as the file says" + (f" for the first {len(facts.classes)}, numbers for the rest" if rest else "")
        return (*map(printable, facts.classes), *rest), (), True, told
    if classes == IMAGENET_CLASSES and registry.image_size(model) == IMAGENET_SIZE:
        names, wnids = imagenet()
        return names, wnids, True, "ImageNet's names (assumed of 1000 classes: --names FILE gives others)"
    return tuple(f"class {i}" for i in range(classes)), (), False, "numbers (--names FILE gives names)"


MOST_NAMES = 16 * 2**20
"""Bytes of a file of class names: 20,000 long ones take a fiftieth of it."""


def names_of_file(path: Path, classes: int) -> tuple[str, ...]:
    """The lines of a text file, one name per class. UserError for another number of them."""
    try:
        names = safe_files.read_plain(path, MOST_NAMES).decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("a text file of class names", f"{path} ({error})", "correct --names") from error
    if len(names) != classes:
        raise UserError(
            f"{classes} class names, one per line", f"{len(names)} in {path}", "give one line per row of fc.weight"
        )
    return tuple(map(printable, names))


@cache
def imagenet() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(names, wnids) of ILSVRC2012's 1000 classes in the order of torchvision's weights: that of the wnids."""
    from torchvision.models import ResNet50_Weights

    text = importlib.resources.files(__package__).joinpath("imagenet_wnids.json").read_text()
    return tuple(ResNet50_Weights.DEFAULT.meta["categories"]), tuple(json.loads(text))


def _entry(file: weights.File) -> str:
    if not file.entry:
        return ""
    others = f", not its {' or '.join(file.others)}" if file.others else ""
    return f" (its {file.entry}{others})"


def _look(facts: Facts, known: bool) -> str:
    short = round(facts.size * facts.resize)
    grey = "grey, " if len(facts.mean) == 1 else ""
    mean, std = (" ".join(f"{v:.4g}" for v in values) for values in (facts.mean, facts.std))
    origin = "as the file says" if known else "assumed: ImageNet's"
    return f"pictures: {grey}short side to {short}, centre {facts.size}x{facts.size}, mean {mean}, std {std} ({origin})"
