"""Provide a lock that is open in a forked child process, and imports that no fork cuts in two.

A fork copies a lock in its current state. If another thread of the parent held it, nobody in the child would release
it, and a ``DataLoader``'s worker would hang at its first call. Our locks guard caches that every step leaves usable, so
the child can continue with them. Python's locks of modules are another kind: a module that is half imported at the fork
stays so in the child, and its next import waits for ever. So a fork waits for our late imports instead.
"""

from __future__ import annotations

import importlib
import os
import threading
from types import ModuleType, TracebackType
from weakref import WeakSet


class ForkSafeLock:
    """A reentrant lock that is new and open in a child process, even if it was held at the fork."""

    __slots__ = ("__weakref__", "_lock", "acquire", "release")

    def __init__(self) -> None:
        self._renew()
        _all.add(self)

    def _renew(self) -> None:
        self._lock = threading.RLock()
        self.acquire, self.release = self._lock.acquire, self._lock.release

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._lock.release()


_all: WeakSet[ForkSafeLock] = WeakSet()


def _renew_all() -> None:
    for lock in list(_all):
        lock._renew()


_imports = threading.RLock()


def load(name: str) -> ModuleType:
    """Import a module of the package during a call; a fork in another thread waits until it is there.

    Args:
        name: the whole name, which starts with the name that the package was loaded under.
    """
    with _imports:
        return importlib.import_module(name)


if hasattr(os, "register_at_fork"):  # not on Windows, which cannot fork
    os.register_at_fork(after_in_child=_renew_all)
    # The forking thread owns the lock on both sides, so that each can release it.
    os.register_at_fork(before=_imports.acquire, after_in_parent=_imports.release, after_in_child=_imports.release)
