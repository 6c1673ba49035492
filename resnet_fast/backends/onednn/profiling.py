"""What a profiler sees of a call: a span of the op's name, and its convolutions where FLOPs are counted.

``torch.profiler.profile(with_flops=True)`` counts FLOPs in C++ by the names and arguments of a few ATen operators, and
knows nothing of oneDNN's primitives. So while a profiler runs, each convolution of a call is announced to it as an
``aten::conv2d`` of that shape, which takes no time; the time is that of the span and of the primitives in it.
(``torch.utils.flop_counter`` needs none of this: the ops have formulas there, see ops/register.py.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import profiler

from ...spec import BlockSpec, ConvSpec, NetSpec, Spec, Verdict


def is_running() -> bool:
    """Is a profiler on in this process?"""
    return profiler._is_profiler_enabled


def profiled(spec: Spec | NetSpec, run: Callable[[], Tensor | Verdict]) -> Tensor | Verdict:
    """``run()`` under the profiler's eyes."""
    with torch.profiler.record_function(f"resnet_fast::{spec.op}"):
        y = run()
        if isinstance(y, Tensor):
            for conv in _convs(spec):
                _announce(conv)
    return y


def _convs(spec: Spec | NetSpec) -> Iterator[ConvSpec]:
    if isinstance(spec, NetSpec):
        for part in spec.parts:
            yield from _convs(part)
    elif isinstance(spec, BlockSpec):
        yield from spec.convs
    else:
        yield spec


def _announce(c: ConvSpec) -> None:
    """An ``aten::conv2d`` of the shape of ``c``, on tensors that hold one number."""
    number = torch.empty(1)
    x, weight = number.expand(c.n, c.ci, c.h, c.w), number.expand(c.co, c.ci // c.groups, c.r, c.s)
    arguments: list[Any] = [x, weight, None, list(c.stride), list(c.padding), list(c.dilation), c.groups]
    with torch._C._profiler._RecordFunctionFast("aten::conv2d", arguments):
        pass
