"""Describe a problem as one immutable value: decisions, errors, cache keys and benchmark rows are made from it.

A module call becomes a :class:`ConvSpec` (one convolution with what is fused around it) or a :class:`BlockSpec`
(several convolutions in one call), and a whole net is a :class:`NetSpec`. They are frozen, hashable and print on one
line, and have the same properties: ``parts``, ``convs``, ``main``, ``projection``, ``shortcut``, ``pool``. This file
imports only the standard library, so that tables of shapes, the roofline and kernel tests can use it without torch.

GEMM letters follow the implicit-GEMM view of a convolution: ``gemm_m = N*Ho*Wo`` output pixels, ``gemm_n = Co/groups``
output channels, ``gemm_k = Ci/groups*R*S`` products per output; there are ``groups`` such GEMMs.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

ITEMSIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "int8": 1}
"""Bytes per element, by the name torch prints after ``torch.``."""

Pair = tuple[int, int]


def conv_out(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Return the length of a convolution's or pooling's output along one axis; below 1 the window does not fit."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def _touched(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Return how many of ``size`` input positions along one axis are read. A 1x1 with stride 2 skips every other."""
    out = conv_out(size, kernel, stride, padding, dilation)
    if dilation == 1 and stride <= kernel:  # windows overlap or touch: one run of positions
        return max(0, min(size, (out - 1) * stride + kernel - padding) - max(0, -padding))
    return len({p for o in range(out) for k in range(kernel) if 0 <= (p := o * stride - padding + k * dilation) < size})


class _HashedOnce:
    """Compute the hash of the many fields once, because specs are the keys of every look-up."""

    @cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, f.name) for f in fields(self)))  # type: ignore[arg-type]

    def __hash__(self) -> int:
        return self._hash

    def __getstate__(self) -> dict[str, Any]:
        """Return the fields without the hash, which differs between processes."""
        return {name: value for name, value in self.__dict__.items() if name != "_hash"}


@dataclass(frozen=True)
class Epilogue:
    """The operations on a convolution's output before it is stored: ``pool(act(bn(conv) + residual))``."""

    relu: bool = False
    add: bool = False
    norm: bool = True
    pool: tuple[int, int, int] | None = None  # max-pool kernel, stride, padding: the stem

    def __str__(self) -> str:
        parts = [
            "bn" if self.norm else "",
            "add" if self.add else "",
            "relu" if self.relu else "",
            "maxpool{}/{}".format(*self.pool[:2]) if self.pool else "",
        ]
        return "+".join(p for p in parts if p) or "none"


@dataclass(frozen=True)
class ConvSpec(_HashedOnce):
    """One 2-d convolution and its epilogue. Sizes in elements, ``dtype`` as torch names it, ``layout`` of x and y."""

    __hash__ = _HashedOnce.__hash__

    n: int
    h: int
    w: int
    ci: int
    co: int
    r: int
    s: int
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    dtype: str = "float32"
    layout: str = "nhwc"
    epilogue: Epilogue = Epilogue()
    batch_stats: bool = False  # BN uses this batch's statistics (training) instead of running ones
    grad: bool = False  # autograd needs the graph of this call
    tf32: bool = False  # float32 products may round their operands to TF32 (10 mantissa bits)
    sync: bool = False  # the batch's statistics are those of all processes of a group (SyncBatchNorm)
    invariant: bool = False  # an image's output must not depend on the batch (invariance.py)

    @property
    def op(self) -> str:
        return "stem" if self.epilogue.pool else "conv_bn_act"

    @property
    def parts(self) -> tuple[ConvSpec]:
        """The problem itself, as the one part of a net."""
        return (self,)

    @property
    def convs(self) -> tuple[ConvSpec, ...]:
        """The convolution itself, as the one of a block."""
        return (self,)

    @property
    def main(self) -> tuple[ConvSpec, ...]:
        """The convolution itself, as the one of a residual branch."""
        return (self,)

    @property
    def projection(self) -> ConvSpec | None:
        """None: no convolution is on the shortcut."""
        return None

    @property
    def shortcut(self) -> str:
        """``given`` where a residual is added, else ``none``."""
        return "given" if self.epilogue.add else "none"

    @property
    def pool(self) -> tuple[int, int, int] | None:
        """Kernel, stride and padding of the max-pooling; None without it."""
        return self.epilogue.pool

    @cached_property
    def ho(self) -> int:
        return conv_out(self.h, self.r, self.stride[0], self.padding[0], self.dilation[0])

    @cached_property
    def wo(self) -> int:
        return conv_out(self.w, self.s, self.stride[1], self.padding[1], self.dilation[1])

    @property
    def gemm_m(self) -> int:
        return self.n * self.ho * self.wo

    @property
    def gemm_n(self) -> int:
        return self.co // self.groups

    @property
    def gemm_k(self) -> int:
        return self.ci // self.groups * self.r * self.s

    def geometry(self) -> tuple[Pair, Pair, Pair, int]:
        """Return stride, padding, dilation and groups, in the order of ``torch.nn.functional.conv2d``."""
        return self.stride, self.padding, self.dilation, self.groups

    def out_hw(self) -> Pair:
        """Return height and width of the stored output, after any pooling."""
        if self.epilogue.pool is None:
            return self.ho, self.wo
        k, st, p = self.epilogue.pool
        return conv_out(self.ho, k, st, p, 1), conv_out(self.wo, k, st, p, 1)

    def out_shape(self) -> tuple[int, int, int, int]:
        """Return (N, C, H, W) of the stored output."""
        return self.n, self.co, *self.out_hw()

    def macs(self) -> int:
        """Return the multiply-adds of the convolution, which the paper's Table 1 calls FLOPs."""
        return self.gemm_m * self.co * self.gemm_k

    def flops(self) -> int:
        """Return the floating-point operations of the convolution: two per multiply-add."""
        return 2 * self.macs()

    def params(self) -> int:
        """Return the number of filter weights, gammas and betas."""
        return self.co * self.gemm_k + (2 * self.co if self.epilogue.norm else 0)

    def touched(self) -> int:
        """Return the number of input elements that any output reads."""
        rows = _touched(self.h, self.r, self.stride[0], self.padding[0], self.dilation[0])
        return self.n * self.ci * rows * _touched(self.w, self.s, self.stride[1], self.padding[1], self.dilation[1])

    def min_bytes(self) -> int:
        """Return the bytes that any implementation must move: read inputs, weights, residual and output, once each."""
        ho, wo = self.out_hw()
        y = self.n * ho * wo * self.co
        elements = self.touched() + self.co * self.gemm_k + y * (2 if self.epilogue.add else 1)
        return elements * ITEMSIZE[self.dtype] + (2 * self.co * 4 if self.epilogue.norm else 0)

    def with_(self, **changes: Any) -> ConvSpec:
        """Return a copy with some fields changed."""
        return replace(self, **changes)

    def __str__(self) -> str:
        text = (
            f"N{self.n} {self.h}x{self.w} {self.ci}->{self.co} {self.r}x{self.s}"
            f"/{self.stride[0]}{'' if self.stride[0] == self.stride[1] else f'x{self.stride[1]}'}"
            f" p{self.padding[0]}{'' if self.padding[0] == self.padding[1] else f'x{self.padding[1]}'}"
        )
        if self.dilation != (1, 1):
            text += f" d{self.dilation[0]}{'' if self.dilation[0] == self.dilation[1] else f'x{self.dilation[1]}'}"
        if self.groups != 1:
            text += f" g{self.groups}"
        return text + f" {self.epilogue} {_mode(self)}"


SHORTCUTS = ("identity", "projection", "given")


@dataclass(frozen=True)
class BlockSpec(_HashedOnce):
    """A residual block: its convolutions in order of execution, then the projection if there is one.

    ``shortcut``: ``identity`` adds the block's input, ``projection`` a 1x1 convolution of it, ``given`` a tensor that
    the caller computed (option A's zero-padded channels, an average-pooled projection).
    """

    __hash__ = _HashedOnce.__hash__

    op: str
    convs: tuple[ConvSpec, ...]
    shortcut: str = "identity"

    @property
    def parts(self) -> tuple[BlockSpec]:
        """The problem itself, as the one part of a net."""
        return (self,)

    @property
    def main(self) -> tuple[ConvSpec, ...]:
        """The convolutions of the residual branch, without the projection."""
        return self.convs[:-1] if self.shortcut == "projection" else self.convs

    @property
    def projection(self) -> ConvSpec | None:
        """The convolution on the shortcut; None without one."""
        return self.convs[-1] if self.shortcut == "projection" else None

    @property
    def pool(self) -> None:
        """None: a block ends without pooling."""
        return None

    @property
    def n(self) -> int:
        return self.convs[0].n

    @property
    def h(self) -> int:
        return self.convs[0].h

    @property
    def w(self) -> int:
        return self.convs[0].w

    @property
    def dtype(self) -> str:
        return self.convs[0].dtype

    @property
    def layout(self) -> str:
        """Layout of the output, that of the last convolution on the residual branch."""
        return self.main[-1].layout

    @property
    def batch_stats(self) -> bool:
        return any(c.batch_stats for c in self.convs)

    @property
    def grad(self) -> bool:
        return any(c.grad for c in self.convs)

    @property
    def sync(self) -> bool:
        return any(c.sync for c in self.convs)

    @property
    def invariant(self) -> bool:
        return any(c.invariant for c in self.convs)

    def out_shape(self) -> tuple[int, int, int, int]:
        """Return (N, C, H, W) of the block's output."""
        return self.main[-1].out_shape()

    def macs(self) -> int:
        return sum(c.macs() for c in self.convs)

    def flops(self) -> int:
        return sum(c.flops() for c in self.convs)

    def params(self) -> int:
        return sum(c.params() for c in self.convs)

    def min_bytes(self) -> int:
        """Return the bytes of the block as one kernel: input, weights, output and any given shortcut, once each.

        The input counts once even if two convolutions and the add read it.
        """
        first, last = self.main[0], self.main[-1]
        size = ITEMSIZE[self.dtype]
        x = first.n * first.h * first.w * first.ci
        y = last.n * last.ho * last.wo * last.co
        weights = sum(c.co * c.gemm_k * size + 2 * c.co * 4 for c in self.convs)
        return (x + y * (2 if self.shortcut == "given" else 1)) * size + weights

    def with_(self, **changes: Any) -> BlockSpec:
        """Return a copy with some fields of every convolution changed (dtype, layout, grad …)."""
        return replace(self, convs=tuple(c.with_(**changes) for c in self.convs))

    def __str__(self) -> str:
        chain = " -> ".join(f"{c.r}x{c.s}/{c.stride[0]} {c.co}" for c in self.main)
        first = self.main[0]
        extra = "".join(sorted({f" g{c.groups}" for c in self.convs if c.groups != 1}))
        extra += "".join(sorted({f" d{c.dilation[0]}" for c in self.convs if c.dilation != (1, 1)}))
        return f"N{self.n} {self.h}x{self.w} {first.ci} -> {chain}{extra} + {self.shortcut} {_mode(first)}"


@dataclass(frozen=True)
class LaunchSpec(_HashedOnce):
    """The work of one kernel launch: a chain of convolutions, each of which reads the one before from chip memory.

    ``kernel``: name of the kernel file. ``projection``: a 1x1 convolution of the block's input, accumulated into the
    last convolution's tile before its epilogue, in place of a residual. ``prologue``, in training: the input is a raw
    convolution output, and its BatchNorm and ReLU are applied as it is read. ``folded``, in training: the norms are
    folded into the weights, so tensors are activations and their gradients; a dgrad with ``prologue`` then applies the
    mask of the ReLU before the convolution, and nothing else of a prologue.
    """

    __hash__ = _HashedOnce.__hash__

    kernel: str
    convs: tuple[ConvSpec, ...]
    projection: ConvSpec | None = None
    prologue: bool = False
    folded: bool = False

    @property
    def first(self) -> ConvSpec:
        return self.convs[0]

    @property
    def last(self) -> ConvSpec:
        return self.convs[-1]

    @property
    def n(self) -> int:
        return self.first.n

    @property
    def dtype(self) -> str:
        return self.first.dtype

    @property
    def residual(self) -> bool:
        """Whether the epilogue reads a tensor of the output's shape."""
        return self.last.epilogue.add and self.projection is None

    def with_batch(self, n: int) -> LaunchSpec:
        """Return the same launch on ``n`` images."""
        projection = self.projection and self.projection.with_(n=n)
        return replace(self, convs=tuple(c.with_(n=n) for c in self.convs), projection=projection)

    def all_convs(self) -> tuple[ConvSpec, ...]:
        """Return the chain, then the projection if there is one."""
        return self.convs if self.projection is None else (*self.convs, self.projection)

    def macs(self) -> int:
        return sum(c.macs() for c in self.all_convs())

    def flops(self) -> int:
        return 2 * self.macs()

    def min_bytes(self) -> int:
        """Return the bytes of read inputs, weights, fp32 biases, residual and output, once each."""
        size, total = ITEMSIZE[self.dtype], 0
        for c in self.all_convs():
            total += c.co * c.gemm_k * size
            if c is self.first or c is self.projection:
                total += c.touched() * size
        ho, wo = self.last.out_hw()
        total += self.n * ho * wo * self.last.co * size * (2 if self.residual else 1)
        # BatchNorm is folded: one bias per output channel of each member, the projection's is added to the last one's
        return total + sum(4 * c.co for c in self.convs)

    def __str__(self) -> str:
        chain = " -> ".join(str(c) for c in self.convs)
        text = f"{self.kernel}: {chain}" + (f" + projection {self.projection}" if self.projection else "")
        return text + (" prologue" if self.prologue else "") + (" folded" if self.folded else "")


@dataclass(frozen=True)
class NetSpec(_HashedOnce):
    """The convolutional part of a net, from the stem to the last block, as one problem."""

    __hash__ = _HashedOnce.__hash__

    parts: tuple[Spec, ...]

    op = "net"

    @property
    def convs(self) -> tuple[ConvSpec, ...]:
        """Every convolution of every part."""
        return tuple(c for p in self.parts for c in p.convs)

    @property
    def n(self) -> int:
        return self.parts[0].n

    @property
    def h(self) -> int:
        return self.parts[0].h

    @property
    def w(self) -> int:
        return self.parts[0].w

    @property
    def dtype(self) -> str:
        return self.parts[0].dtype

    @property
    def layout(self) -> str:
        """Layout of the output."""
        return self.parts[-1].layout

    @property
    def batch_stats(self) -> bool:
        return any(p.batch_stats for p in self.parts)

    @property
    def grad(self) -> bool:
        return any(p.grad for p in self.parts)

    @property
    def sync(self) -> bool:
        return any(p.sync for p in self.parts)

    @property
    def invariant(self) -> bool:
        return any(p.invariant for p in self.parts)

    def out_shape(self) -> tuple[int, int, int, int]:
        """Return (N, C, H, W) of the last part's output."""
        return self.parts[-1].out_shape()

    def macs(self) -> int:
        return sum(p.macs() for p in self.parts)

    def flops(self) -> int:
        return sum(p.flops() for p in self.parts)

    def params(self) -> int:
        return sum(p.params() for p in self.parts)

    def min_bytes(self) -> int:
        """Return the bytes with one kernel per part."""
        return sum(p.min_bytes() for p in self.parts)

    def __str__(self) -> str:
        return f"N{self.n} {self.h}x{self.w} net of {len(self.parts)} parts {self.dtype} {self.layout}"


Spec = ConvSpec | BlockSpec


def _mode(spec: ConvSpec) -> str:
    flags = (" batch-stats" if spec.batch_stats else "") + (" grad" if spec.grad else "")
    flags += " tf32" if spec.tf32 else ""
    flags += " sync" if spec.sync else ""
    flags += " invariant" if spec.invariant else ""
    return f"{spec.dtype} {spec.layout}{flags}"


@dataclass(frozen=True)
class Verdict:
    """Yes, or no with one sentence: expected, got, what to do. It is true for a yes."""

    ok: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.ok

    @staticmethod
    def yes(reason: str = "") -> Verdict:
        return Verdict(True, reason)

    @staticmethod
    def no(expected: str, got: str, todo: str) -> Verdict:
        """Return a refusal. ``explain()``, the log and the exception use the same sentence."""
        return Verdict(False, f"expected {expected}, got {got}; {todo}")


YES = Verdict(True)
