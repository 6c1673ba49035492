"""Run one launch of one kernel on random tensors, and the same computation in stock PyTorch.

The tuner times it and checks a config's output with it, proofs.py checks a config before its first use with it, and the
tests and ``make gpu-check`` compare it with fp64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import numerics
from ...calls import Conv
from ...spec import ConvSpec, LaunchSpec
from ...tuning.configs import Config
from ...tuning.routes import merged_groups
from . import launchers
from .launch import FoldedWeights, arrivals

HANDOVERS = 50
"""Runs of a split-K launch on a GPU that must give the same bits."""


@dataclass
class Problem:
    """The random tensors of a launch; weights and biases per convolution, the projection's last."""

    spec: LaunchSpec
    x: Tensor
    weights: list[Tensor]
    biases: list[Tensor]
    residual: Tensor | None
    projected: Tensor | None

    def to(self, dtype: torch.dtype) -> Problem:
        """Return the problem with all tensors in ``dtype``."""

        def cast(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.to(dtype)

        return Problem(
            self.spec, self.x.to(dtype), [w.to(dtype) for w in self.weights], [b.to(dtype) for b in self.biases],
            cast(self.residual), cast(self.projected),
        )  # fmt: skip

    def eager(self, relu: bool = True) -> Tensor:
        """Compute the launch in stock PyTorch, in the tensors' dtype, rounding after every operation."""
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
        """Return the weights as launchers.py packs them."""
        folded = [
            launchers.pack(Conv(w, None, *c.geometry()), w.float(), b.float(), merged_groups(c), w.dtype)
            for w, b, c in zip(self.weights, self.biases, self.spec.all_convs(), strict=True)
        ]
        members = folded[: len(self.spec.convs)]
        return launchers.parameters(self.spec, config, members, folded[-1] if self.spec.projection else None)

    def run(self, config: Config) -> Tensor:
        """Run the launch on the kernel of ``config``."""
        return self.prepared(config)()

    def prepared(self, config: Config) -> Callable[[], Tensor]:
        """Pack the parameters, and return a function that runs the launch: the part that is timed."""
        launcher, packed = launchers.LAUNCHERS[config.kernel], self.packed(config)
        counters = arrivals([(self.spec, config)], self.x)
        split = {} if counters is None else {"arrivals": counters}
        return lambda: launcher(self.spec, config, packed, self.x, self.residual, self.projected, **split)

    def check(self, config: Config) -> numerics.ErrorReport:
        """Run the launch and assert its error budget, see :func:`resnet_fast.numerics.assert_close`.

        Programs that hand sums over in memory may be wrong in a few runs only, so such a launch runs several times.
        PyTorch's fused kernels must keep NaN, as its separate ones and ours do.
        """
        if config.kernel == "cudnn_fused":
            self._check_nan(config)
        y = self.run(config)
        for _ in range(HANDOVERS if config.splits > 1 and y.is_cuda else 0):
            if not torch.equal(self.run(config), y):
                raise AssertionError(f"expected the same bits from every run of {config}, got others")
        double = self.to(torch.float64)
        k = max(c.gemm_k for c in self.spec.all_convs())
        epilogue = self.spec.last.epilogue
        pre = double.eager(relu=False) if epilogue.relu and epilogue.pool is None else None
        return numerics.assert_close(y, double.eager(), self.eager(), k, pre)

    def _check_nan(self, config: Config) -> None:
        """Assert that a NaN in the input appears in the output wherever it does in stock PyTorch."""
        poisoned = replace(self, x=self.x.clone(memory_format=torch.preserve_format))
        poisoned.x[:, 0, 0, 0] = float("nan")
        lost = int((poisoned.eager().isnan() & ~poisoned.run(config).isnan()).sum())
        if lost:
            raise AssertionError(f"{lost} elements are NaN in stock PyTorch and finite here")


def _conv(x: Tensor, c: ConvSpec, w: Tensor, b: Tensor) -> Tensor:
    return F.conv2d(x, w, b, *c.geometry())


def problem(spec: LaunchSpec, device: str | torch.device = "cpu", seed: int = 0) -> Problem:
    """Return a launch's random tensors, NHWC, with activations surrounded by NaN.

    Args:
        spec: the launch.
        device: where the tensors are.
        seed: the same seed gives the same tensors.
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
    """Return the values of ``t`` in dense NHWC with NaN before and after, so that a read outside poisons the result.

    64 elements on each side keep the 16-byte alignment that descriptors need.
    """
    n, c, h, w = t.shape
    field = torch.full((t.numel() + 128,), float("nan"), dtype=t.dtype, device=t.device)
    inner = field[64 : 64 + t.numel()].view(n, h, w, c).permute(0, 3, 1, 2)
    return inner.copy_(t)
