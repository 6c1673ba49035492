"""List the known nets with their sizes and origins, without allocating one.

Our own nets are counted from the tables of tuning/shapes.py, without torch. timm's are built on the meta device.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from ..errors import UserError, missing_package
from ..models import registry
from ..tuning import shapes

SOURCES = {
    "torchvision": "equal to torchvision's net of that name, weights included",
    "paper": "He et al.: plain nets and the nets for CIFAR-10, with shortcut A, B or C",
    "compared": "torchvision's, which the paper compares with: counted and timed, not accelerated",
    "timm": "timm's net of that name; accelerate() takes it, explain --timm shows it",
}

COMPARED = {"vgg16": (138_357_544, 15_470_264_320), "vgg19": (143_667_240, 19_632_062_464)}
COMPARED |= {"googlenet": (6_624_904, 1_498_376_192)}
"""Parameters and multiply-adds of the nets without an architecture table; ``resnet-fast summary`` counts the same."""


@dataclass(frozen=True)
class ListedNet:
    """One net.

    Attributes:
        name: the name to build it by.
        source: a key of :data:`SOURCES`.
        image: side of its input in pixels.
        params: number of parameters.
        macs: multiply-adds of convolutions and fully connected layers for one image; None if they cannot be counted.
        blocks: number of residual blocks.
        fused: how many of the blocks run fused.
    """

    name: str
    source: str
    image: int
    params: int
    macs: int | None
    blocks: int
    fused: int


def entries(patterns: Sequence[str] = ()) -> list[ListedNet]:
    """Return our nets that match one of ``patterns`` (see :func:`matching`), or all of them. Imports no torch."""
    return [_entry(name) for name in matching(registry.names(), patterns)]


def _entry(name: str) -> ListedNet:
    image = registry.image_size(name)
    if name in COMPARED:
        return ListedNet(name, "compared", image, *COMPARED[name], 0, 0)
    arch, convs = shapes.ARCHS[name], shapes.problems(name).values()
    features, classes = arch.planes[-1] * arch.expansion, 1000 if arch.stem == "imagenet" else 10
    params = sum(c.co * c.gemm_k + 2 * c.co for c in convs) + (features + 1) * classes
    macs = sum(c.macs() for c in convs) + features * classes
    source = "torchvision" if arch.stem == "imagenet" and arch.shortcut else "paper"
    return ListedNet(name, source, image, params, macs, sum(arch.depths), sum(arch.depths))


def matching(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """Return the names that one of ``patterns`` matches, regardless of case; without patterns all names.

    A pattern with ``*``, ``?`` or ``[`` is a glob; any other is a part of the name.

    Raises:
        UserError: a pattern matches no name.
    """
    found: dict[str, None] = dict.fromkeys(names) if not patterns else {}
    for pattern in patterns:
        low = pattern.lower()
        glob = any(c in low for c in "*?[")
        hits = [n for n in names if (fnmatchcase(n.lower(), low) if glob else low in n.lower())]
        if not hits:
            close = difflib.get_close_matches(low.strip("*?[]"), names, n=3, cutoff=0.5)
            todo = f"did you mean {' or '.join(close)}?" if close else "`resnet-fast models` lists them all"
            raise UserError("a part of a net's name, or a pattern such as '*50*'", repr(pattern), todo)
        found |= dict.fromkeys(hits)
    return [name for name in names if name in found]


def timm_names(patterns: Sequence[str] = ()) -> list[str]:
    """Return the names of timm's ResNets that match one of ``patterns``.

    Raises:
        UserError: timm is not installed, or a pattern matches no name.
    """
    try:
        import timm
    except ImportError as error:
        raise missing_package("timm", "which has these nets", error, instead="leave out --timm") from error
    return matching(timm.list_models(module="resnet"), patterns)


def timm_entries(names: Sequence[str]) -> Iterator[ListedNet]:
    """Yield the timm nets among ``names`` that have blocks which run fused; each is built on the meta device."""
    import timm
    import torch

    from ..blocks.fused import Fused
    from ..models.accelerate import accelerate, restore
    from .summary import trace

    for name in names:
        with torch.device("meta"):
            net = timm.create_model(name, pretrained=False).eval()
        accelerate(net)
        blocks = [m for m in net.modules() if isinstance(m, Fused) and m.op in shapes.OPS.values()]
        fused = sum(not block.unfusable() for block in blocks)
        if not fused:
            continue
        config = timm.get_pretrained_cfg(name)
        image = config.input_size[-1] if config is not None else 224
        try:
            macs = sum(layer.spec.macs() for layer in trace(restore(net), 1, image))
        except (UserError, RuntimeError):  # a layer that is no 2-d convolution, or looks at values
            macs = None
        params = sum(p.numel() for p in net.parameters())
        yield ListedNet(name, "timm", image, params, macs, len(blocks), fused)
