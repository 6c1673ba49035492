"""Every net that a command can be asked for, by name, as stock torch modules that nothing has accelerated yet."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..tuning.shapes import ARCHS, Arch, check_variant, unknown_name

if TYPE_CHECKING:
    from torch import nn

COMPARED = ("vgg16", "vgg19", "googlenet")
"""torchvision's nets that the paper compares with; they are summarised here, not accelerated."""


def names() -> tuple[str, ...]:
    """torchvision's ten ResNets, the paper's own nets, then the nets that they are compared with."""
    return (*ARCHS, *COMPARED)


def _in_torchvision(entry: Arch) -> bool:
    return entry.stem == "imagenet" and entry.shortcut is not None


def image_size(name: str) -> int:
    """Side in pixels of the images that ``name`` is made for; :class:`UserError` when there is no such net."""
    if name not in names():
        raise unknown_name("model", name, names())
    return ARCHS[name].image if name in ARCHS else 224


def build(name: str, *, shortcut: str | None = None, stride_in_1x1: bool = False, **kwargs: Any) -> nn.Module:
    """A new stock module of that name; ``kwargs`` go to its builder (``num_classes``, ``weights`` …).

    ``shortcut`` (A, B, C) and ``stride_in_1x1`` choose among the paper's variants where the net has them; left out,
    the ten torchvision names give exactly torchvision's nets. GoogLeNet comes without its auxiliary heads, which
    inference never runs. Raises :class:`UserError` for an unknown name, listing close matches, or variant.
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
