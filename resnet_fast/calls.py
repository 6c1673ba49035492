"""Define call records: the tensors and numbers of one op call, as every backend receives them.

A dispatcher schema can only express flat lists. ``ops/`` turns them into these named tuples, and nothing below it
counts positions. A record holds no decision; its Spec decides what runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

from torch import Tensor

from .spec import Pair

record: Callable[[type[Any], Sequence[Any]], Any] = tuple.__new__
"""``record(Conv, fields)`` makes a record of all its fields in their order. A named tuple's own constructor is a Python
function that takes several times as long, and a training step makes hundreds of records."""


class Conv(NamedTuple):
    """A 2-d convolution's parameters: ``weight`` (Co, Ci/groups, R, S), ``bias`` (Co) or None, zero padding."""

    weight: Tensor
    bias: Tensor | None
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int

    def numbers(self) -> tuple[Pair, Pair, Pair, int]:
        """Return stride, padding, dilation and groups."""
        return self[2:]


class Norm(NamedTuple):
    """BatchNorm's parameters, each (C) or None.

    ``batch_stats``: normalise by this batch's statistics, and update ``mean`` and ``var`` in place (where they are
    given) with factor ``momentum``, as :func:`torch.nn.functional.batch_norm` does. Without ``batch_stats`` and without
    ``mean`` only the affine part is applied, if there is one: the form of a folded or an absent norm. ``sync``: the
    name of the process group that shares the batch's statistics; empty for one process.
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
        """Return weight, bias, running mean and running variance."""
        return self[:4]


class Pool(NamedTuple):
    """Max-pooling with a square window; padding counts as -inf."""

    kernel: int
    stride: int
    padding: int


# C functions: these run for every layer of every call
_conv_numbers, _norm_numbers = itemgetter(slice(2, None)), itemgetter(4, 6, 7)


class Call(NamedTuple):
    """The call of one op: convolutions with their norms, and the operations around them.

    Attributes:
        op: name of the op.
        x: input (N, C, H, W).
        convs: the convolutions of the main branch in order of execution, then the projection if there is one.
        norms: the norm of each convolution.
        added: a tensor of the output's shape that the caller computed: a residual, or a block's given shortcut.
        relu: whether ReLU follows the sum.
        pool: the max-pooling that follows ReLU.
        projection: whether the last convolution is on the shortcut. A block without it and without ``added`` adds
            ``x``.
    """

    op: str
    x: Tensor
    convs: tuple[Conv, ...]
    norms: tuple[Norm, ...]
    added: Tensor | None = None
    relu: bool = True
    pool: Pool | None = None
    projection: bool = False

    @property
    def parts(self) -> tuple[Call, ...]:
        """The call itself, as the one part of a net."""
        return (self,)

    @property
    def batch_stats(self) -> bool:
        """Whether a norm uses this batch's statistics."""
        return any([norm.batch_stats for norm in self.norms])

    @property
    def sync(self) -> str:
        """The process group that shares the batch's statistics; empty for one process."""
        for norm in self.norms:
            if norm.sync:
                return norm.sync
        return ""

    def with_sync(self, group: str) -> Call:
        """Return the call with the batch statistics of its norms shared among the processes of ``group``."""
        return self._replace(norms=tuple([n._replace(sync=group) if n.batch_stats else n for n in self.norms]))

    def main(self) -> list[tuple[Conv, Norm]]:
        """Return the (conv, norm) pairs of the main branch."""
        pairs = list(zip(self.convs, self.norms, strict=True))
        return pairs[:-1] if self.projection else pairs

    def parameters(self) -> tuple[Tensor | None, ...]:
        """Return the tensors that outlive the call; None if absent."""
        found: list[Tensor | None] = []
        for conv, norm in zip(self.convs, self.norms, strict=True):
            found += conv[:2]
            found += norm[:4]
        return tuple(found)

    def tensors(self) -> list[Tensor]:
        """Return every tensor of the call."""
        return [t for t in (self.x, self.added, *self.parameters()) if t is not None]

    def numbers(self) -> tuple[Any, ...]:
        """Return everything else, apart from ``x``, that can decide how the call runs.

        The momentum decides nothing, and a cumulative average has another one at each call.
        """
        added = self.added
        return (
            self.op,
            tuple(map(_conv_numbers, self.convs)),
            tuple(map(_norm_numbers, self.norms)),
            None if added is None else (added.shape, added.dtype, added.device),
            *self[5:],
        )

    def leaves(self) -> tuple[Tensor | None, ...]:
        """Return the tensors that can have a gradient; None if absent.

        In this order: ``x``, ``added``, and of each layer the convolution's weights, then their biases, the norms'
        weights, and their biases.
        """
        weights, biases, *_ = zip(*self.convs, strict=True)
        gammas, betas, *_ = zip(*self.norms, strict=True)
        return (self.x, self.added, *weights, *biases, *gammas, *betas)

    def with_leaves(self, leaves: Sequence[Any]) -> Call:
        """Return the call with other values in the order of :meth:`leaves`, and without running statistics."""
        count = len(self.convs)
        weights, biases, gammas, betas = [leaves[i : i + count] for i in range(2, 2 + 4 * count, count)]
        convs = [
            record(Conv, (weight, bias, *conv[2:]))
            for conv, weight, bias in zip(self.convs, weights, biases, strict=True)
        ]
        norms = [
            record(Norm, (gamma, beta, None, None, *norm[4:]))
            for norm, gamma, beta in zip(self.norms, gammas, betas, strict=True)
        ]
        call: Call = record(Call, (self.op, leaves[0], tuple(convs), tuple(norms), leaves[1], *self[5:]))
        return call

    def with_inputs(self, x: Tensor, added: Tensor | None) -> Call:
        """Return the call with other activations."""
        call: Call = record(Call, (self.op, x, self.convs, self.norms, added, *self[5:]))
        return call


class NetCall(NamedTuple):
    """The convolutional part of a net in one call: ``parts`` one after another, from the stem to the last block.

    A part's own ``x`` is not used: the first part gets ``x``, each later one the output of the part before it.
    """

    x: Tensor
    parts: tuple[Call, ...]

    @property
    def op(self) -> str:
        """``net``."""
        return "net"

    @property
    def batch_stats(self) -> bool:
        """Whether a norm uses this batch's statistics."""
        return any([p.batch_stats for p in self.parts])

    def parameters(self) -> tuple[Tensor | None, ...]:
        """Return the tensors that outlive the call; None if absent."""
        return tuple([t for p in self.parts for t in p.parameters()])

    def numbers(self) -> tuple[Any, ...]:
        """Return everything else, apart from ``x``, that can decide how the call runs."""
        return ("net", *[p.numbers() for p in self.parts])
