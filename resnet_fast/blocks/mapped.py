"""A residual block of any library, fused by a description of its layers (:mod:`.mapping`).

    y = act(main(x) + shortcut(x))

A main branch of two or three plain convolutions becomes one op, ``basic_block`` or ``bottleneck``. Any other branch
runs in pieces: one op per convolution with its norm and ReLU, and foreign modules (squeeze-and-excitation, blur)
between them as they are. The last piece adds the shortcut. A max-pooling after a convolution belongs to its piece.

The description is a claim about foreign code. :mod:`.probe` compares it with the block's own forward, once per class
and kind of container on the way to the layers, before the first fused call.
"""

import types
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import invariance, ops
from ..calls import Call, Pool
from ..errors import UserError
from . import frozen_norms, probe, stage
from .children import child, conv_record, counting_together, counts, norm_record, sync_group
from .fused import Fused
from .mapping import BlockMapping, Form, LayerPath
from .obstacles import conv_obstacle, is_altered, norm_obstacle, obstacle
from .stem import pool_obstacle, pool_record

IDLE_IN_EVAL: set[type[nn.Module]] = {nn.Dropout, nn.Dropout2d}
"""Modules that return their input in eval. A library's file adds its own."""

_NO_NORM = nn.Identity()
_CORRECT = "correct the mapping in register_block()"


class Piece(NamedTuple):
    """A convolution with its norm, and whether ReLU follows."""

    conv: Any
    norm: Any
    relu: bool


class Reading(NamedTuple):
    """What a block consists of at the moment of a call.

    Attributes:
        reason: why the block cannot be fused; empty if it can. The other fields are then undefined.
        steps: pieces, modules that run by themselves, and poolings.
        before: the module that the shortcut starts with: its pooling, or all of it; None if there is none.
        projection: the shortcut's convolution; None if it has none.
        relu: whether ReLU follows the sum.
    """

    reason: str
    steps: tuple[Any, ...] = ()
    before: Any = None
    projection: Piece | None = None
    relu: bool = False

    def pieces(self) -> list[Piece]:
        """Return every piece, the projection last."""
        found = [step for step in self.steps if isinstance(step, Piece)]
        return found if self.projection is None else [*found, self.projection]

    def op(self, residual: bool) -> str:
        """Return the op that computes the main branch and the sum; empty if the block runs in pieces."""
        if not residual or not self.relu:
            return ""
        acts = tuple([isinstance(step, Piece) and step.relu for step in self.steps])
        if not isinstance(self.steps[-1], Piece):
            return ""
        return {(True, False): "basic_block", (True, True, False): "bottleneck"}.get(acts, "")


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
    _containers: ClassVar[tuple[tuple[str, ...], ...]]

    # No deferred annotations in this file: torch.fx copies this signature, which must print as the stock block's.
    def forward(self, x: Tensor) -> Tensor:
        return self.stock_forward(x) if torch.jit.is_scripting() else self.fused_forward(x)

    def fused_forward(self, x: Tensor) -> Tensor:
        """Return act(main(x) + shortcut(x)) from one op call or in pieces, or run the stock forward and say why."""
        if self.runs_stock(x):
            return self.stock_class.forward(self, x)
        reading = self.read()
        op = reading.op(self.mapping.residual)
        with counting_together():
            return self._whole(x, reading, op) if op else self._in_pieces(x, reading)

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
        kinds = cls._kinds(m)
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
        reading = self._read()
        if reading.reason:
            return reading
        kinds = self._kinds(self)
        if isinstance(kinds, str):
            return Reading(kinds)
        found = self.checked.get(kinds)
        if found is None:
            if torch.compiler.is_compiling():
                return Reading("expected containers that a call or accelerate() has seen, got others; it runs unfused")
            # not type(self): FSDP2 derives a class of its own from ours
            found = self.checked[kinds] = probe.compare(fused_class(self.stock_class, self.mapping), self)
        return Reading(found) if found else reading

    @classmethod
    def _kinds(cls, m: nn.Module) -> tuple[Any, ...] | str:
        """Return the classes of the containers in a stock or fused block, or why one of them may not be passed by."""
        found = []
        form = _form(cls.mapping, m)
        for path in (*cls._containers, *(() if form is None or len(form) == 1 else _containers_of(form[-2:]))):
            container = at(m, path)
            if container is not None and is_altered(container):
                return obstacle(f"{'.'.join(path)} to be a plain module", container)
            found.append((type(container), getattr(type(container), "forward", None)))
        return tuple(found)

    def _read(self) -> Reading:
        steps: list[Any] = []
        found: Any
        for step in self.mapping.main:
            if isinstance(step, LayerPath):
                found = self._piece(step.conv, step.norm, step.act)
            elif isinstance(step, str):
                found = at(self, step.split("."))
                if found is None or (_does_nothing(found) and not is_altered(found)):
                    continue
                if not isinstance(found, nn.Module):
                    found = obstacle(f"{step} to be a module", found)
            else:
                found = step
            if isinstance(found, str):
                return Reading(found)
            steps.append(found)
        relu = self._relu(self.mapping.activation)
        if isinstance(relu, str):
            return Reading(relu)
        before: Any = None
        projection: Any = None
        form = _form(self.mapping, self)
        if form is not None:
            if len(form) != 2:
                before = at(self, form[0].split("."))
                if not isinstance(before, nn.Module):
                    return Reading(obstacle(f"{form[0]} to be a module", before))
            if len(form) > 1:
                projection = self._piece(form[-2], form[-1], None)
                if isinstance(projection, str):
                    return Reading(projection)
        return Reading("", tuple(steps), before, projection, relu)

    def _piece(self, conv_path: str, norm_path: str | None, act: Any) -> Piece | str:
        """Return a layer, or why it cannot be fused."""
        conv = at(self, conv_path.split("."))
        norm = _NO_NORM if norm_path is None else at(self, norm_path.split("."))
        inside = norm_path is not None and norm_path.startswith(conv_path + ".")
        kind = type(conv) if inside and isinstance(conv, nn.Conv2d) else nn.Conv2d
        relu = self._relu(act)
        if isinstance(relu, str):
            return relu
        if inside and norm is None:
            norm = _NO_NORM
        return (
            conv_obstacle(conv_path, conv, kind)
            or norm_obstacle(norm_path or "no norm", norm)
            or Piece(conv, norm, relu)
        )

    def _relu(self, act: Any) -> bool | str:
        """Return whether an activation is ReLU or none, or why it cannot be fused."""
        if not isinstance(act, str):
            return act is not None
        layer = at(self, act.split("."))
        if layer is None or type(layer) is nn.Identity:
            return False if layer is None or not is_altered(layer) else obstacle(f"{act} to be a plain Identity", layer)
        if type(layer) is not nn.ReLU or is_altered(layer):
            return obstacle(f"{act} to be a plain ReLU", layer)
        return True

    def _whole(self, x: Tensor, reading: Reading, op: str) -> Tensor:
        shortcut = None if reading.before is None else self._shortcut(x, reading)
        return ops.run(self._call(x, reading, op, shortcut), self.backend, self.save)

    def _call(self, x: Tensor, reading: Reading, op: str, shortcut: Tensor | None) -> Call:
        """Return the call of a block of one op."""
        layers = reading.steps if shortcut is not None else reading.pieces()
        convs, norms = tuple([conv_record(p.conv) for p in layers]), tuple([norm_record(p.norm) for p in layers])
        return Call(op, x, convs, norms, shortcut, projection=len(layers) > len(reading.steps))

    def _shortcut(self, x: Tensor, reading: Reading) -> Tensor:
        """Return the shortcut of ``x``, computed by itself."""
        if reading.before is not None:
            x = invariance.singly(reading.before, x)
        return x if reading.projection is None else self._run_piece(x, reading.projection._replace(relu=False))

    def _in_pieces(self, x: Tensor, reading: Reading) -> Tensor:
        """Run one op per convolution, and the modules between them."""
        if stage.converts(x, self.training, self.backend):
            return self._in_pieces(x.contiguous(memory_format=torch.channels_last), reading).contiguous()
        residual, steps = self.mapping.residual, list(reading.steps)
        shortcut = self._shortcut(x, reading) if residual else None
        y, last = x, len(steps) - 1
        for i, step in enumerate(steps):
            if isinstance(step, Piece):
                pool = steps[i + 1] if i < last and step.relu else None
                if i == last and residual and not step.relu:
                    return self._run_piece(y, step._replace(relu=reading.relu), added=shortcut)
                if pool is not None and _pools(pool):
                    steps[i + 1] = None
                    y = self._run_piece(y, step, pool=pool if isinstance(pool, Pool) else pool_record(pool))
                else:
                    y = self._run_piece(y, step)
            elif isinstance(step, Pool):
                y = F.max_pool2d(y, *step)
            elif step is not None:
                y = invariance.singly(step, y)
        if shortcut is None:
            return y
        y = y + shortcut
        return F.relu(y) if reading.relu else y

    def _run_piece(self, x: Tensor, piece: Piece, added: Tensor | None = None, pool: Pool | None = None) -> Tensor:
        op = "conv_bn_act" if pool is None else "stem"
        call = Call(op, x, (conv_record(piece.conv),), (norm_record(piece.norm),), added, piece.relu, pool)
        return ops.run(call, self.backend)

    def parts(self, x: Tensor) -> tuple[Call, ...] | None:
        """Return this block as part of a :class:`~resnet_fast.calls.NetCall`; None if it is not one op."""
        reading = self.read()
        op = reading.op(self.mapping.residual)
        if not op or reading.before is not None or any([counts(p.norm) for p in reading.pieces()]):
            return None
        return (self._call(x, reading, op, None),)

    def sync_obstacle(self, x: Tensor) -> str:
        groups = {sync_group(p.norm) for p in self.read().pieces()} - {""}
        return self.group_obstacle(groups, x) if groups else ""

    def unlike_reference(self) -> str:
        """Return what the reference rounds in another order than the stock block; empty if nothing."""
        reading = self.read()
        if reading.before is not None:
            return "a shortcut with another layer than its projection"
        for piece in reading.pieces():
            if type(piece.norm) is not nn.BatchNorm2d and frozen_norms.is_frozen(piece.norm):
                return type(piece.norm).__name__
        return "" if reading.op(self.mapping.residual) else "a block in pieces"

    def op_convs(self) -> list[nn.Module]:
        return [piece.conv for piece in self.read().pieces()]

    def op_name(self) -> str:
        reading = self.read()
        one = self.op == "stem" and len(reading.pieces()) == 1 and _pools(reading.steps[-1])
        return reading.op(self.mapping.residual) or ("stem" if one else "pieces")

    def op_layers(self) -> list[nn.Module]:
        return [self]


def _form(mapping: BlockMapping, m: nn.Module) -> Form | None:
    """Return the form of the shortcut that an instance has; None if the shortcut is ``x``."""
    forms = mapping.shortcut
    if forms is None:
        return None
    first = at(m, (forms[0][0].partition(".")[0],))
    if first is None or (_is_empty(first) and not is_altered(first)):
        return None
    for form in forms:
        if all([at(m, path.split(".")) is not None for path in form]):
            return form
    return forms[0]


def _does_nothing(m: Any) -> bool:
    """Return whether a module returns its input: as :func:`_is_empty` says, or as a kind of dropout in eval."""
    return _is_empty(m) or (type(m) in IDLE_IN_EVAL and not m.training)


def _is_empty(m: Any) -> bool:
    """Return whether a module is an Identity or a Sequential without layers."""
    return type(m) is nn.Identity or (type(m) is nn.Sequential and not m._modules)


def at(m: Any, path: Any) -> Any:
    """Return the attribute at a path in parts; None if there is none."""
    for name in path:
        if not isinstance(m, nn.Module):
            return None
        m = child(m, name)
    return m


def _exists(m: Any, path: str) -> bool:
    for name in path.split("."):
        if m is None:  # for example a shortcut that this instance does not have
            return True
        if not hasattr(m, name):
            return False
        m = getattr(m, name)
    return True


def _containers_of(paths: Any) -> list[tuple[str, ...]]:
    """Return the modules on the way to the layers, each once."""
    found: dict[tuple[str, ...], None] = {}
    for path in paths:
        parts = tuple(path.split("."))
        for end in range(1, len(parts)):
            found[parts[:end]] = None
    return list(found)


def _pools(step: Any) -> bool:
    """Return whether a step is a max-pooling that can be part of a convolution's op."""
    return isinstance(step, Pool) or (type(step) is nn.MaxPool2d and not pool_obstacle(step))


_classes: dict[tuple[type[nn.Module], BlockMapping], type[MappedBlock]] = {}


def fused_class(stock_class: type[nn.Module], mapping: BlockMapping) -> type[MappedBlock]:
    """Return the fused class of a stock class with this mapping, derived once."""
    if (stock_class, mapping) not in _classes:
        _classes[stock_class, mapping] = _derive(stock_class, mapping)
    return _classes[stock_class, mapping]


def _derive(stock_class: Any, mapping: BlockMapping) -> type[MappedBlock]:
    """Return a new class. It has the stock class's name, and its forward the stock parameter's name."""
    op = {2: "basic_block", 3: "bottleneck"}.get(len(mapping.layers()), "conv_bn_act") if mapping.residual else "stem"
    names = stock_class.forward.__code__.co_varnames
    code = MappedBlock.forward.__code__.replace(co_varnames=("self", names[1]))
    forward = types.FunctionType(code, MappedBlock.forward.__globals__, "forward")
    forward.__qualname__ = f"{stock_class.__qualname__}.forward"
    forward.__annotations__ = {names[1]: Tensor, "return": Tensor}
    main = [p for step in mapping.main for p in (step if isinstance(step, LayerPath) else ()) if isinstance(p, str)]
    fields: dict[str, Any] = {
        "__doc__": stock_class.__doc__,
        "__module__": __name__,
        "__qualname__": stock_class.__qualname__,
        "stock_class": stock_class,
        "op": op,
        "mapping": mapping,
        "checked": {},
        "forward": forward,
        "_containers": tuple(_containers_of(main)),
    }
    bases = (MappedBlock, stock_class)
    return types.new_class(stock_class.__name__, bases, exec_body=lambda namespace: namespace.update(fields))


def rebuild(stock_class: type[nn.Module], mapping: BlockMapping) -> MappedBlock:
    """Return an empty fused block, for copies and pickles, which bring their mapping along."""
    cls = fused_class(stock_class, mapping)
    return cls.__new__(cls)
