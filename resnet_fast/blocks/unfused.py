"""Report residual blocks that have no fused class.

A subclass may do anything in its ``forward``, and other libraries' blocks (Res2Net's, SKNet's) compute something else,
so ``accelerate`` leaves both as they are. It logs them once per class, and a net counts them at each call, as it counts
a fused block that ran its stock layers.
"""

from __future__ import annotations

import weakref
from collections import Counter
from typing import NamedTuple

import torch
from torch import nn

from ..dispatch import record
from .children import child
from .fused import KNOWN, Fused

SHORTCUTS = ("downsample", "shortcut")
"""Attributes under which residual blocks keep the layers of their shortcut."""


class Unfused(NamedTuple):
    """A block without a fused class.

    Attributes:
        module: the block.
        op: the op that its stock class would run as; ``block`` where none is known.
        reason: why it is not fused.
    """

    module: weakref.ref[nn.Module]
    op: str
    reason: str


_found: weakref.WeakKeyDictionary[nn.Module, list[Unfused]] = weakref.WeakKeyDictionary()


def find(root: nn.Module, accelerating: bool = False) -> list[Unfused]:
    """Return the modules in ``root`` that look like residual blocks and have no fused class.

    Args:
        root: the model to search.
        accelerating: leave out the blocks whose class ``accelerate`` is about to exchange.
    """
    found = []
    for m in root.modules():
        if not isinstance(m, Fused):
            op, reason = _obstacle(m, accelerating)
            if reason:
                found.append(Unfused(weakref.ref(m), op, reason))
    return found


def forget(root: nn.Module) -> None:
    """Make the next call of each net in ``root`` search again."""
    for m in root.modules():
        _found.pop(m, None)


def of(net: nn.Module) -> list[Unfused]:
    """Return :func:`find` for a net, from a cache after the first call."""
    found = _found.get(net)
    if found is None:
        found = _found[net] = find(net)
    return found


def count(unfused: list[Unfused]) -> None:
    """Count a call of each; in strict mode raise BackendError for the first. ``accelerate`` has logged them."""
    for each in unfused:
        record.stock(each.module(), each.op, each.reason, quiet=True)


def announce(model: nn.Module) -> None:
    """Log and count, once per class, what ``accelerate`` leaves as it is; in strict mode raise BackendError."""
    kinds = Counter((type(each.module()), each.reason) for each in find(model, accelerating=True))
    for (kind, reason), n in kinds.items():
        blocks = "1 block" if n == 1 else f"{n} blocks"
        record.fall_back(f"{blocks} of {_full(kind)} {'is' if n == 1 else 'are'} not fused: {reason}")


def _obstacle(m: nn.Module, accelerating: bool) -> tuple[str, str]:
    """Return the op and the reason for a module that is not fused; two empty strings if it is no residual block."""
    kind = type(m)
    if isinstance(m, torch.jit.ScriptModule):
        got = f"one that TorchScript compiled, {m.original_name}; it runs unfused"
        return ("block", f"expected a block in Python, got {got}") if m.original_name in _names() else ("", "")
    base = next((c for c in kind.__mro__ if c in KNOWN), None)
    if base is None:
        named = "a residual block of a library that accelerate() knows, or one that register_block() describes"
        return ("block", f"expected {named}, got {_full(kind)}; it runs unfused") if _looks_residual(m) else ("", "")
    if hasattr(KNOWN[base], "stages"):  # a whole net is no block
        return "", ""
    if kind is base:
        late = f"expected a block that accelerate() changed, got a {_full(kind)} added later; call accelerate() again"
        return ("", "") if accelerating else (KNOWN[base].op, late)
    return KNOWN[base].op, f"expected {_full(base)} itself, got its subclass {_full(kind)}; it runs unfused"


def _looks_residual(m: nn.Module) -> bool:
    """Return whether a module has several convolutions, the first named conv1, a shortcut, and no blocks inside."""
    children = m._modules
    if children.get("conv1") is None or not any(s in m.__dict__ or s in children for s in SHORTCUTS):
        return False
    shortcuts = [s for s in map(child, [m] * len(SHORTCUTS), SHORTCUTS) if isinstance(s, nn.Module)]
    on_shortcut = {id(part) for s in shortcuts for part in s.modules()}
    inner = [part for part in m.modules() if id(part) not in on_shortcut]
    return sum(isinstance(part, nn.Conv2d) for part in inner) > 1 and not any(isinstance(p, Fused) for p in inner)


def _names() -> set[str]:
    """Return the short names of the stock blocks, which is all that TorchScript keeps of a class."""
    return {cls.__name__ for cls, fused in KNOWN.items() if not hasattr(fused, "stages")}


def _full(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
