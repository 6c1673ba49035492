"""The promise that a net does not change. :func:`resnet_fast.freeze` makes it, and a change through the net ends it."""

from __future__ import annotations

import logging
import weakref

from torch import nn

HELD, FROZEN = "_resnet_fast_held", "_resnet_fast_frozen"
OF_ONE_NET = (HELD, FROZEN)
"""Attributes of a net that no copy of it gets."""

log = logging.getLogger("resnet_fast")


class OfOneNet:
    """A value in a net's ``__dict__`` that belongs to this net only."""

    def __init__(self, net: nn.Module):
        self._net = weakref.ref(net)

    def belongs_to(self, net: nn.Module) -> bool:
        """Return whether ``net`` is not a copy that shares its attributes, such as a replica of DataParallel."""
        return self._net() is net


class Frozen(OfOneNet):
    """The promise."""


def is_frozen(net: nn.Module) -> bool:
    """Return whether the net was promised not to change."""
    frozen = net.__dict__.get(FROZEN)
    return frozen is not None and frozen.belongs_to(net)


def freeze(net: nn.Module) -> None:
    """Take what is kept of the net as up to date, until :func:`unfreeze`."""
    net.__dict__[FROZEN] = Frozen(net)


def unfreeze(net: nn.Module, reason: str = "") -> None:
    """Compare everything again from the next call on. ``reason``: the call that ended the promise, for the log."""
    if net.__dict__.pop(FROZEN, None) is not None and reason:
        log.info("a net is no longer frozen, because of %s; call resnet_fast.freeze(model) again", reason)
