"""Call records: the tensors and numbers of one op call, in the form that every backend receives them.

The ops' dispatcher schemas are flat lists (that is all a schema can say); ``ops/`` turns them into these named tuples
once, and nothing below it counts positions. A record holds no decision: what runs it is chosen from its Spec.

``parameters()`` of a call are the tensors that outlive it (None where absent), ``numbers()`` what else of it, besides
``x``, can decide how it runs; :mod:`resnet_fast.ops.infer` keeps what was prepared for a call by the two.
"""

from __future__ import annotations

from typing import Any, NamedTuple

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

    def numbers(self) -> tuple[Pair, Pair, Pair, int]:
        return self[2:]


class Norm(NamedTuple):
    """BatchNorm's parameters, each (C) or None.

    ``batch_stats``: normalise by this batch's statistics, and update ``mean`` and ``var`` in place (where they are
    given) with factor ``momentum``, as :func:`torch.nn.functional.batch_norm` does. Without ``batch_stats`` and without
    ``mean`` there is nothing to normalise by, and only the affine part (if given) is applied: the form of a folded or
    an absent norm. ``sync``: the name of the process group whose processes share the batch's statistics, else empty.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None
    mean: Tensor | None = None
    var: Tensor | None = None
    batch_stats: bool = False
    momentum: float = 0.0
    eps: float = 0.0
    sync: str = ""

    def tensors(self) -> tuple[Tensor | None, ...]:
        return self[:4]

    def numbers(self) -> tuple[bool, float, float, str]:
        return self[4:]


def _kind(t: Tensor | None) -> Any:
    return None if t is None else (t.shape, t.dtype, t.device)


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

    @property
    def batch_stats(self) -> bool:
        return self.norm.batch_stats

    def parameters(self) -> tuple[Tensor | None, ...]:
        return self.conv[:2] + self.norm[:4]

    def numbers(self) -> tuple[Any, ...]:
        return self.conv.numbers(), self.norm.numbers(), self.relu, _kind(self.residual)


class StemCall(NamedTuple):
    """``maxpool(relu(bn(conv(x))))``."""

    x: Tensor
    conv: Conv
    norm: Norm
    pool: Pool

    @property
    def op(self) -> str:
        return "stem"

    @property
    def batch_stats(self) -> bool:
        return self.norm.batch_stats

    def parameters(self) -> tuple[Tensor | None, ...]:
        return self.conv[:2] + self.norm[:4]

    def numbers(self) -> tuple[Any, ...]:
        return self.conv.numbers(), self.norm.numbers(), self.pool


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

    @property
    def batch_stats(self) -> bool:
        return any([n.batch_stats for n in self.norms])

    def parameters(self) -> tuple[Tensor | None, ...]:
        found: list[Tensor | None] = []
        for conv, norm in zip(self.convs, self.norms, strict=True):
            found += conv[:2]
            found += norm[:4]
        return tuple(found)

    def numbers(self) -> tuple[Any, ...]:
        convs = tuple([c[2:] for c in self.convs])
        return convs, tuple([n[4:] for n in self.norms]), self.projection, _kind(self.shortcut)


Call = ConvBnActCall | StemCall | BlockCall
"""The calls that have a ``torch.library`` op."""


class NetCall(NamedTuple):
    """The convolutional part of a net in one call: ``parts`` one after another, from the stem to the last block.

    A part's own ``x`` is not used: each gets what the part before it returned, the first gets ``x``.
    """

    x: Tensor
    parts: tuple[ConvBnActCall | StemCall | BlockCall, ...]

    @property
    def op(self) -> str:
        return "net"

    @property
    def batch_stats(self) -> bool:
        return any([p.batch_stats for p in self.parts])

    def parameters(self) -> tuple[Tensor | None, ...]:
        return tuple([t for p in self.parts for t in p.parameters()])

    def numbers(self) -> tuple[Any, ...]:
        return tuple([(type(p), p.numbers()) for p in self.parts])


def norms_of(call: Call) -> tuple[Norm, ...]:
    """The norms of a call, in the order of its convolutions."""
    return call.norms if isinstance(call, BlockCall) else (call.norm,)


def convs_of(call: Call) -> tuple[Conv, ...]:
    """The convolutions of a call: main branch first, then the projection."""
    return call.convs if isinstance(call, BlockCall) else (call.conv,)


def given_of(call: Call) -> Tensor | None:
    """The tensor that the caller adds: a residual, or a block's given shortcut."""
    if isinstance(call, StemCall):
        return None
    return call.shortcut if isinstance(call, BlockCall) else call.residual


class Leaves(NamedTuple):
    """The tensors of a call that can have a gradient, and the gradients themselves: x, what is added, and per layer
    the convolution's weight and bias and the norm's gamma and beta. None where absent."""

    x: Any
    given: Any
    weights: tuple[Any, ...]
    biases: tuple[Any, ...]
    gammas: tuple[Any, ...]
    betas: tuple[Any, ...]

    @staticmethod
    def of(call: Call) -> Leaves:
        convs, norms = convs_of(call), norms_of(call)
        return Leaves(
            call.x,
            given_of(call),
            tuple([c.weight for c in convs]),
            tuple([c.bias for c in convs]),
            tuple([n.weight for n in norms]),
            tuple([n.bias for n in norms]),
        )

    def flat(self) -> tuple[Any, ...]:
        """One tuple, in the order of the fields."""
        return (self.x, self.given, *self.weights, *self.biases, *self.gammas, *self.betas)

    def like(self, flat: Any) -> Leaves:
        """``flat`` in the form of these leaves."""
        x, given, *rest = flat
        parts = []
        for group in self[2:]:
            parts.append(tuple(rest[: len(group)]))
            rest = rest[len(group) :]
        return Leaves(x, given, *parts)

    def put_into(self, call: Call) -> Call:
        """``call`` with these tensors, and without running statistics, which no gradient needs."""
        convs = tuple(
            [c._replace(weight=w, bias=b) for c, w, b in zip(convs_of(call), self.weights, self.biases, strict=True)]
        )
        norms = tuple(
            [
                n._replace(weight=gamma, bias=beta, mean=None, var=None)
                for n, gamma, beta in zip(norms_of(call), self.gammas, self.betas, strict=True)
            ]
        )
        if isinstance(call, BlockCall):
            return call._replace(x=self.x, convs=convs, norms=norms, shortcut=self.given)
        if isinstance(call, ConvBnActCall):
            return call._replace(x=self.x, conv=convs[0], norm=norms[0], residual=self.given)
        return call._replace(x=self.x, conv=convs[0], norm=norms[0])
