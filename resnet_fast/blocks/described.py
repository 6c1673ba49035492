"""Read a residual block of any library by a description of its layers (:mod:`.mapping`), and run what was read.

    y = act(main(x) + shortcut(x))

A main branch of two or three plain convolutions becomes one op, ``basic_block`` or ``bottleneck``. Any other branch
runs in pieces: one op per convolution with its norm and ReLU, and foreign modules (squeeze-and-excitation, blur)
between them as they are. The last piece adds the shortcut. A max-pooling after a convolution belongs to its piece.

The module only has to have the described children. It may be of a fused class (:mod:`.mapped`) or of its stock class
(:mod:`resnet_fast.hub`).
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import invariance, ops
from ..calls import Call, Pool
from . import frozen_norms, stage
from .children import child, conv_record, counting_together, norm_record, sync_group
from .mapping import BlockMapping, LayerPath
from .obstacles import conv_obstacle, is_altered, norm_obstacle, obstacle
from .plan import MappingPlan, Path, PlannedForm, PlannedLayer
from .stem import pool_obstacle, pool_record

IDLE_IN_EVAL: set[type[nn.Module]] = {nn.Dropout, nn.Dropout2d}
"""Modules that return their input in eval. A library's file adds its own."""

_NO_NORM = nn.Identity()

_OPS = {(True, False): "basic_block", (True, True, False): "bottleneck"}
"""Whether ReLU follows each convolution of the main branch -> the op of such a block."""


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
        return _OPS.get(acts, "")


def read(m: nn.Module, mapping: BlockMapping) -> Reading:
    """Return the layers of a block as they are now, or why they cannot be fused."""
    steps: list[Any] = []
    found: Any
    plan = mapping.plan
    for step in plan.main:
        if isinstance(step, PlannedLayer):
            found = _piece(m, step)
        elif isinstance(step, Pool):
            found = step
        else:
            found = at(m, step)
            if found is None or (_does_nothing(found) and not is_altered(found)):
                continue
            if not isinstance(found, nn.Module):
                found = obstacle(f"{'.'.join(step)} to be a module", found)
        if isinstance(found, str):
            return Reading(found)
        steps.append(found)
    relu = _relu(m, plan.act, plan.relu)
    if isinstance(relu, str):
        return Reading(relu)
    before: Any = None
    projection: Any = None
    form = _form(m, plan)
    if form is not None:
        if form.before is not None:
            before = at(m, form.before)
            if not isinstance(before, nn.Module):
                return Reading(obstacle(f"{'.'.join(form.before)} to be a module", before))
        if form.projection is not None:
            projection = _piece(m, form.projection)
            if isinstance(projection, str):
                return Reading(projection)
    return Reading("", tuple(steps), before, projection, relu)


def _piece(m: nn.Module, layer: PlannedLayer) -> Piece | str:
    """Return a layer, or why it cannot be fused."""
    conv = at(m, layer.conv)
    norm = _NO_NORM if layer.norm is None else at(m, layer.norm)
    kind: type[nn.Module] = nn.Conv2d
    if layer.inside:
        kind = type(conv) if isinstance(conv, nn.Conv2d) else kind
        norm = _NO_NORM if norm is None else norm
    relu = _relu(m, layer.act, layer.relu)
    if isinstance(relu, str):
        return relu
    conv_name, norm_name = layer.names
    return conv_obstacle(conv_name, conv, kind) or norm_obstacle(norm_name, norm) or Piece(conv, norm, relu)


def _relu(m: nn.Module, path: Path | None, called: bool) -> bool | str:
    """Return whether the activation is ReLU or none, or why it cannot be fused.

    Args:
        m: the block.
        path: to the activation; None if it is no module.
        called: whether ReLU is called where it is none.
    """
    if path is None:
        return called
    layer = at(m, path)
    if type(layer) is nn.ReLU and not is_altered(layer):
        return True
    if layer is None:
        return False
    if type(layer) is nn.Identity:
        return obstacle(f"{'.'.join(path)} to be a plain Identity", layer) if is_altered(layer) else False
    return obstacle(f"{'.'.join(path)} to be a plain ReLU", layer)


def _form(m: nn.Module, plan: MappingPlan) -> PlannedForm | None:
    """Return the form of the shortcut that this instance has; None if the shortcut is ``x``."""
    forms = plan.forms
    if not forms:
        return None
    first = child(m, forms[0].paths[0][0])
    if first is None or (_is_empty(first) and not is_altered(first)):
        return None
    for form in forms:
        if all([at(m, path) is not None for path in form.paths]):
            return form
    return forms[0]


def containers(m: nn.Module, mapping: BlockMapping) -> tuple[Path, ...]:
    """Return the paths of the modules on the way to the layers that this instance has."""
    form = _form(m, mapping.plan)
    return mapping.plan.containers if form is None else (*mapping.plan.containers, *form.containers)


def is_complete(m: nn.Module, mapping: BlockMapping) -> bool:
    """Return whether every child of the block, and of the modules on the way to its layers, is described."""
    form = _form(m, mapping.plan)
    paths = [path for step in mapping.main for path in (step if isinstance(step, LayerPath) else (step,))]
    named = {path for path in (*paths, mapping.activation) if isinstance(path, str)}
    named |= set() if form is None else {".".join(path) for path in form.paths}
    inside = containers(m, mapping)
    named |= {".".join(path) for path in inside}
    for path in ((), *inside):
        container = at(m, path)
        for name, part in () if container is None else container._modules.items():
            if part is not None and not _is_empty(part) and ".".join((*path, name)) not in named:
                return False
    return True


def groups(reading: Reading) -> set[str]:
    """Return the process groups that share the statistics of the block's norms."""
    return {sync_group(p.norm) for p in reading.pieces() if type(p.norm) is nn.SyncBatchNorm} - {""}


def unlike_reference(reading: Reading, residual: bool) -> str:
    """Return what the reference rounds in another order than the stock block; empty if nothing."""
    if reading.before is not None:
        return "a shortcut with another layer than its projection"
    for piece in reading.pieces():
        if type(piece.norm) is not nn.BatchNorm2d and frozen_norms.is_frozen(piece.norm):
            return type(piece.norm).__name__
    return "" if reading.op(residual) else "a block in pieces"


class Runner(NamedTuple):
    """How a block that was read runs.

    Attributes:
        reading: its layers.
        residual: whether its description has a sum.
        training: whether the block is in training mode.
        backend: a name of :data:`resnet_fast.flags.BACKENDS`.
        save: what training keeps for the backward pass.
    """

    reading: Reading
    residual: bool
    training: bool
    backend: str = "auto"
    save: str = "raw"

    def run(self, x: Tensor) -> Tensor:
        """Return act(main(x) + shortcut(x)) from one op call or in pieces."""
        op = self.reading.op(self.residual)
        with counting_together():
            if not op:
                return self._in_pieces(x)
            shortcut = None if self.reading.before is None else self._shortcut(x)
            return ops.run(block_call(x, self.reading, op, shortcut), self.backend, self.save)

    def _shortcut(self, x: Tensor) -> Tensor:
        """Return the shortcut of ``x``, computed by itself."""
        reading = self.reading
        if reading.before is not None:
            x = invariance.singly(reading.before, x)
        return x if reading.projection is None else self._run_piece(x, reading.projection._replace(relu=False))

    def _in_pieces(self, x: Tensor) -> Tensor:
        """Run one op per convolution, and the modules between them."""
        if stage.converts(x, self.training, self.backend):
            return self._in_pieces(x.contiguous(memory_format=torch.channels_last)).contiguous()
        residual, steps = self.residual, list(self.reading.steps)
        shortcut = self._shortcut(x) if residual else None
        y, last = x, len(steps) - 1
        for i, step in enumerate(steps):
            if isinstance(step, Piece):
                pool = steps[i + 1] if i < last and step.relu else None
                if i == last and residual and not step.relu:
                    return self._run_piece(y, step._replace(relu=self.reading.relu), added=shortcut)
                if pool is not None and pools(pool):
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
        return F.relu(y) if self.reading.relu else y

    def _run_piece(self, x: Tensor, piece: Piece, added: Tensor | None = None, pool: Pool | None = None) -> Tensor:
        op = "conv_bn_act" if pool is None else "stem"
        call = Call(op, x, (conv_record(piece.conv),), (norm_record(piece.norm),), added, piece.relu, pool)
        return ops.run(call, self.backend)


def block_call(x: Tensor, reading: Reading, op: str, shortcut: Tensor | None) -> Call:
    """Return the call of a block of one op."""
    layers = reading.steps if shortcut is not None else reading.pieces()
    convs, norms = tuple([conv_record(p.conv) for p in layers]), tuple([norm_record(p.norm) for p in layers])
    return Call(op, x, convs, norms, shortcut, projection=len(layers) > len(reading.steps))


def at(m: Any, path: Any) -> Any:
    """Return the attribute at a path in parts; None if there is none."""
    for name in path:
        if not isinstance(m, nn.Module):
            return None
        fields = m.__dict__  # as :func:`child` does, without a call
        m = fields[name] if name in fields else fields["_modules"].get(name)
    return m


def pools(step: Any) -> bool:
    """Return whether a step is a max-pooling that can be part of a convolution's op."""
    return isinstance(step, Pool) or (type(step) is nn.MaxPool2d and not pool_obstacle(step))


def _does_nothing(m: Any) -> bool:
    """Return whether a module returns its input: as :func:`_is_empty` says, or as a kind of dropout in eval."""
    return _is_empty(m) or (type(m) in IDLE_IN_EVAL and not m.training)


def _is_empty(m: Any) -> bool:
    """Return whether a module is an Identity or a Sequential without layers."""
    return type(m) is nn.Identity or (type(m) is nn.Sequential and not m._modules)
