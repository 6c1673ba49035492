"""Describe an op: one :class:`Op` per op module of this package, registered once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..calls import Call
from ..spec import Spec
from .check import LayerInput

NAMESPACE = __name__.rpartition(".ops.")[0].replace(".", "_")
"""``resnet_fast``, where the ops are defined. A package that :mod:`resnet_fast.hub` builds has another name."""

DEFINED = getattr(torch.ops, NAMESPACE)
"""``torch.ops.resnet_fast``, which :mod:`.register` fills."""


@dataclass(frozen=True)
class Op:
    """Everything that is particular to one op.

    Attributes:
        name: ``torch.ops.resnet_fast.NAME``, and the name in counters and reports.
        schema: the arguments, ``x`` first, without the :class:`~.train.Options` that end every op's schema. The last
            one is the tensor that is added, or no tensor.
        bind: makes a call of the flat arguments.
        flatten: makes the flat arguments of a call.
        check: ``check(call, at, grad)`` checks a call with the input ``at`` and returns its Spec. UserError where the
            call makes no sense.
        flops: FLOPs from the *shapes* of the flat arguments, as ``torch.utils.flop_counter`` asks for them.
    """

    name: str
    schema: str
    bind: Callable[..., Call]
    flatten: Callable[[Call], tuple[Any, ...]]
    check: Callable[[Call, LayerInput, bool], Spec]
    flops: Callable[..., int]


OPS: dict[str, Op] = {}
"""Every op by name, filled by :func:`resnet_fast.ops.register.register`."""
