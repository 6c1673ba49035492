"""Build the nets that the commands know, by name, as stock torch modules."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..tuning.shapes import ARCHS, Arch, check_variant, unknown_name

if TYPE_CHECKING:
    from torch import nn

COMPARED = ("vgg16", "vgg19", "googlenet")
"""torchvision's nets that the paper compares with. They are summarised and timed, not accelerated."""


def names() -> tuple[str, ...]:
    """Return the names of torchvision's ten ResNets, the paper's own nets, then :data:`COMPARED`."""
    return (*ARCHS, *COMPARED)


def _in_torchvision(entry: Arch) -> bool:
    return entry.stem == "imagenet" and entry.shortcut is not None


def image_size(name: str) -> int:
    """Return the side in pixels of the images that net ``name`` is made for.

    Raises:
        UserError: there is no such net.
    """
    if name not in names():
        raise unknown_name("model", name, names())
    return ARCHS[name].image if name in ARCHS else 224


def build(name: str, *, shortcut: str | None = None, stride_in_1x1: bool = False, **kwargs: Any) -> nn.Module:
    """Return a new stock module.

    Args:
        name: one of :func:`names`. GoogLeNet has no auxiliary heads, which inference never runs.
        shortcut: the paper's shortcut A, B or C; None for the net's default.
        stride_in_1x1: whether a bottleneck's stride is on its first 1x1, as in the paper. Without it and without
            ``shortcut``, the ten torchvision names give exactly torchvision's nets.
        **kwargs: passed to the net's builder (``num_classes``, ``weights``, ...).

    Raises:
        UserError: the net, or its variant, does not exist. The error lists close matches.
    """
    if name not in names():
        raise unknown_name("model", name, names())
    check_variant(name, shortcut, stride_in_1x1)
    from torchvision import models

    if name == "googlenet":
        kwargs = {"aux_logits": False, "init_weights": True} | kwargs
    if name not in ARCHS or (_in_torchvision(ARCHS[name]) and shortcut is None and not stride_in_1x1):
        return getattr(models, name)(**kwargs)

    from .. import paper_nets

    if _in_torchvision(ARCHS[name]):
        return paper_nets.imagenet_resnet(name, shortcut=shortcut or "B", stride_in_1x1=stride_in_1x1, **kwargs)
    if shortcut is not None:
        kwargs["shortcut"] = shortcut
    return getattr(paper_nets, name)(**kwargs)
