"""Which backends exist, loaded when first needed. Adding a backend adds one folder and one line here.

A backend is a package ``resnet_fast.backends.NAME`` that exports

* ``IMPLS``: a tuple of :class:`~resnet_fast.spec.Impl`;
* ``available()``: a :class:`~resnet_fast.spec.Verdict` on this machine and process, cheap enough to ask at each call.

Backends never import dispatch.
"""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType

from .. import flags
from ..spec import Impl, Verdict

_PACKAGES = {
    "reference": "resnet_fast.backends.reference",
    "onednn": "resnet_fast.backends.onednn",
    "triton": "resnet_fast.backends.triton",
    "cuda": "resnet_fast.backends.cuda",
}


@cache
def _load(name: str) -> ModuleType:
    return importlib.import_module(_PACKAGES[name])


@cache
def loaded() -> tuple[ModuleType, ...]:
    """Every backend package, in the order of the table above."""
    return tuple(_load(name) for name in _PACKAGES)


@cache
def impls(op: str) -> tuple[Impl, ...]:
    """The implementations of one op, one per backend at the most."""
    return tuple(i for backend in loaded() for i in backend.IMPLS if i.op == op)


@cache
def prepares(device: str) -> bool:
    """Is there an implementation for this device type that derives something from the parameters?"""
    return any(i.prepare and (not i.devices or device in i.devices) for b in loaded() for i in b.IMPLS)


def works(name: str) -> bool:
    """Can this backend be used here and now? Asked at each call of a net."""
    return bool(_load(name).available())


def fingerprint() -> tuple[bool, ...]:
    """Changes when a backend becomes available or goes (a user switches oneDNN off), and with the switches that change
    how one computes: part of every decision's key."""
    return (*[bool(b.available()) for b in loaded()], flags.TF32.enabled())


def availability() -> dict[str, Verdict]:
    """Every backend name and whether it can be used here, with the reason where not."""
    return {name: _load(name).available() for name in _PACKAGES}
