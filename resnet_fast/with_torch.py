"""Define the ops as soon as torch is imported: now if it already is, otherwise right after its import.

``import resnet_fast`` alone does not import torch, which takes seconds and which a help text does not need. A program
that imports torch, before or after, finds ``torch.ops.resnet_fast``.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

OPS = "resnet_fast.ops"


class _Loader(importlib.abc.Loader):
    """Load torch with its own loader, then the ops. It replaces itself by that loader before torch runs."""

    def __init__(self, inner: Any):
        self._inner = inner

    def __getattr__(self, name: str) -> Any:  # a spec that is only inspected needs the loader's other methods too
        if name == "_inner":  # a copy is asked for attributes before it has any
            raise AttributeError(name)
        return getattr(self._inner, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__loader__ = module.__spec__.loader = self._inner
        self._inner.exec_module(module)
        try:
            importlib.import_module(OPS)
        except Exception as error:  # torch itself loaded; half of it in sys.modules would be worse than no ops
            cause = f"{type(error).__name__}: {' '.join(str(error).split())}"
            warnings.warn(f"the ops of resnet_fast are not defined ({cause})", RuntimeWarning, stacklevel=2)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds torch as the other finders do, with a loader that defines the ops too."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "torch":
            return None
        for finder in sys.meta_path:
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec = None if find is None else find(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader)
                return spec
        return None


def define_ops() -> None:
    """Import the ops now if torch is imported, otherwise together with torch."""
    if "torch" in sys.modules:
        importlib.import_module(OPS)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
