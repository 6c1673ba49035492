"""Call records: the tensors and numbers of one op call, in the form that every backend receives them.

The ops' dispatcher schemas are flat lists (that is all a schema can say); ``ops/`` turns them into these named tuples
once, and nothing below it counts positions. A record holds no decision: what runs it is chosen from its Spec.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .spec import Pair


class Conv(NamedTuple):
    """A 2-d convolution's parameters: ``weight`` (Co, Ci/groups, R, S), ``bias`` (Co) or None, zero padding."""

    weight: Tensor
    bias: Tensor | None
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int


class Norm(NamedTuple):
    """BatchNorm's parameters, each (C) or None.

    ``batch_stats``: normalise by this batch's statistics, and update ``mean`` and ``var`` in place (where they are
    given) with factor ``momentum``, as :func:`torch.nn.functional.batch_norm` does. Without ``batch_stats`` and without
    ``mean`` there is nothing to normalise by, and only the affine part (if given) is applied: the form of a folded or
    an absent norm.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None
    mean: Tensor | None = None
    var: Tensor | None = None
    batch_stats: bool = False
    momentum: float = 0.0
    eps: float = 0.0

    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.weight, self.bias, self.mean, self.var


class Pool(NamedTuple):
    """Max-pooling with a square window; padding counts as -inf."""

    kernel: int
    stride: int
    padding: int


class ConvBnActCall(NamedTuple):
    """``act(bn(conv(x)) + residual)``."""

    x: Tensor
    conv: Conv
    norm: Norm
    residual: Tensor | None
    relu: bool

    @property
    def op(self) -> str:
        return "conv_bn_act"


class BnActCall(NamedTuple):
    """``act(bn(x) + residual)``."""

    x: Tensor
    norm: Norm
    residual: Tensor | None
    relu: bool

    @property
    def op(self) -> str:
        return "bn_act"


class StemCall(NamedTuple):
    """``maxpool(relu(bn(conv(x))))``."""

    x: Tensor
    conv: Conv
    norm: Norm
    pool: Pool

    @property
    def op(self) -> str:
        return "stem"


class BlockCall(NamedTuple):
    """A basic block (two convolutions) or a bottleneck (three), and how the shortcut is made.

    ``projection``: a further (conv, norm) on the shortcut, last in ``convs`` and ``norms``; ``shortcut``: a tensor that
    the caller computed; with neither, the shortcut is ``x``.
    """

    x: Tensor
    convs: tuple[Conv, ...]
    norms: tuple[Norm, ...]
    projection: bool
    shortcut: Tensor | None

    def main(self) -> list[tuple[Conv, Norm]]:
        """The (conv, norm) pairs of the residual branch."""
        pairs = list(zip(self.convs, self.norms, strict=True))
        return pairs[:-1] if self.projection else pairs

    @property
    def op(self) -> str:
        """The op's name, by the number of convolutions on the residual branch."""
        return "bottleneck" if len(self.convs) - self.projection == 3 else "basic_block"


Call = ConvBnActCall | BnActCall | StemCall | BlockCall
