"""``bottleneck`` as three or four oneDNN primitives; the shortcut is a post-op of the last one.

    y1 = relu(conv1'(x))   y2 = relu(conv2'(y1))   y = relu(conv3'(y2) + shortcut)       (' : BatchNorm folded)

If the shortcut is this function's own tensor (a projection, a converted copy), the sum is written over it, which saves
an output. A 256-64-64-256 block reads or writes the same 6 tensors of width 64 to 256 as before, without the five
passes of BatchNorm, ReLU and add over them.
"""

from __future__ import annotations

from torch import Tensor

from ...calls import Call
from ...spec import BlockSpec, Verdict
from . import bounds
from .conv_bn_act import PackedCall, compute_dtype, conv, conv_add, like_reference, nhwc
from .conv_bn_act import prepare as prepare


def run(call: Call, spec: BlockSpec, state: PackedCall) -> Tensor | Verdict:
    """relu(bn(conv(... relu(bn(conv(x))))) + shortcut)."""
    dtype = compute_dtype(call.x.dtype)
    x = nhwc(call.x, dtype)
    given = call.x if call.added is None else call.added
    shortcut = x if call.added is None else nhwc(given, dtype)
    refusal = bounds.verdict((x,) if shortcut is x else (x, shortcut), state.reach)
    if refusal is not None:
        return refusal
    owned = shortcut is not given or call.projection
    *inner, last = state.convs[: len(spec.main)]
    y = x
    for p in inner:
        y = conv(y, p, relu=True)
        if bounds.overflowed(y):
            return bounds.OVERFLOW
    if call.projection:
        shortcut = conv(x, state.convs[-1], relu=False)
        if bounds.overflowed(shortcut):
            return bounds.OVERFLOW
    return like_reference(conv_add(y, last, shortcut, relu=True, overwrite=owned), call.x.dtype, spec.layout)
