"""Factories of accelerated nets: torchvision's ten ResNets and the paper's own nets, by name.

``resnet_fast.resnet50(...)`` is ``accelerate(torchvision.models.resnet50(...))``. Arguments, names, initialisation and
weights are torchvision's, so a ``state_dict`` of either loads into the other.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import nn

from ..tuning.shapes import ARCHS
from . import registry
from .accelerate import accelerate


class Factory(Protocol):
    """A function that builds one net. All arguments are keywords."""

    def __call__(self, *, backend: str = "auto", **kwargs: Any) -> nn.Module: ...


def factory(name: str) -> Factory:
    """Return the function that builds net ``name``, accelerated.

    Raises:
        UserError: there is no such net.
    """
    registry.image_size(name)

    def build(*, backend: str = "auto", **kwargs: Any) -> nn.Module:
        return accelerate(registry.build(name, **kwargs), backend)

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"""Build the net ``{name}``, accelerated.

    Args:
        backend: ``auto``, or the one backend that must run every block (see :func:`resnet_fast.accelerate`).
        **kwargs: arguments of the stock builder. torchvision's nets: ``weights``, ``progress``, ``num_classes``,
            ``zero_init_residual``, ``replace_stride_with_dilation``, ``norm_layer``, and the paper's ``shortcut``
            ("A", "B", "C") and ``stride_in_1x1``. The paper's nets: see :mod:`resnet_fast.paper_nets`.

    Returns:
        The net in training mode, on the default device.

    Raises:
        UserError: ``backend`` or a variant is unknown.
    """
    return build


FACTORIES: dict[str, Factory] = {name: factory(name) for name in ARCHS}
