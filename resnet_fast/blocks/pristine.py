"""Detect functions of torch, torchvision and timm that somebody replaced and that a fused call would skip.

A fused call does not run ``nn.Conv2d.forward`` and similar functions. If one of them was replaced, before or after
``accelerate``, the stock layers have to run. A function is the library's own if its qualified name is that of the class
that holds it and it was defined in that class's module. No original has to be recorded before somebody could have
replaced it.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

try:
    from torchvision.ops.misc import FrozenBatchNorm2d
except ModuleNotFoundError as missing:
    if (missing.name or "").partition(".")[0] != "torchvision":
        raise

    class FrozenBatchNorm2d(nn.Module):  # type: ignore[no-redef]
        """Stands for torchvision's in a package of the hub that runs without torchvision: no layer is one."""

        def forward(self, x: Any) -> Any:
            raise NotImplementedError


_OWNERS: dict[str, Any] = {
    "Module": nn.Module,
    "Conv2d": nn.Conv2d,
    "BatchNorm2d": nn.BatchNorm2d,
    "SyncBatchNorm": nn.SyncBatchNorm,
    "FrozenBatchNorm2d": FrozenBatchNorm2d,
    "ReLU": nn.ReLU,
    "Identity": nn.Identity,
    "MaxPool2d": nn.MaxPool2d,
    "Sequential": nn.Sequential,
    "F": F,
    "torch": torch,
    "Tensor": torch.Tensor,
}

LAYERS = (
    "Module.__call__", "Module._call_impl", "Conv2d.__call__", "Conv2d.forward", "Conv2d._conv_forward",
    "BatchNorm2d.__call__", "BatchNorm2d.forward", "BatchNorm2d._check_input_dim", "SyncBatchNorm.forward",
    "FrozenBatchNorm2d.forward", "ReLU.__call__", "ReLU.forward", "Identity.forward", "MaxPool2d.forward",
    "Sequential.forward", "F.conv2d", "F.batch_norm", "F.relu", "F.max_pool2d", "torch.batch_norm", "torch.relu",
    "torch.relu_", "torch.max_pool2d", "Tensor.__iadd__", "Conv2d.__getattr__", "BatchNorm2d.__getattr__",
)  # fmt: skip
"""The functions that every fused call skips."""

_INHERITED = ("__call__", "_call_impl", "__getattr__")  # defined by Module only, by no library's layers


class Watched:
    """The functions that a fused call in place of ``stock_class`` skips. They are checked before each call."""

    def __init__(self, stock_class: type[nn.Module], methods: Iterable[str]):
        owners = _OWNERS | {"stock": stock_class}
        names = [*LAYERS, *(f"stock.{name}" for name in ("__call__", "__getattr__", *methods))]
        self._places = [(owners[owner], name) for owner, _, name in (name.partition(".") for name in names)]
        # One expression, several times as fast as a loop: this runs at every call of every block.
        self._functions: Callable[[], tuple[Any, ...]] = eval(f"lambda: ({', '.join(names)})", owners)
        self._seen: tuple[Any, ...] = ()
        self._reason = ""

    def changed(self) -> str:
        """Return why the stock layers must run: the function that was replaced. Empty if none was."""
        return self._reason if self._functions() == self._seen else _look(self)

    def look(self) -> str:
        """Check every function, and keep the result for as long as the functions stay the same."""
        self._seen = self._functions()
        found = zip(self._places, self._seen, strict=True)
        replaced = [_name(*place) for place, function in found if not is_own(*place, function)]
        self._reason = f"expected the library's own {replaced[0]}, got another; it runs unfused" if replaced else ""
        return self._reason


@torch.compiler.assume_constant_result
def _look(watched: Watched) -> str:
    return watched.look()


def is_own(owner: Any, name: str, function: Any) -> bool:
    """Return whether ``function`` was defined under this name in the owner: in its module, if the owner is a class."""
    if isinstance(owner, types.ModuleType):
        home: Any = owner.__name__.partition(".")[0]
        if isinstance(function, types.BuiltinFunctionType):
            return function.__name__ == name
        own_module = isinstance(function, types.FunctionType) and function.__module__.partition(".")[0] == home
        return own_module and function.__globals__["__name__"].partition(".")[0] == home and _bears(function, name)
    if isinstance(function, types.MethodDescriptorType):
        return function.__name__ == name and issubclass(owner, function.__objclass__)
    holders = [c for c in owner.__mro__ if name in c.__dict__]
    if name in _INHERITED or (owner is nn.BatchNorm2d and name == "forward"):
        # A function that was put back by assignment stays in the class that had inherited it.
        return any(_wrote(c, function) for c in holders)
    return _wrote(holders[0], function)


def _wrote(holder: type, function: Any) -> bool:
    if not isinstance(function, types.FunctionType):
        return False
    names, module = function.__globals__, sys.modules.get(holder.__module__)
    # Code that runpy or exec ran may have the name of a module that is not loaded.
    written_there = names.get("__name__") == holder.__module__ if module is None else names is vars(module)
    return written_there and function.__qualname__ == f"{holder.__qualname__}.{function.__name__}"


def _bears(function: types.FunctionType, name: str) -> bool:
    # torch makes max_pool2d and its like from two functions, by ``boolean_dispatch``
    return function.__qualname__ == name or function.__globals__["__name__"] == "torch._jit_internal"


def _name(owner: Any, name: str) -> str:
    if isinstance(owner, types.ModuleType):
        return f"{owner.__name__}.{name}"
    return f"{owner.__module__}.{owner.__qualname__}.{name}"
