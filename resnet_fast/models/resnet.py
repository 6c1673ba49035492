"""Accelerated factories: torchvision's ten ResNets and the paper's own nets, by name.

``resnet_fast.resnet50(...)`` is ``accelerate(torchvision.models.resnet50(...))``: arguments, names, initialisation and
weights are torchvision's own, so a ``state_dict`` goes either way.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import nn

from ..tuning.shapes import ARCHS
from . import registry
from .accelerate import accelerate


class Factory(Protocol):
    """Builds one net; all arguments by keyword."""

    def __call__(self, *, backend: str = "auto", **kwargs: Any) -> nn.Module: ...


def factory(name: str) -> Factory:
    """The accelerated builder of net ``name``. Raises UserError for a name that is not in ``tuning.shapes.ARCHS``."""
    registry.image_size(name)

    def build(*, backend: str = "auto", **kwargs: Any) -> nn.Module:
        return accelerate(registry.build(name, **kwargs), backend)

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"""The net ``{name}``, accelerated.

    Args:
        backend: see :func:`resnet_fast.accelerate`.
        **kwargs: what the stock builder takes. torchvision's nets: ``weights``, ``progress``, ``num_classes``,
            ``zero_init_residual``, ``replace_stride_with_dilation``, ``norm_layer``, …, and the paper's
            ``shortcut="A"`` (B, C) and ``stride_in_1x1=True``. The paper's nets: see :mod:`resnet_fast.paper_nets`.
    """
    return build


FACTORIES: dict[str, Factory] = {name: factory(name) for name in ARCHS}
