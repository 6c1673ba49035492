"""A snapshot of a net's layers: what Python would read in a call, and so must be unchanged when a graph is replayed."""

from __future__ import annotations

from itertools import chain
from operator import attrgetter, itemgetter

import torch
from torch import Tensor, nn

from . import pristine
from .fused import Fused
from .obstacles import is_altered

_LIBRARIES = ("torch.nn.modules.", "torchvision.", "timm.", "resnet_fast.")
"""Modules with layers that, in eval, compute the same from the same tensors and attributes."""

_forward = attrgetter("forward")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_PLAIN = (bool, int, float, str, tuple, type(None))


class Layers:
    """A snapshot of a net's inner layers. Graphs belong to a snapshot and are dropped with it when a layer changes.

    The net's own hooks run around its forward, and its own attributes decide nothing in eval, so neither is included.

    Attributes:
        obstacle: why such a net cannot be recorded; empty if it can.
    """

    def __init__(self, net: nn.Module):
        named = [(name, m) for name, m in net.named_modules() if m is not net]
        self.obstacle = next(
            filter(None, (_layer_obstacle(name, m) for name, m in named)), _function_of("the net", net)
        )
        self._own = net.__dict__
        self._modules = [m for _, m in named]
        self._types = list(map(type, self._modules))
        self._classes = list(dict.fromkeys(self._types))
        self._forwards = list(map(_forward, self._classes))
        self._fields = [m.__dict__ for m in self._modules]
        self._sizes = list(map(len, self._fields))
        self._hooks = [fields[kind] for fields in self._fields for kind in _HOOKS]
        plain = [[name for name, value in fields.items() if type(value) in _PLAIN] for fields in self._fields]
        self._getters = [(itemgetter(*names), fields) for names, fields in zip(plain, self._fields, strict=True)]
        self._values = [getter(fields) for getter, fields in self._getters]
        self._children = [fields["_modules"] for fields in (net.__dict__, *self._fields)]
        self._members = [dict(children) for children in self._children]
        self._tensors = [
            fields[kind] for fields in (net.__dict__, *self._fields) for kind in ("_parameters", "_buffers")
        ]
        # The first source in the cache: no other call's sources start with it, and the graphs are dropped with it.
        self._anchor = torch.empty(0)

    def hold(self) -> bool:
        """Return whether the layers are unchanged. Compare lists: this runs for every layer at every call."""
        try:
            values = [getter(fields) for getter, fields in self._getters]
        except KeyError:
            return False
        return (
            values == self._values
            and not any(self._hooks)
            and list(map(len, self._fields)) == self._sizes  # a new attribute, for example a replaced forward
            and self._own["_modules"].keys().isdisjoint(self._own)  # a plain attribute hides a child of its name
            and list(map(type, self._modules)) == self._types
            and list(map(_forward, self._classes)) == self._forwards
            and self._children == self._members
        )

    def sources(self) -> tuple[Tensor | None, ...]:
        """Return the anchor and all current parameters and buffers."""
        return (self._anchor, *chain.from_iterable([tensors.values() for tensors in self._tensors]))


def _layer_obstacle(name: str, m: nn.Module) -> str:
    """Return why a net with this layer cannot be recorded; empty if it can."""
    cls = type(m)
    if is_altered(m):
        return f"{name} has a hook or a replaced forward, which a replay would not run"
    if cls.forward is not nn.Module.forward and not pristine.is_own(cls, "forward", cls.forward):
        return f"the forward of {name}'s class was replaced, which a replay would not run"
    if m.training:
        return f"{name} is in training mode; call eval() on the whole net"
    if not cls.__module__.startswith(_LIBRARIES):
        return f"{name} is a {cls.__module__}.{cls.__qualname__}, whose Python code a replay would not run"
    return _function_of(name, m) if isinstance(m, Fused) else ""


def _function_of(name: str, m: nn.Module) -> str:
    """Return the sentence for a function in place of a child, which may change undetected; empty if there is none."""
    for attribute, value in m.__dict__.items():
        if attribute != "forward" and callable(value) and not isinstance(value, type):
            return f"{attribute} of {name} is a function, which a replay would not run"
    return ""
