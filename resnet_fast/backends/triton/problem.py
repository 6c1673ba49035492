"""One launch of one kernel on random tensors, and the same computation in stock PyTorch.

The tuner times it and proves a config on it before it may be chosen; the tests and ``make gpu-check`` compare it with
fp64. Nothing here runs when a model does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import numerics
from ...calls import Conv
from ...spec import ConvSpec, LaunchSpec
from ...tuning.configs import Config
from ...tuning.routes import merged_groups
from . import plan
from .launch import FoldedWeights


@dataclass
class Problem:
    """Random tensors of a launch: x, weights and biases per convolution (projection last), residual, projected."""

    spec: LaunchSpec
    x: Tensor
    weights: list[Tensor]
    biases: list[Tensor]
    residual: Tensor | None
    projected: Tensor | None

    def to(self, dtype: torch.dtype) -> Problem:
        def cast(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.to(dtype)

        return Problem(
            self.spec, self.x.to(dtype), [w.to(dtype) for w in self.weights], [b.to(dtype) for b in self.biases],
            cast(self.residual), cast(self.projected),
        )  # fmt: skip

    def eager(self, relu: bool = True) -> Tensor:
        """The launch in stock PyTorch, in the tensors' dtype, rounding after every operation."""
        *inner, last = self.spec.convs
        y = self.x
        for i, c in enumerate(inner):
            y = torch.relu(_conv(y, c, self.weights[i], self.biases[i]))
        y = _conv(y, last, self.weights[len(inner)], self.biases[len(inner)])
        if self.residual is not None:
            y = y + self.residual
        if self.projected is not None and self.spec.projection is not None:
            y = y + _conv(self.projected, self.spec.projection, self.weights[-1], self.biases[-1])
        y = torch.relu(y) if relu and last.epilogue.relu else y
        return y if last.epilogue.pool is None else F.max_pool2d(y, *last.epilogue.pool)

    def packed(self, config: Config) -> FoldedWeights:
        """As plan.py packs it."""
        folded = [
            plan.pack(Conv(w, None, *c.geometry()), w.float(), b.float(), merged_groups(c), w.dtype)
            for w, b, c in zip(self.weights, self.biases, self.spec.all_convs(), strict=True)
        ]
        members = folded[: len(self.spec.convs)]
        return plan.parameters(self.spec, config, members, folded[-1] if self.spec.projection else None)

    def run(self, config: Config) -> Tensor:
        """The launch on our kernel."""
        return self.prepared(config)()

    def prepared(self, config: Config) -> Callable[[], Tensor]:
        """The launch on the kernel that ``config`` names, with its parameters packed: what is timed."""
        launcher, packed = plan.LAUNCHERS[config.kernel], self.packed(config)
        return lambda: launcher(self.spec, config, packed, self.x, self.residual, self.projected)

    def check(self, config: Config) -> numerics.ErrorReport:
        """Run, and compare with fp64 and with eager's own error."""
        double = self.to(torch.float64)
        k = max(c.gemm_k for c in self.spec.all_convs())
        epilogue = self.spec.last.epilogue
        pre = double.eager(relu=False) if epilogue.relu and epilogue.pool is None else None
        return numerics.assert_close(self.run(config), double.eager(), self.eager(), k, pre)


def _conv(x: Tensor, c: ConvSpec, w: Tensor, b: Tensor) -> Tensor:
    return F.conv2d(x, w, b, *c.geometry())


def problem(spec: LaunchSpec, device: str | torch.device = "cpu", seed: int = 0) -> Problem:
    """Random tensors of a launch's shapes on ``device``, NHWC; activations lie in a field of NaN.

    ``seed``: of the random numbers, so that a result can be had again.
    """
    generator = torch.Generator(device).manual_seed(seed)
    dtype = getattr(torch, spec.dtype)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    def image(c: ConvSpec) -> Tensor:
        return guarded(random(c.n, c.ci, c.h, c.w))

    weights = [random(c.co, c.ci // c.groups, c.r, c.s) / c.gemm_k**0.5 for c in spec.all_convs()]
    biases = [random(c.co) for c in spec.all_convs()]
    residual = guarded(random(*spec.last.out_shape())) if spec.residual else None
    projected = None if spec.projection is None else image(spec.projection)
    return Problem(spec, image(spec.first), weights, biases, residual, projected)


def guarded(t: Tensor) -> Tensor:
    """The values of ``t`` in dense NHWC, with NaN before and behind: a read outside poisons the result.

    64 elements on either side keep the 16-byte alignment that descriptors need.
    """
    n, c, h, w = t.shape
    field = torch.full((t.numel() + 128,), float("nan"), dtype=t.dtype, device=t.device)
    inner = field[64 : 64 + t.numel()].view(n, h, w, c).permute(0, 3, 1, 2)
    return inner.copy_(t)
