"""Run one launch of the backward pass of frozen_chain.py on random tensors, and the same computation in stock PyTorch.

As :mod:`.problem`, for launches with a folded norm: the weight is fp32, its norm is given by the vectors of fold.py,
and the input of a dgrad with a ReLU before it is an activation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .... import numerics
from ....calls import Conv
from ....spec import ConvSpec, LaunchSpec
from ....tuning import configs
from ....tuning.configs import Config
from ..problem import guarded
from . import fold, fold_gradient, folded_convolution


@dataclass
class FoldedProblem:
    """A launch, the fp32 weight and the vectors of its norm, the convolution's input and its output's gradient."""

    launch: LaunchSpec
    weight: Tensor
    vectors: Tensor
    x: Tensor
    g: Tensor

    @property
    def spec(self) -> ConvSpec:
        return self.launch.last

    def prepared(self, config: Config) -> Callable[[], Tensor]:
        """Return a function that runs the launch with what it needs: the part that is timed."""
        if self.launch.kernel == "conv_wgrad":
            return lambda: self._gradients(config, affine=False)[0]
        return lambda: self._dx(config)

    def _dx(
        self, config: Config, add: Tensor | None = None, strided: folded_convolution.Strided | None = None
    ) -> Tensor:
        conv = Conv(self.weight, None, *self.spec.geometry())
        ours = [not config.stock]
        (wt,), g = fold.begin_backward([conv], [self.spec], [self.vectors], ours, self.g, None)
        return folded_convolution.dgrad(self.launch, config, conv, self.vectors, wt, g, self.x, add, strided)

    def _gradients(self, config: Config, affine: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Return dW, and with ``affine`` the gradients of gamma and beta."""
        sums = folded_convolution.wgrad(self.launch, config, self.weight, self.g, self.x, True, affine)
        dw, dgamma, dbeta = torch.empty_like(self.weight), *torch.empty_like(self.vectors[:2])
        gamma, beta = (dgamma, dbeta) if affine else (None, None)
        wanted = fold_gradient.Wanted(self.spec, self.weight, self.vectors, sums, dw, gamma, beta, None)
        fold_gradient.fold_gradients([wanted])
        return dw, dgamma, dbeta

    def check(self, config: Config) -> numerics.ErrorReport:
        """Run the launch and assert its error budget, see :func:`resnet_fast.numerics.assert_close`.

        A config that needs a proof is also run as a step runs it, with everything else that the launch computes.
        """
        out = self.prepared(config)().to(self.x.dtype)
        double, eager = (self._stock(dtype) for dtype in (torch.float64, out.dtype))
        if configs.needs_proof(self.launch, config):
            self._check_as_in_a_step(config, double, eager)
        return numerics.assert_close(out, double, eager, self._products())

    def _products(self) -> int:
        """Return the number of products per output."""
        spec = self.spec
        return spec.gemm_m if self.launch.kernel == "conv_wgrad" else spec.co // spec.groups * spec.r * spec.s

    def _check_as_in_a_step(self, config: Config, double: Tensor, eager: Tensor) -> None:
        """Check what a step adds to a dgrad without a ReLU before it, or the sums that a wgrad takes along.

        Args:
            config: the config to check.
            double: the plain output in float64.
            eager: the plain output of stock PyTorch.
        """
        if self.launch.kernel == "conv_wgrad":
            dw, dgamma, dbeta = self._gradients(config, affine=True)
            _, invstd, centre = self.vectors.double()
            p = (dw.double() / self.vectors[fold.SCALE].double()[:, None, None, None]) * self.weight.double()
            _same(dbeta, self.g.double().sum((0, 2, 3)), self.g.double().abs().sum((0, 2, 3)))
            terms = p.sum((1, 2, 3)), centre * dbeta.double()
            _same(dgamma, invstd * (terms[0] - terms[1]), invstd * (p.abs().sum((1, 2, 3)) + terms[1].abs()))
        elif not self.launch.prologue:
            add = guarded(torch.randn_like(eager.float()).to(eager.dtype))
            numerics.assert_close(self._dx(config, add), double + add.double(), eager + add, self._products())
            padded = torch.zeros_like(add)
            padded[:, :, ::2, ::2] = add[:, :, ::2, ::2]
            dx = self._dx(config, None, (guarded(add[:, :, ::2, ::2]), (2, 2)))
            numerics.assert_close(dx, double + padded.double(), eager + padded, self._products())

    def _stock(self, dtype: torch.dtype) -> Tensor:
        """Compute the launch in PyTorch on tensors in ``dtype``; the factor of the norm is in fp32 (fp64)."""
        wide = torch.promote_types(dtype, torch.float32)
        scale = self.vectors[fold.SCALE].to(wide)[:, None, None, None]
        stride, padding, dilation, groups = self.spec.geometry()
        wanted = self.launch.kernel == "conv_dgrad"
        dx, dw, _ = torch.ops.aten.convolution_backward(
            self.g.to(dtype), self.x.to(dtype), (self.weight.to(wide) * scale).to(dtype), None,
            stride, padding, dilation, False, [0, 0], groups, [wanted, not wanted, False],
        )  # fmt: skip
        if not wanted:
            return (dw.to(wide) * scale).to(dtype)
        return torch.where(self.x > 0, dx, 0.0) if self.launch.prologue else dx


SUM = 1e-3
"""Largest error of a channel's sum of products or gradients. A sum in fp32 is a thousand times better."""


def _same(found: Tensor, wanted: Tensor, magnitudes: Tensor) -> None:
    """Check sums per channel, in units of the sum of their terms' magnitudes."""
    worst = ((found.double() - wanted).abs() / magnitudes.clamp_min(1e-30)).max().item()
    if not worst <= SUM:
        raise AssertionError(f"the sum of a channel is off by {worst:.2e} of its terms' magnitudes")


def folded_problem(launch: LaunchSpec, device: str | torch.device = "cpu", seed: int = 0) -> FoldedProblem:
    """Return a launch's random tensors, NHWC, with activations and gradients surrounded by NaN.

    Args:
        launch: a launch with a folded norm.
        device: where the tensors are.
        seed: the same seed gives the same tensors.
    """
    generator = torch.Generator(device).manual_seed(seed)
    c = launch.last
    dtype = getattr(torch, c.dtype)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    weight = random(c.co, c.ci // c.groups, c.r, c.s) / c.gemm_k**0.5
    weight = weight.contiguous(memory_format=torch.channels_last)
    vectors = torch.stack([1 + 0.2 * random(c.co), 1 + random(c.co).abs(), random(c.co)])
    x = random(c.n, c.ci, c.h, c.w) + 0.5
    x = guarded((x.relu() if launch.prologue else x).to(dtype))
    g = guarded(random(c.n, c.co, c.ho, c.wo).to(dtype))
    return FoldedProblem(launch, weight, vectors, x, g)
