"""``register_block(cls, mapping)``: describe a residual block of another library, so that ``accelerate`` fuses it."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from torch import nn

from ..errors import UserError
from . import known

if TYPE_CHECKING:
    from ..blocks.mapping import BlockMapping


def register_block(cls: type[nn.Module], mapping: BlockMapping) -> None:
    """Have :func:`resnet_fast.accelerate` fuse the instances of a block class, from now on in this process.

    A description is compared with the block's own forward at ``accelerate`` (:mod:`resnet_fast.blocks.probe`): on a
    copy with random weights in float64, in eval and in training mode, once for each variant of the class. Registering a
    class again replaces its mapping for later calls of ``accelerate``. A pickled block brings its mapping along.

    Args:
        cls: the class, whose ``forward`` takes one tensor (N, C, H, W) and returns one. Its subclasses are not fused.
        mapping: the paths of its layers. ::

            from resnet_fast import BlockMapping, register_block

            register_block(
                MyBlock,
                BlockMapping(
                    main=[("conv1", "norm1", "act"), ("conv2", "norm2", None)],
                    shortcut=[("proj.0", "proj.1"), ("proj.0", "proj.1", "proj.2")],  # conv, norm; pool, conv, norm
                    activation="act",
                ),
            )

    Raises:
        UserError: ``cls`` is no module class, its forward takes something else, it has a fused class already, or
            ``mapping`` is no BlockMapping. What depends on an instance (a path that it lacks, another result than the
            mapping's) is raised by ``accelerate``.
    """
    from ..blocks.fused import Fused
    from ..blocks.mapped import fused_class
    from ..blocks.mapping import BlockMapping

    if not isinstance(cls, type) or not issubclass(cls, nn.Module):
        got = repr(cls) if isinstance(cls, type) else f"an instance of {type(cls).__name__}"
        raise UserError("a class of modules", got, "pass the class of the block itself")
    if not isinstance(mapping, BlockMapping):
        raise UserError("a resnet_fast.BlockMapping", type(mapping).__name__, "see help(resnet_fast.BlockMapping)")
    if issubclass(cls, Fused) or (cls in known.fused_classes() and not known.is_registered(cls)):
        raise UserError("a class without a fused one", _full(cls), "accelerate() knows this class already")
    _check_signature(cls)
    known.add(cls, fused_class(cls, mapping))


def _check_signature(cls: type[nn.Module]) -> None:
    fix = "a block with other arguments cannot be fused"
    expected = f"{cls.__qualname__}.forward(self, x)"
    if not inspect.isfunction(cls.forward):
        raise UserError(expected, type(cls.forward).__name__, fix)
    parameters = list(inspect.signature(cls.forward).parameters.values())
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if len(parameters) != 2 or any(p.kind not in positional for p in parameters):
        raise UserError(expected, f"forward{inspect.signature(cls.forward)}", fix)


def _full(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
