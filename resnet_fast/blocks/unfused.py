"""Residual blocks that no fused class stands for: they are named and counted, not passed over in silence.

A subclass may do anything in its ``forward``, and other libraries' blocks (Res2Net's, SKNet's) compute something else:
``accelerate`` leaves both as they are. Whoever asks for a fast net should hear of it, so a net counts them at each call
as it does a block of its own that ran its stock layers.
"""

from __future__ import annotations

import weakref
from collections import Counter
from typing import NamedTuple

from torch import nn

from ..dispatch import record
from .fused import KNOWN, Fused, child

SHORTCUTS = ("downsample", "shortcut")
"""Names that residual blocks give to what is on their shortcut."""


class Unfused(NamedTuple):
    """A block that runs as it is: the op that would have served it (``block`` where none is known), and why not."""

    module: weakref.ref[nn.Module]
    op: str
    reason: str


_found: weakref.WeakKeyDictionary[nn.Module, list[Unfused]] = weakref.WeakKeyDictionary()


def find(root: nn.Module, accelerating: bool = False) -> list[Unfused]:
    """The blocks in ``root`` that run unfused though they look like residual blocks.

    ``accelerating``: those which ``accelerate`` is about to exchange are not among them.
    """
    found = []
    for m in root.modules():
        if not isinstance(m, Fused):
            op, reason = _obstacle(m, accelerating)
            if reason:
                found.append(Unfused(weakref.ref(m), op, reason))
    return found


def forget(root: nn.Module) -> None:
    """Look again at the next call of each net in ``root``."""
    for m in root.modules():
        _found.pop(m, None)


def of(net: nn.Module) -> list[Unfused]:
    """What :func:`find` gives for a net; kept, since nets are looked through once and called often."""
    found = _found.get(net)
    if found is None:
        found = _found[net] = find(net)
    return found


def count(unfused: list[Unfused]) -> None:
    """Count a call of each. ``accelerate`` has logged them; in strict mode the first one raises."""
    for each in unfused:
        record.stock(each.module(), each.op, each.reason, quiet=True)


def announce(model: nn.Module) -> None:
    """Log what ``accelerate`` leaves as it is, once per class, and count it. Raises BackendError in strict mode."""
    kinds = Counter((type(each.module()), each.reason) for each in find(model, accelerating=True))
    for (kind, reason), n in kinds.items():
        blocks = "1 block" if n == 1 else f"{n} blocks"
        record.fall_back(f"{blocks} of {_full(kind)} {'is' if n == 1 else 'are'} not fused: {reason}")


def _obstacle(m: nn.Module, accelerating: bool) -> tuple[str, str]:
    """The op and the reason for a module that is not fused; two empty strings for what is no residual block."""
    kind = type(m)
    base = next((c for c in kind.__mro__ if c in KNOWN), None)
    if base is None:
        named = "a residual block of torchvision, timm or resnet_fast.paper_nets"
        return ("block", f"expected {named}, got {_full(kind)}; it runs unfused") if _looks_residual(m) else ("", "")
    if hasattr(KNOWN[base], "stages"):  # a whole net is no block
        return "", ""
    if kind is base:
        late = f"expected a block that accelerate() has seen, got a {_full(kind)} added since; call accelerate() again"
        return ("", "") if accelerating else (KNOWN[base].op, late)
    return KNOWN[base].op, f"expected {_full(base)} itself, got its subclass {_full(kind)}; it runs unfused"


def _looks_residual(m: nn.Module) -> bool:
    """Has it a first convolution, more of them, and a shortcut, and no blocks inside?"""
    children = m._modules
    if children.get("conv1") is None or not any(s in m.__dict__ or s in children for s in SHORTCUTS):
        return False
    shortcuts = [s for s in map(child, [m] * len(SHORTCUTS), SHORTCUTS) if isinstance(s, nn.Module)]
    beside = {id(part) for s in shortcuts for part in s.modules()}
    inner = [part for part in m.modules() if id(part) not in beside]
    return sum(isinstance(part, nn.Conv2d) for part in inner) > 1 and not any(isinstance(p, Fused) for p in inner)


def _full(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
