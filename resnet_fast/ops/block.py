"""Define what ``bottleneck`` and ``basic_block`` share: a residual branch of convolutions, and a shortcut.

The residual branch's convolutions come first in each list, the projection (if there is one more) last. ``norms`` holds
weight, bias, running mean and running variance of each norm, ``geometry`` stride, padding, dilation (two numbers each)
and groups of each convolution, flattened: what a dispatcher schema can carry.
"""

from __future__ import annotations

from typing import Any

from ..calls import Call, Conv, Norm
from ..errors import UserError
from ..spec import BlockSpec, Epilogue
from .check import LayerInput, check_conv, check_same, has_norm
from .conv_bn_act import conv_flops
from .op import Op

SCHEMA = (
    "Tensor x, Tensor[] weights, Tensor?[] biases, Tensor?[] norms, int[] geometry, "
    "bool[] batch_stats, float[] momentum, float[] eps, Tensor? shortcut=None"
)


def block_op(name: str, main: int) -> Op:
    """Return the op of a block with ``main`` convolutions on its residual branch."""

    def bind(x: Any, weights: Any, biases: Any, norms: Any, geometry: Any, *rest: Any) -> Call:
        *numbers, shortcut = rest
        count = len(weights)
        sizes = (len(biases), len(norms), len(geometry), *map(len, numbers))
        if count not in (main, main + 1) or sizes != (count, 4 * count, 7 * count, count, count, count):
            raise UserError(
                f"{name}: {main} convolutions or {main + 1} with a projection, and per convolution one bias, "
                "4 norm tensors, 7 geometry numbers, one batch_stats, momentum and eps",
                f"{count} weights and lists of {sizes}",
                "pass lists of matching length",
            )
        convs = []
        for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            g = geometry[7 * i : 7 * i + 7]
            convs.append(Conv(weight, bias, (g[0], g[1]), (g[2], g[3]), (g[4], g[5]), g[6]))
        bns = [Norm(*norms[4 * i : 4 * i + 4], *each) for i, each in enumerate(zip(*numbers, strict=True))]
        return Call(name, x, tuple(convs), tuple(bns), shortcut, projection=count > main)

    def flops(x: Any, weights: Any, biases: Any, norms: Any, geometry: Any, *rest: Any, **kwargs: Any) -> int:
        total, shape = 0, x
        for i, weight in enumerate(weights):
            g = geometry[7 * i : 7 * i + 7]
            count, out = conv_flops(shape if i < main else x, weight, g[0:2], g[2:4], g[4:6])
            total, shape = total + count, out
        return total

    return Op(name, SCHEMA, bind, _flatten, _check, flops)


def _flatten(call: Call) -> tuple[Any, ...]:
    return (
        call.x,
        [c.weight for c in call.convs],
        [c.bias for c in call.convs],
        [t for n in call.norms for t in n.tensors()],
        [v for c in call.convs for v in (*c.stride, *c.padding, *c.dilation, c.groups)],
        [n.batch_stats for n in call.norms],
        [n.momentum for n in call.norms],
        [n.eps for n in call.norms],
        call.added,
    )


def _check(call: Call, at: LayerInput, grad: bool) -> BlockSpec:
    main, out = call.main(), at
    if call.projection and call.added is not None:
        raise UserError(f"{call.op}: a projection or a given shortcut", "both", "drop one")
    convs = []
    for i, (conv, norm) in enumerate(main):
        epilogue = Epilogue(True, i == len(main) - 1, has_norm(norm))
        convs.append(check_conv(out, conv, norm, epilogue, grad, f"{call.op}: conv{i + 1}"))
        out = out.after(convs[-1])
    if call.projection:
        conv, norm = call.convs[-1], call.norms[-1]
        convs.append(check_conv(at, conv, norm, Epilogue(norm=has_norm(norm)), grad, f"{call.op}: projection"))
    return BlockSpec(call.op, tuple(convs), check_shortcut(call, at, out.shape, convs[-1].out_shape()))


def check_shortcut(call: Call, at: LayerInput, shape: tuple[int, ...], last: tuple[int, ...]) -> str:
    """Return the kind of a block's shortcut, and check that it has the ``shape`` of the residual branch's output.

    ``last``: the shape of the last convolution's output, of the projection where there is one.
    """
    if call.projection:
        if last != shape:
            raise UserError(
                f"{call.op}: a projection of shape {shape}", str(last), "its stride and channels must match the block's"
            )
        return "projection"
    if call.added is not None:
        check_same(call.added, shape, at, f"{call.op}: shortcut")
        return "given"
    if at.shape != shape:
        raise UserError(
            f"{call.op}: an output of the input's shape {at.shape} to add it to",
            str(shape),
            "give the block a projection",
        )
    return "identity"
