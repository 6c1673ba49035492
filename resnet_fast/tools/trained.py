"""Load a classifier from a weights file: its net, its preprocessing, its class names, and what was assumed.

If a file has no facts, ResNet-50 with ImageNet's classes and preprocessing is assumed. Each assumption is kept as a
sentence, so that a program can print it once.
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
    """A classifier.

    Attributes:
        net: the stock module on the CPU in eval mode.
        facts: the net's name, its preprocessing, and one class name per row of the last layer.
        said: sentences that say where the net, the names and the preprocessing come from.
        wnids: ImageNet's synset of each class; empty for other classes.
        named: whether the names are more than numbers.
    """

    net: nn.Module
    facts: Facts
    said: tuple[str, ...]
    wnids: tuple[str, ...] = ()
    named: bool = True

    def inputs(self, pixels: Tensor) -> Tensor:
        """Turn pixels, uint8 (3, H, W), into the net's input, float32 (3, size, size)."""
        return images.preprocess(pixels, **self.facts.look)

    def accelerated(self, backend: str = "auto") -> nn.Module:
        """Return ``net``, changed in place: channels last, and with fused blocks if it has any that can be fused."""
        net = self.net.to(memory_format=torch.channels_last)
        return net if self.facts.model in registry.COMPARED else accelerate(net, backend=backend)


def load(path: Path, model: str | None = None, names: Path | None = None) -> Trained:
    """Load a classifier.

    Args:
        path: a file that :func:`resnet_fast.io.weights.open_file` reads.
        model: name of the net; by default the file's own, or :data:`DEFAULT_MODEL`.
        names: a text file with one class name per line; by default the file's own names.

    Raises:
        UserError: the file cannot be read, or net, weights and names do not fit each other.
    """
    if model is not None:
        registry.image_size(model)  # reject an unknown net before reading files
    file = weights.open_file(path)
    said = [f"weights: {path}{_entry(file)}"]
    return build(file.state, file.facts, str(path), said, model, names)


def untrained(model: str, seed: int = 0) -> Trained:
    """Return a net with the random weights of ``seed`` and unnamed classes."""
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
    """Build the classifier of a state dict and its facts.

    Args:
        state: the weights.
        facts: the facts of their file; None if it has none.
        where: the file's name for error messages.
        said: sentences about the origin of the weights.
        model, names: as in :func:`load`.

    Raises:
        UserError: net, weights and names do not fit each other.
    """
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
    """Return the net's name, its variant, and where they come from."""
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
    """Return one name per class, the wnids, whether the names are more than numbers, and where they come from."""
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
"""Most bytes of a file of class names; 20,000 long names take a fiftieth of it."""


def names_of_file(path: Path, classes: int) -> tuple[str, ...]:
    """Return the lines of a text file, one name per class.

    Raises:
        UserError: the file cannot be read, or has another number of lines.
    """
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
    """Return the names and wnids of ILSVRC2012's 1000 classes, sorted by wnid as in torchvision's weights."""
    from torchvision.models import ResNet50_Weights

    text = importlib.resources.files(__package__).joinpath("imagenet_wnids.json").read_text()
    return tuple(ResNet50_Weights.DEFAULT.meta["categories"]), tuple(json.loads(text))


def _entry(file: weights.WeightsFile) -> str:
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
