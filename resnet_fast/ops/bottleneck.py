"""``bottleneck``: y = relu(bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x)))))))) + shortcut), He et al. 2015, figure 5.

The residual branch's convolutions come first in each list, the projection (if there is a fourth) last. ``norms`` holds
weight, bias, running mean and running variance of each norm, ``geometry`` stride, padding, dilation (two numbers each)
and groups of each convolution, flattened: what a dispatcher schema can carry. ``basic_block`` shares this form.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..calls import BlockCall, Conv, Norm
from ..errors import UserError
from .conv_bn_act import conv_flops
from .register import register

BLOCK_SCHEMA = (
    "Tensor x, Tensor[] weights, Tensor?[] biases, Tensor?[] norms, int[] geometry, "
    "bool[] batch_stats, float[] momentum, float[] eps, Tensor? shortcut=None"
)


def block_binder(op: str, main: int) -> Callable[..., BlockCall]:
    """The binder of a block op whose residual branch has ``main`` convolutions."""

    def bind(x: Any, weights: Any, biases: Any, norms: Any, geometry: Any, *rest: Any) -> BlockCall:
        batch_stats, momentum, eps, shortcut = rest
        count = len(weights)
        sizes = (len(biases), len(norms), len(geometry), len(batch_stats), len(momentum), len(eps))
        if count not in (main, main + 1) or sizes != (count, 4 * count, 7 * count, count, count, count):
            raise UserError(
                f"{op}: {main} convolutions or {main + 1} with a projection, and per convolution one bias, "
                "4 norm tensors, 7 geometry numbers, one batch_stats, momentum and eps",
                f"{count} weights and lists of {sizes}",
                "pass lists of matching length",
            )
        geometries = [geometry[7 * i : 7 * i + 7] for i in range(count)]
        convs = tuple(
            Conv(w, b, (g[0], g[1]), (g[2], g[3]), (g[4], g[5]), g[6])
            for w, b, g in zip(weights, biases, geometries, strict=True)
        )
        numbers = zip(batch_stats, momentum, eps, strict=True)
        bns = tuple(Norm(*norms[4 * i : 4 * i + 4], *each) for i, each in enumerate(numbers))  # type: ignore[call-arg]
        return BlockCall(x, convs, bns, count == main + 1, shortcut)

    return bind


def block_flops(main: int) -> Callable[..., int]:
    """FLOPs of a block from the shapes of its arguments."""

    def flops(x: Any, weights: Any, biases: Any, norms: Any, geometry: Any, *rest: Any, **kwargs: Any) -> int:
        total, shape = 0, x
        for i, weight in enumerate(weights):
            g = geometry[7 * i : 7 * i + 7]
            count, out = conv_flops(shape if i < main else x, weight, g[0:2], g[2:4], g[4:6])
            total, shape = total + count, out
        return total

    return flops


register("bottleneck", BLOCK_SCHEMA, block_binder("bottleneck", 3), block_flops(3))
