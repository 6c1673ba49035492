"""A package for ``kernels``, built once per process, and loaded and put into models as that library does it."""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from functools import cache
from pathlib import Path
from types import MethodType, ModuleType
from typing import Any

from torch import nn

from resnet_fast.hub import build

_folder = tempfile.TemporaryDirectory(prefix="resnet-fast-hub-")


@cache
def built() -> Path:
    """Return the folder of a package of this checkout; it goes when the process ends."""
    build.build(Path(_folder.name))
    return Path(_folder.name)


@cache
def loaded(variant: str = "torch-cuda") -> ModuleType:
    """Return a variant of the package, under the name that its metadata gives."""
    folder = built() / "build" / variant
    name = json.loads((folder / "metadata.json").read_bytes())["id"]
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def put(model: nn.Module, layers: dict[type[nn.Module], str], variant: str = "torch-cuda") -> Any:
    """Replace the forward of every module of these classes by that of a layer, as ``kernelize`` does; return it."""
    for m in model.modules():
        if type(m) in layers:
            m.forward = MethodType(getattr(loaded(variant).layers, layers[type(m)]).forward, m)  # type: ignore[method-assign]
    return model
