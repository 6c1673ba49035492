"""Keep the parts of a net's call while its layers are the same.

Reading a net's layers into the parts of a :class:`~resnet_fast.calls.NetCall` looks at every attribute, hook and
tensor of every block. In eval the next call finds the same, so the parts are kept with a snapshot of the layers, and
a call compares the snapshot instead. Whether the *values* of the parameters changed is a question of its own, which
:mod:`resnet_fast.parameter_cache` answers.

What is kept is an attribute of the net, so that both are freed together. Copies and pickles of the net have none of it
(:meth:`~.net.Net.__getstate__`).
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from .. import ops
from ..calls import NetCall
from . import stage
from .frozen import HELD, OfOneNet, is_frozen
from .fused import Fused
from .snapshot import Layers

_version = attrgetter("_version")


class Seen(OfOneNet):
    """The identities of the tensors of a call, for the next one."""

    def __init__(self, net: nn.Module, parts: tuple[Any, ...]):
        super().__init__(net)
        self.tensors = [id(t) for part in parts for t in part.parameters()]


class Held(OfOneNet):
    """The parts of a net's call, what is known about them, and the layers that they were read from.

    Attributes:
        obstacle: why the layers cannot be compared; empty if they can.
        parts: stem and blocks.
    """

    def __init__(self, net: Any, x: Tensor):
        super().__init__(net)
        self._layers = Layers(net)
        self.obstacle = self._layers.obstacle
        self._known: dict[tuple[int, int], ops.Known] = {}
        self._classes = list({type(m) for m in net.modules() if isinstance(m, Fused)})
        self._functions = self._read_functions()
        # Off the CPU only BatchNorm's batch counter shows that its statistics changed (parameter_cache.follow).
        counters = [m._buffers.get("num_batches_tracked") for m in net.modules()]
        self._counters = [t for t in counters if t is not None and not t.is_inference()]
        self._versions = list(map(_version, self._counters))
        # Read after the snapshot, so that a concurrent change counts. A part keeps its input: an empty one.
        self.parts: tuple[Any, ...] | None = None if self.obstacle else net.parts(x.new_empty(0))

    def _read_functions(self) -> list[Any]:
        """Return what the classes of the blocks would run, and whether a library's function was replaced."""
        found: list[Any] = [(cls.watched.changed(), cls._methods_of(cls)) for cls in self._classes]
        return [stage.is_own(), *found]

    def holds(self) -> bool:
        """Return whether a call would read the same layers and tensors again."""
        return (
            self._layers.hold()
            and self._layers.same_tensors()
            and list(map(_version, self._counters)) == self._versions
            and self._read_functions() == self._functions
        )

    def known(self, segment: tuple[Any, ...]) -> ops.Known:
        """Return what is known about consecutive parts."""
        key = id(segment[0]), len(segment)
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = ops.Known(NetCall(segment[0].x, segment))
        return found


def of(net: Any, x: Tensor) -> tuple[tuple[Any, ...] | None, Held | None]:
    """Return the parts of the net's call (None if it cannot be one call), and what is kept of the net.

    Nothing is kept before the second call in a row with the same tensors: a snapshot takes as long as ten readings, and
    would be lost at each call of a net whose parameters are exchanged all the time.
    """
    fields = net.__dict__
    kept = fields.get(HELD)
    mine = kept if kept is not None and kept.belongs_to(net) else None
    frozen = is_frozen(net)
    if isinstance(mine, Held) and (frozen or mine.holds()):
        return mine.parts, mine
    fields.pop(HELD, None)
    parts = net.parts(x)
    if parts is None or "_is_replica" in fields:
        return parts, None
    seen = Seen(net, parts)
    if not frozen and not (isinstance(mine, Seen) and mine.tensors == seen.tensors):
        fields[HELD] = seen
        return parts, None
    held = Held(net, x)
    if held.parts is not None:
        fields[HELD] = held
    return parts, None


def forget(net: nn.Module) -> None:
    """Drop what is kept of the net's layers."""
    net.__dict__.pop(HELD, None)
