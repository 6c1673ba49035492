"""Show a call to a running profiler: a span of the op's name, and its convolutions, so that FLOPs are counted.

``torch.profiler.profile(with_flops=True)`` counts FLOPs in C++ by the names and arguments of a few ATen operators. It
does not know the primitives of a backend that announces its convolutions (:class:`~resnet_fast.impl.Impl`), such as
oneDNN's. So each convolution of a call is announced to it as an ``aten::conv2d`` of that shape, which takes no time;
the time is that of the span and of the primitives in it. (``torch.utils.flop_counter`` uses the ops' own formulas, see
ops/register.py.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import profiler

from ..spec import ConvSpec, NetSpec, Spec, Verdict


def is_running() -> bool:
    """Return whether a profiler is on in this process."""
    return profiler._is_profiler_enabled


def profiled(spec: Spec | NetSpec, run: Callable[[], Tensor | Verdict]) -> Tensor | Verdict:
    """Return ``run()``, shown to the profiler."""
    with torch.profiler.record_function(f"resnet_fast::{spec.op}"):
        y = run()
        if isinstance(y, Tensor):
            for conv in spec.convs:
                _announce(conv)
    return y


def _announce(c: ConvSpec) -> None:
    """An ``aten::conv2d`` of the shape of ``c``, on tensors that hold one number."""
    number = torch.empty(1)
    x, weight = number.expand(c.n, c.ci, c.h, c.w), number.expand(c.co, c.ci // c.groups, c.r, c.s)
    arguments: list[Any] = [x, weight, None, list(c.stride), list(c.padding), list(c.dilation), c.groups]
    with torch._C._profiler._RecordFunctionFast("aten::conv2d", arguments):
        pass
