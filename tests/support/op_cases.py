"""Problems for the ops' tests: random arguments of any op, and the same computation written out in stock PyTorch.

``Problem.eager`` is the oracle. It is written from the ops' docstrings and shares no code with the reference backend.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_fast import numerics
from resnet_fast.calls import Conv, Norm

OPS = ("conv_bn_act", "stem", "bottleneck", "basic_block")
BLOCKS = {"bottleneck": 3, "basic_block": 2}


@dataclass(frozen=True)
class Problem:
    """The arguments of one op call. ``residual`` is also a block's given shortcut."""

    op: str
    x: Tensor
    convs: tuple[Conv, ...] = ()
    norms: tuple[Norm, ...] = ()
    relu: bool = True
    residual: Tensor | None = None
    pool: tuple[int, int, int] = (3, 2, 1)
    projection: bool = False

    def args(self) -> tuple[Any, ...]:
        """Return the op's flat arguments, without ``backend``."""
        if self.op in BLOCKS:
            geometry = [v for c in self.convs for v in (*c.stride, *c.padding, *c.dilation, c.groups)]
            return (
                self.x,
                [c.weight for c in self.convs],
                [c.bias for c in self.convs],
                [t for n in self.norms for t in n.tensors()],
                geometry,
                [n.batch_stats for n in self.norms],
                [n.momentum for n in self.norms],
                [n.eps for n in self.norms],
                self.residual,
            )
        conv = [v for c in self.convs for v in c]
        if self.op == "stem":
            return (self.x, *conv, *self.norms[0][:7], list(self.pool))
        return (self.x, *conv, *self.norms[0][:7], self.relu, self.residual)

    def run(self, backend: str = "auto") -> Tensor:
        return getattr(torch.ops.resnet_fast, self.op)(*self.args(), backend)

    def eager(self, relu: bool = True) -> Tensor:
        """Run the op in stock PyTorch, out of place. ``relu=False`` leaves the final ReLU out."""
        last = torch.relu if relu and self.relu else lambda t: t
        if self.op == "conv_bn_act":
            y = _bn(_conv(self.x, self.convs[0]), self.norms[0])
            return last(y if self.residual is None else y + self.residual)
        if self.op == "stem":
            return F.max_pool2d(torch.relu(_bn(_conv(self.x, self.convs[0]), self.norms[0])), *self.pool)
        count = BLOCKS[self.op]
        y = self.x
        for i in range(count):
            y = _bn(_conv(y, self.convs[i]), self.norms[i])
            if i < count - 1:
                y = torch.relu(y)
        shortcut = self.x if self.residual is None else self.residual
        if self.projection:
            shortcut = _bn(_conv(self.x, self.convs[-1]), self.norms[-1])
        return last(y + shortcut)

    def map(self, fn: Callable[[str, Tensor], Tensor]) -> Problem:
        """Return a copy with every tensor replaced by ``fn(name, tensor)``."""

        def change(name: str, t: Any) -> Any:
            return fn(name, t) if isinstance(t, Tensor) else t

        convs = tuple(Conv(*(change(f"{k}{i}", v) for k, v in c._asdict().items())) for i, c in enumerate(self.convs))
        names = ("gamma", "beta", "mean", "var", "batch_stats", "momentum", "eps")
        norms = tuple(
            Norm(*(change(f"{k}{i}", v) for k, v in zip(names, n[:7], strict=True))) for i, n in enumerate(self.norms)
        )
        return replace(
            self, x=change("x", self.x), convs=convs, norms=norms, residual=change("residual", self.residual)
        )

    def tensors(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}

        def note(name: str, t: Tensor) -> Tensor:
            found[name] = t
            return t

        self.map(note)
        return found

    def leaves(self) -> dict[str, Tensor]:
        """Return the tensors that may require a gradient: all but the running statistics."""
        return {k: t for k, t in self.tensors().items() if not is_statistic(k)}

    def statistics(self) -> dict[str, Tensor]:
        return {k: t for k, t in self.tensors().items() if is_statistic(k)}

    def copy(self, grad: bool = False) -> Problem:
        """Return a copy with its own tensors of the same strides; with ``grad``, leaves require gradients."""
        return self.map(lambda k, t: t.detach().clone().requires_grad_(grad and not is_statistic(k)))

    def to(self, dtype: torch.dtype) -> Problem:
        return self.map(lambda k, t: t.detach().to(dtype, copy=True))

    def gemm_k(self) -> int:
        """Return the products per output of the largest convolution."""
        return max(c.weight[0].numel() for c in self.convs)


def is_statistic(name: str) -> bool:
    return name.startswith(("mean", "var"))


def _conv(x: Tensor, c: Conv) -> Tensor:
    return F.conv2d(x, c.weight, c.bias, c.stride, c.padding, c.dilation, c.groups)


def _bn(x: Tensor, n: Norm) -> Tensor:
    if n.batch_stats or n.mean is not None:
        return F.batch_norm(x, n.mean, n.var, n.weight, n.bias, n.batch_stats, n.momentum, n.eps)
    if n.weight is not None:
        x = x * n.weight.view(-1, 1, 1)
    return x if n.bias is None else x + n.bias.view(-1, 1, 1)


def lay_out(t: Tensor, layout: str) -> Tensor:
    """Return ``t`` in a layout; a sliced one is part of a larger buffer of NaN, so that a stray read shows."""
    if layout == "nchw":
        return t.contiguous()
    if layout == "nhwc":
        return t.contiguous(memory_format=torch.channels_last)
    n, c, h, w = t.shape
    buffer = torch.full((n, c + 2, h + 3, w + 2), float("nan"), dtype=t.dtype)
    if layout == "sliced_nhwc":
        buffer = buffer.contiguous(memory_format=torch.channels_last)
    elif layout == "transposed":
        buffer = torch.full((n, c + 2, w + 2, h + 3), float("nan"), dtype=t.dtype).transpose(2, 3)
    view = buffer[:, 1 : c + 1, 2 : h + 2, 1 : w + 1]
    return view.copy_(t)


LAYOUTS = ("nchw", "nhwc", "sliced", "sliced_nhwc", "transposed")


def norm(c: int, *, affine: bool = True, tracked: bool = True, batch_stats: bool = False, present: bool = True) -> Norm:
    """Return random BatchNorm parameters with mean N(0, 1) and variance U(0.5, 2), which expose hidden faults."""
    if not present:
        return Norm()
    gamma, beta = (torch.rand(c) + 0.5, torch.randn(c)) if affine else (None, None)
    mean, var = (torch.randn(c), torch.rand(c) * 1.5 + 0.5) if tracked else (None, None)
    return Norm(gamma, beta, mean, var, batch_stats, 0.1, 1e-3)


def make(
    op: str,
    *,
    n: int = 2,
    h: int = 9,
    w: int = 7,
    ci: int = 8,
    co: int = 8,
    k: int = 3,
    stride: int = 1,
    padding: int | None = None,
    dilation: int = 1,
    groups: int = 1,
    bias: bool = False,
    residual: bool = False,
    projection: bool | None = None,
    relu: bool = True,
    dtype: torch.dtype = torch.float32,
    layout: str = "nchw",
    weight_layout: str = "nchw",
    pool: tuple[int, int, int] = (3, 2, 1),
    norm_dtype: torch.dtype | None = None,
    **norm_options: bool,
) -> Problem:
    """Return a random problem. In a block ``stride``, ``dilation`` and ``groups`` belong to the 3x3, as in torchvision;
    ``projection`` defaults to where the shapes need one; ``residual`` gives the shortcut as a tensor instead."""

    def conv(a: int, b: int, k: int, s: int = 1, p: int = 0, d: int = 1, g: int = 1) -> Conv:
        weight = lay_out(torch.randn(b, a // g, k, k) / (a // g * k * k) ** 0.5, weight_layout)
        return Conv(weight, torch.randn(b) if bias else None, (s, s), (p, p), (d, d), g)

    x = torch.randn(n, ci, h, w)
    p = Problem(op, x, relu=relu, pool=pool)
    if op in ("conv_bn_act", "stem"):
        pad = dilation * (k // 2) if padding is None else padding
        p = replace(p, convs=(conv(ci, co, k, stride, pad, dilation, groups),), norms=(norm(co, **norm_options),))
    else:
        mid = conv(co, co, 3, stride, dilation, dilation, groups)
        if op == "bottleneck":
            convs = [conv(ci, co, 1), mid, conv(co, co * 2, 1)]
        else:
            convs = [conv(ci, co, 3, stride, 1), conv(co, co, 3, 1, dilation, dilation)]
        out = convs[-1].weight.shape[0]
        if projection or (projection is None and not residual and (out != ci or stride != 1)):
            convs.append(conv(ci, out, 1, stride))
        p = replace(
            p,
            convs=tuple(convs),
            norms=tuple(norm(c.weight.shape[0], **norm_options) for c in convs),
            projection=len(convs) > BLOCKS[op],
        )
    if residual:
        with torch.no_grad():
            p = replace(p, residual=torch.randn(_out_shape(p)))

    def finish(name: str, t: Tensor) -> Tensor:
        if norm_dtype is not None and name.rstrip("0123456789") in ("gamma", "beta", "mean", "var"):
            return t.to(norm_dtype)
        t = t.to(dtype)
        return lay_out(t, layout) if name in ("x", "residual") else t

    return p.map(finish)


def _out_shape(p: Problem) -> torch.Size:
    y = p.x
    for c in p.convs[: BLOCKS.get(p.op, 1)]:
        y = _conv(y, c)
    return y.shape


def assert_equals_eager(p: Problem, backend: str = "reference") -> None:
    """Assert that output, strides, running statistics and gradients equal stock PyTorch's bit for bit."""
    ours, stock = p.copy(grad=True), p.copy(grad=True)
    y, z = ours.run(backend), stock.eager()
    assert torch.equal(y, z) and y.stride() == z.stride() and y.dtype == z.dtype
    cotangent = torch.randn_like(z)
    y.backward(cotangent)
    z.backward(cotangent)
    for (name, a), b in zip(ours.leaves().items(), stock.leaves().values(), strict=True):
        assert a.grad is not None and b.grad is not None and torch.equal(a.grad, b.grad), f"gradient of {name}"
    for (name, a), b in zip(ours.statistics().items(), stock.statistics().values(), strict=True):
        assert torch.equal(a, b), name
        assert torch.equal(a, p.tensors()[name]) != _updates(p, name), name


def _updates(p: Problem, name: str) -> bool:
    return p.norms[int(name.lstrip("meanvr"))].batch_stats


def assert_within_budget(p: Problem, backend: str = "onednn") -> numerics.ErrorReport:
    """Assert that the op's error to fp64 is within the budget set by eager's error, and no argument changes."""
    before = {k: t.clone() for k, t in p.tensors().items()}
    with torch.no_grad():
        y = p.run(backend)
        stock = p.map(lambda k, t: t.detach().clone(memory_format=torch.preserve_format)).eager()
        exact = p.to(torch.float64)
        pre = exact.eager(relu=False) if p.relu and p.op != "stem" else None
        report = numerics.assert_close(y, exact.eager(), stock, p.gemm_k(), pre)
    for name, t in p.tensors().items():
        assert torch.equal(t, before[name]), f"{name} was written to"
    assert y.dtype == p.x.dtype
    return report


class Call(nn.Module):
    """An op with its problem's parameters and buffers, as a module of one tensor."""

    def __init__(self, p: Problem, backend: str = "auto"):
        super().__init__()
        self.backend, self.problem, self.names = backend, p, list(p.tensors())
        for name, t in p.tensors().items():
            if name in p.leaves():
                setattr(self, name, nn.Parameter(t.clone()))
            else:
                self.register_buffer(name, t.clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.problem.map(lambda k, t: x if k == "x" else getattr(self, k)).run(self.backend)
