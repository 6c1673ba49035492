"""A snapshot of a net's layers: what Python would read in a call, and so must be unchanged when a graph is replayed."""

from __future__ import annotations

import weakref
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from .. import parameter_cache
from . import frozen_norms, pristine
from .frozen import OF_ONE_NET
from .fused import Fused
from .obstacles import is_altered

_LIBRARIES = ("torch.nn.modules.", "torchvision.", "timm.", "resnet_fast.")
"""Modules with layers that compute the same from the same tensors and attributes, random numbers excepted."""

_forward = attrgetter("forward")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_PLAIN = (bool, int, float, str, type(None))
_values_of = dict.values


class Layers:
    """A snapshot of a net's inner layers. Graphs belong to a snapshot and are dropped with it when a layer changes.

    The net's own hooks run around its forward, so they are not included. Its own attributes decide nothing in eval;
    they are included in training, where they may set a rate of dropout.

    Args:
        net: the net.
        training: whether a step of its training is to be recorded.

    Attributes:
        obstacle: why such a net cannot be recorded; empty if it can.
        kept_sources: :meth:`sources` at the snapshot.
    """

    def __init__(self, net: nn.Module, training: bool = False):
        named = [(name, m) for name, m in net.named_modules() if m is not net]
        self.obstacle = next(
            filter(None, (_layer_obstacle(name, m, training) for name, m in named)),
            _training_obstacle("the net", net) if training else _function_of("the net", net),
        )
        self._net = weakref.ref(net)
        self._modules = [m for _, m in named]  # not the net, which its graphs must not keep alive
        self._types = list(map(type, self._modules))
        self._classes = list(dict.fromkeys(self._types))
        self._forwards = list(map(_forward, self._classes))
        inner = [m.__dict__ for m in self._modules]
        everything = [net.__dict__, *inner]
        self._fields = everything if training else inner
        self._sizes = self._count()
        self._hooks = [fields[kind] for fields in inner for kind in _HOOKS]
        plain = [["training", *(n for n, value in fields.items() if _is_plain(value))] for fields in self._fields]
        self._getters = [(itemgetter(*names), fields) for names, fields in zip(plain, self._fields, strict=True)]
        self._values = [tuple(map(_kept, getter(fields))) for getter, fields in self._getters]
        self._children = [fields["_modules"] for fields in everything]
        self._members = [dict(children) for children in self._children]
        self._tensors = [fields[kind] for fields in everything for kind in ("_parameters", "_buffers")]
        # The first source in the cache: no other call's sources start with it, and the graphs are dropped with it.
        self._anchor = torch.empty(0)
        self.kept_sources = self.sources()
        self._with_tensors = list(filter(None, self._tensors))
        self._without_tensors = [tensors for tensors in self._tensors if not tensors]
        self._kept_tensors = self.kept_sources[1:]
        self._entry: parameter_cache.CacheEntry | None = None

    def hold(self) -> bool:
        """Return whether the layers are unchanged. Compare lists: this runs for every layer at every call."""
        try:
            values = [getter(fields) for getter, fields in self._getters]
            own = self._net().__dict__
        except (KeyError, AttributeError):  # an attribute was deleted, or the net
            return False
        return (
            values == self._values
            and not any(self._hooks)
            and self._count() == self._sizes  # a new attribute, for example a replaced forward
            and own["_modules"].keys().isdisjoint(own)  # a plain attribute hides a child of its name
            and list(map(type, self._modules)) == self._types
            and list(map(_forward, self._classes)) == self._forwards
            and self._children == self._members
        )

    def _count(self) -> list[int]:
        """Return the number of attributes of each module."""
        counts = list(map(len, self._fields))
        net = self._net()
        if net is not None and len(counts) > len(self._modules):  # the net's own come first
            counts[0] -= sum([name in net.__dict__ for name in OF_ONE_NET])
        return counts

    def sources(self) -> tuple[Tensor | None, ...]:
        """Return the anchor and all current parameters and buffers."""
        return (self._anchor, *chain.from_iterable(map(_values_of, self._tensors)))

    def same_tensors(self) -> bool:
        """Return whether every parameter and buffer is the object that it was. Their values may have changed."""
        if any(self._without_tensors):
            return False
        found = list(chain.from_iterable(map(_values_of, self._with_tensors)))
        return len(found) == len(self._kept_tensors) and all(map(is_, found, self._kept_tensors))

    def entry(self) -> parameter_cache.CacheEntry:
        """Return the cache's entry of ``kept_sources``."""
        if self._entry is None or not self._entry.alive:
            self._entry = parameter_cache.entry(self.kept_sources)
        return self._entry


def _is_plain(value: Any) -> bool:
    """Return whether an attribute's value can be compared: numbers, text, and tuples or lists of them."""
    return isinstance(value, _PLAIN) or (isinstance(value, (tuple, list)) and all(map(_is_plain, value)))


def _kept(value: Any) -> Any:
    """Return ``value``; of a list a copy, because its owner may change it in place."""
    return list(value) if type(value) is list else value


def _layer_obstacle(name: str, m: nn.Module, training: bool) -> str:
    """Return why a net with this layer cannot be recorded; empty if it can."""
    cls = type(m)
    if is_altered(m):
        return f"{name} has a hook or a replaced forward, which a replay would not run"
    if cls.forward is not nn.Module.forward and not pristine.is_own(cls, "forward", cls.forward):
        return f"the forward of {name}'s class was replaced, which a replay would not run"
    if m.training and not training:
        return f"{name} is in training mode; call eval() on the whole net"
    if not cls.__module__.startswith(_LIBRARIES) and not frozen_norms.is_frozen(m):
        return f"{name} is a {cls.__module__}.{cls.__qualname__}, whose Python code a replay would not run"
    if training:
        return _training_obstacle(name, m)
    return _function_of(name, m) if isinstance(m, Fused) else ""


def _training_obstacle(name: str, m: nn.Module) -> str:
    """Return why a training step through this layer cannot be recorded; empty if it can."""
    if hasattr(type(m), "set_requires_gradient_sync"):
        return f"FSDP2 shards {name}, whose weights are elsewhere at each call"
    if m.training and isinstance(m, nn.SyncBatchNorm):
        return f"{name} is a SyncBatchNorm, which exchanges statistics with other processes inside the forward pass"
    if m.training and isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats and m.momentum is None:
        return f"{name} has momentum None, for which its batch counter is read on the host at each call"
    for parameter in m._parameters.values():
        if parameter is not None and (type(parameter) is not nn.Parameter or parameter.is_inference()):
            return f"expected plain parameters, got {name}'s {type(parameter).__name__}"
    return _function_of(name, m) if isinstance(m, Fused) else ""


def _function_of(name: str, m: nn.Module) -> str:
    """Return the sentence for a function in place of a child, which may change undetected; empty if there is none."""
    for attribute, value in m.__dict__.items():
        if attribute != "forward" and callable(value) and not isinstance(value, type):
            return f"{attribute} of {name} is a function, which a replay would not run"
    return ""


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype that autocast computes in on the device of ``x``; None where it is off."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def switches() -> tuple[Any, ...]:
    """Return torch's process-wide settings that decide which kernels its own layers use."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    return (
        cudnn.enabled,
        cudnn.benchmark,
        cudnn.deterministic,
        cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
        matmul.fp32_precision,
        matmul.allow_fp16_reduced_precision_reduction,
        matmul.allow_bf16_reduced_precision_reduction,
        torch.are_deterministic_algorithms_enabled(),
    )
