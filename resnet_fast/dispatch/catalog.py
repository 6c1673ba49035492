"""Which backends exist, loaded when first needed. Adding one adds a folder and its name in :mod:`resnet_fast.flags`.

A backend is a package ``resnet_fast.backends.NAME`` that exports

* ``IMPLS``: a tuple of :class:`~resnet_fast.impl.Impl`;
* ``available()``: a :class:`~resnet_fast.spec.Verdict` on this machine and process, cheap enough to ask at each call.

Backends never import dispatch.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch

from .. import flags, float32, invariance
from ..impl import Impl
from ..locks import load
from ..spec import Verdict

_PACKAGE = __name__.rpartition(".dispatch.")[0]

NAMES = tuple(name for name in flags.BACKENDS if name != "auto")


@cache
def _load(name: str) -> ModuleType:
    return load(f"{_PACKAGE}.backends.{name}")


@cache
def loaded() -> tuple[ModuleType, ...]:
    """Every backend package."""
    return tuple(map(_load, NAMES))


@cache
def impls(op: str) -> tuple[Impl, ...]:
    """The implementations of one op, at most one per backend."""
    return tuple(i for backend in loaded() for i in backend.IMPLS if i.op == op)


@cache
def ranked(op: str, device: torch.device) -> tuple[Impl, ...]:
    """The implementations of one op on a device, the highest rank first."""
    return tuple(sorted((i for i in impls(op) if i.runs_on(device)), key=lambda i: -i.rank))


@cache
def prepares(device: torch.device) -> bool:
    """Return whether an implementation for this device derives something from the parameters."""
    return any(i.prepares and i.runs_on(device) for backend in loaded() for i in backend.IMPLS)


@cache
def compiles(device: torch.device) -> bool:
    """Return whether an implementation for this device compiles kernels at their first launch."""
    return any(i.ahead and i.runs_on(device) for backend in loaded() for i in backend.IMPLS)


def works(name: str) -> bool:
    """Return whether this backend can be used here and now. Asked at each call of a net."""
    verdict: Verdict = _load(name).available()
    return verdict.ok


def fingerprint() -> tuple[bool, ...]:
    """Part of every decision's key: which backends are available, and the switches that change how one computes.

    It changes when a user switches oneDNN off, for instance.
    """
    return (*[b.available().ok for b in loaded()], float32.products_are_tf32(), invariance.is_on())


def availability() -> dict[str, Verdict]:
    """Every backend name, and whether it can be used here, with the reason where not."""
    return {name: _load(name).available() for name in NAMES}
