"""``net`` in eager PyTorch: its parts, one after another, in the layout of the weights.

The net around such a call converts its input to channels_last for the sake of other backends. A stock net with NCHW
weights would have been given the user's NCHW input, and rounds differently there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from torch import Tensor

from ...calls import NetCall
from ...locks import load
from ...spec import NetSpec


@cache
def _runner(op: str) -> Callable[..., Any]:
    run: Callable[..., Any] = load(f"{__package__}.{op}").run
    return run


def run(call: NetCall, spec: NetSpec | None = None, state: None = None) -> Tensor:
    """Stem and blocks."""
    x = call.x
    if all(conv.weight.is_contiguous() for part in call.parts for conv in part.convs):
        x = x.contiguous()
    for part in call.parts:
        x = _runner(part.op)(part._replace(x=x))
    return x
