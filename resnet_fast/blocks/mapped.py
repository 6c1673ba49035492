"""A residual block of any library as a fused class, made of its stock class and a description (:mod:`.described`).

The description is a claim about foreign code. :mod:`.probe` compares it with the block's own forward, once per class
and kind of container on the way to the layers, before the first fused call.
"""

import types
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..calls import Call
from ..errors import UserError
from . import described, probe
from .children import counts
from .described import Reading, Runner
from .fused import Fused, cache_obstacle, runs_for_tracer
from .mapping import BlockMapping

_CORRECT = "correct the mapping in register_block()"


class MappedBlock(Fused):
    """A stock block with a mapping. :func:`fused_class` derives a class from this and from each stock class.

    Attributes:
        mapping: the description of the block.
        checked: what :mod:`.probe` found for each kind of container; an empty text where the description is right.
    """

    layers = ()
    acts = ()
    mapping: ClassVar[BlockMapping]
    checked: ClassVar[dict[Any, str]]

    # No deferred annotations in this file: torch.fx copies this signature, which must print as the stock block's.
    def forward(self, x: Tensor) -> Tensor:
        return self.stock_forward(x) if torch.jit.is_scripting() else self.fused_forward(x)

    def fused_forward(self, x: Tensor) -> Tensor:
        """Return act(main(x) + shortcut(x)) from one op call or in pieces, or run the stock forward and say why."""
        reading = self._reading_for(x)
        if reading is None:
            return self.stock_class.forward(self, x)
        return Runner(reading, self.mapping.residual, self.training, self.backend, self.save).run(x)

    def _reading_for(self, x: Tensor) -> Reading | None:
        """Return the layers, read once per call; None if it must run the stock ones, which is counted."""
        if runs_for_tracer(x):
            return None
        reason = self.watched.changed()
        reading = Reading(reason) if reason else self.read()
        reason = reading.reason or self.input_obstacle(x)
        if not reason:
            groups = described.groups(reading)
            reason = (self.group_obstacle(groups, x) if groups else "") or cache_obstacle(self)
        residual = self.mapping.residual
        counted = self.counts_as_stock(x, reason, lambda: described.unlike_reference(reading, residual))
        return None if counted else reading

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(protocol)
        if "mapping" not in type(self).__dict__:  # FSDP2 derives a class of its own from ours
            return reduced
        return rebuild, (self.stock_class, self.mapping), *reduced[2:]

    @classmethod
    def class_for(cls, m: nn.Module) -> type[Fused]:
        for path in cls.mapping.required():
            if not _exists(m, path):
                raise cls._lacks(path)
        reason = probe.check(cls, m)
        if reason:
            head = "" if cls.mapping.shortcut is None else cls.mapping.shortcut[0][0].partition(".")[0]
            if head and not hasattr(m, head):  # the shortcut was taken as x, which may be the mistake
                raise cls._lacks(head)
            raise UserError(*reason, _CORRECT)
        kinds = probe.kinds(cls.mapping, m)
        if not isinstance(kinds, str):
            cls.checked[kinds] = ""  # what a compiler meets is what was compared here
        return cls

    @classmethod
    def _lacks(cls, path: str) -> UserError:
        return UserError(f"a {cls.stock_class.__qualname__} with the attribute {path}", "one without it", _CORRECT)

    def unfusable(self) -> str:
        return self.watched.changed() or self.read().reason

    def read(self) -> Reading:
        """Return the layers as they are now, or why they cannot be fused."""
        reading = described.read(self, self.mapping)
        reason = reading.reason or probe.unlike(self.stock_class, self.mapping, self, self.checked)
        return Reading(reason) if reason else reading

    def parts(self, x: Tensor) -> tuple[Call, ...] | None:
        """Return this block as part of a :class:`~resnet_fast.calls.NetCall`; None if it is not one op."""
        reading = self.read()
        op = reading.op(self.mapping.residual)
        if not op or reading.before is not None or any([counts(p.norm) for p in reading.pieces()]):
            return None
        return (described.block_call(x, reading, op, None),)

    def op_convs(self) -> list[nn.Module]:
        return [piece.conv for piece in self.read().pieces()]

    def op_name(self) -> str:
        reading = self.read()
        one = self.op == "stem" and len(reading.pieces()) == 1 and described.pools(reading.steps[-1])
        return reading.op(self.mapping.residual) or ("stem" if one else "pieces")

    def op_layers(self) -> list[nn.Module]:
        return [self]


def _exists(m: Any, path: str) -> bool:
    for name in path.split("."):
        if m is None:  # for example a shortcut that this instance does not have
            return True
        if not hasattr(m, name):
            return False
        m = getattr(m, name)
    return True


_classes: dict[tuple[type[nn.Module], BlockMapping], type[MappedBlock]] = {}


def fused_class(stock_class: type[nn.Module], mapping: BlockMapping) -> type[MappedBlock]:
    """Return the fused class of a stock class with this mapping, derived once."""
    if (stock_class, mapping) not in _classes:
        _classes[stock_class, mapping] = _derive(stock_class, mapping)
    return _classes[stock_class, mapping]


def _derive(stock_class: Any, mapping: BlockMapping) -> type[MappedBlock]:
    """Return a new class. It has the stock class's name, and its forward the stock parameter's name."""
    names = stock_class.forward.__code__.co_varnames
    code = MappedBlock.forward.__code__.replace(co_varnames=("self", names[1]))
    forward = types.FunctionType(code, MappedBlock.forward.__globals__, "forward")
    forward.__qualname__ = f"{stock_class.__qualname__}.forward"
    forward.__annotations__ = {names[1]: Tensor, "return": Tensor}
    fields: dict[str, Any] = {
        "__doc__": stock_class.__doc__,
        "__module__": __name__,
        "__qualname__": stock_class.__qualname__,
        "stock_class": stock_class,
        "op": mapping.op(),
        "mapping": mapping,
        "checked": {},
        "forward": forward,
    }
    bases = (MappedBlock, stock_class)
    return types.new_class(stock_class.__name__, bases, exec_body=lambda namespace: namespace.update(fields))


def rebuild(stock_class: type[nn.Module], mapping: BlockMapping) -> MappedBlock:
    """Return an empty fused block, for copies and pickles, which bring their mapping along."""
    cls = fused_class(stock_class, mapping)
    return cls.__new__(cls)
