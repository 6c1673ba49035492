"""Run one launch of a training step on random tensors, and the same computation in stock PyTorch.

The tuner times it and checks a config's output with it. As in a block, the weight is fp32, a raw input comes with the
vectors of its norm, and a gradient with the coefficients of the norm that follows. The reference starts from the same
values. cuDNN is timed with the passes that it needs around it (convolution.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .... import numerics
from ....calls import Norm
from ....spec import ConvSpec, LaunchSpec
from ....tuning import configs
from ....tuning.configs import Config
from ....tuning.training_configs import CUDNN, is_training
from ..problem import guarded, problem
from . import batch_norm, convolution, cudnn_passes, norm_gradient, pack, wgrad_sum
from .folded_problem import FoldedProblem, folded_problem
from .pack import Passenger
from .vectors import HI, INVSTD, LO, MEAN, SCALE, SHIFT, THRESHOLD, Act, Grad


def _over(row: Tensor) -> Tensor:
    return row[None, :, None, None]


@dataclass
class TrainingProblem:
    """A launch, the fp32 weight, its input and the gradient of its raw output."""

    launch: LaunchSpec
    weight: Tensor
    x: Act
    grad: Grad

    @property
    def spec(self) -> ConvSpec:
        return self.launch.last

    def prepared(self, config: Config) -> Callable[[], Tensor]:
        """Return a function that runs the launch, including the packing of its weight: the part that is timed."""
        spec, weight, kernel = self.spec, self.weight, self.launch.kernel
        if kernel == "conv_fwd":
            return lambda: convolution.forward(weight, spec, config, self.x, None, spec.batch_stats)[0]
        if kernel == "conv_wgrad":
            return lambda: self._wgrad(config)
        if self.launch.prologue:
            packed = self._is_packed(config)
            return lambda: convolution.dgrad_to(weight, spec, config, self.grad, self.x, packed)[0]
        if config == CUDNN:
            return lambda: convolution.stock_backward(weight, spec, self.grad, self.x.y, (True, False))[0]
        return lambda: convolution.dgrad(weight, spec, config, self.grad)[0]

    def _wgrad(self, config: Config) -> Tensor:
        dw, reduction = convolution.wgrad(self.weight, self.spec, config, self.grad, self.x)
        wgrad_sum.reduce_splits(reduction)
        return dw

    def _is_packed(self, config: Config) -> bool:
        """Return whether the ReLU below is a clamp. A launch does not know the forward's config, so its own counts."""
        return config.packed and self.x.clamp is not None

    def check(self, config: Config) -> numerics.ErrorReport:
        """Run the launch and assert its error budget, see :func:`resnet_fast.numerics.assert_close`.

        A config that needs a proof is also run as a step runs it, with everything else that the launch computes.
        """
        out = self.prepared(config)().to(self.x.y.dtype)
        double, eager = (self._stock(dtype, config) for dtype in (torch.float64, out.dtype))
        if configs.needs_proof(self.launch, config):
            self._check_as_in_a_step(config, double, eager)
        return numerics.assert_close(out, double, eager, self._products())

    def _products(self) -> int:
        """Return the number of products per output."""
        spec = self.spec
        known = {"conv_fwd": spec.gemm_k, "conv_wgrad": spec.gemm_m}
        return known.get(self.launch.kernel, spec.co // spec.groups * spec.r * spec.s)

    def _check_as_in_a_step(self, config: Config, double: Tensor, eager: Tensor) -> None:
        """Check the output with what a step adds to it, and the statistics or sums of the launch.

        Args:
            config: the config to check.
            double: the plain output in float64.
            eager: the plain output of stock PyTorch.
        """
        spec, k = self.spec, self._products()
        if self.launch.kernel == "conv_fwd":
            centre = double.mean((0, 2, 3)).float()
            y, partials, rows = convolution.forward(self.weight, spec, config, self.x, centre, spec.batch_stats)
            numerics.assert_close(y, double - _over(centre), (eager - _over(centre)).to(y.dtype), k)
            if partials is not None:
                self._check_statistics(y, partials, rows)
        elif self.launch.kernel == "conv_dgrad" and self.launch.prologue:
            packed = self._is_packed(config)
            g, sums = convolution.dgrad_to(self.weight, spec, config, self.grad, self.x, packed)
            assert self.x.vectors is not None
            away = self.x.y.double() - _over(self.x.vectors[MEAN].double())
            _same_sums(sums[0].double().sum(0), g.double())
            _same_sums(sums[1].double().sum(0), g.double() * away)
        elif self.launch.kernel == "conv_dgrad":
            add = guarded(torch.randn_like(eager.float()).to(eager.dtype))
            dx, _ = convolution.dgrad(self.weight, spec, config, self.grad, add=add)
            numerics.assert_close(dx, double + add.double(), eager + add, k)
            every = (slice(None), slice(None), slice(None, None, 2), slice(None, None, 2))
            p, dw, reduction = self._splits()
            strided = guarded(add[every]), (2, 2)
            dx, _ = convolution.dgrad(self.weight, spec, config, self.grad, add_strided=strided, reduction=reduction)
            padded = torch.zeros_like(add)
            padded[every] = add[every]
            numerics.assert_close(dx, double + padded.double(), eager + padded, k)
            _same("a passenger's dW", dw.permute(0, 2, 3, 1).flatten(1), p.sum(0))
        elif pack.takes_passengers(config):
            self._check_passengers(config, double, eager)

    def _splits(self) -> tuple[Tensor, Tensor, Passenger]:
        """Return two splits of a dW (2, Co, columns), dW, and the programs that add them."""
        co, ci, r, s = self.weight.shape
        dw = torch.empty_like(self.weight)
        p = torch.randn(2, co, r * s * ci, device=dw.device)
        channels, kind = (ci, co, 1, ci, co, r, s), (False, False, False, False, False)
        arguments = (p, *[None] * 6, dw, 2, 0, *dw.stride())
        return p, dw, wgrad_sum.reduction(co, r * s * ci, arguments, (*channels, *kind))

    def _check_passengers(self, config: Config, double: Tensor, eager: Tensor) -> None:
        """Check dW of a launch with passengers, and what they write: another dW and, as in a step, the norm below."""
        spec, x = self.spec, self.x
        p, other, reduction = self._splits()
        if x.vectors is None:
            passenger = norm_gradient.without_norm(reduction)
        else:
            one, two = (norm_gradient.gradient_of(x.y, x.y, True) for _ in range(2))
            partials = torch.randn(2, TILES_BELOW, spec.ci, device=x.y.device)
            norm_gradient.coefficients(two, partials, x.vectors)
            weight = torch.randn(spec.ci, spec.ci, 1, 1, device=x.y.device)
            below = spec.with_(co=spec.ci, r=1, s=1, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1)
            a, tile = x.vectors[SCALE], pack.tile_behind(config.num_warps)
            wt, packing = pack.dgrad_passenger(weight, x.y.dtype, below, a, tile)
            _, passenger = norm_gradient.passenger(
                one, partials, x.vectors, (None, None, None), None, packing, reduction
            )
        dw, rest = convolution.wgrad(self.weight, spec, config, self.grad, x, passenger)
        wgrad_sum.reduce_splits(rest)
        numerics.assert_close(dw.to(x.y.dtype), double, eager, self._products())
        _same("a passenger's dW", other.permute(0, 2, 3, 1).flatten(1), p.sum(0))
        if x.vectors is not None:
            _same("a passenger's coefficients", one.coefficients, two.coefficients)
            _same("a passenger's weight", wt.float(), pack.pack_dgrad(weight, x.y.dtype, below, a).float())

    def _check_statistics(self, y: Tensor, partials: Tensor, rows: int) -> None:
        """Check the mean and variance of the stored output ``y`` that a launch computed by tile."""
        norm = Norm(None, None, None, None, True, 0.1, 1e-5)
        found, _ = batch_norm.finalized(partials, rows, self.spec.gemm_m, norm, y.dtype)
        mean, var = y.double().mean((0, 2, 3)), y.double().var((0, 2, 3), unbiased=False)
        for name, got, want in (("mean", found[MEAN], mean), ("deviation", 1 / found[INVSTD], (var + norm.eps).sqrt())):
            worst = ((got.double() - want).abs() / (var + norm.eps).sqrt()).max().item()
            if not worst <= FP32_SUM:
                raise AssertionError(f"the {name} of a channel is {worst:.2e} standard deviations off")

    def _stock(self, dtype: torch.dtype, config: Config) -> Tensor:
        """Compute the launch in PyTorch: norms in fp32 (fp64 for the reference), every tensor rounded to ``dtype``."""
        wide = torch.promote_types(dtype, torch.float32)
        act, weight, c = self.x.y.to(dtype), self.weight.to(dtype), self.spec
        if self.launch.prologue:
            act = self._normed(wide).relu().to(dtype)
        if self.launch.kernel == "conv_fwd":
            return F.conv2d(act, weight, None, *c.geometry())
        assert self.grad.coefficients is not None and self.grad.y is not None
        a, b, shift = self.grad.coefficients.to(wide)
        dy = _over(a) * self.grad.g.to(wide) + _over(b) * self.grad.y.to(wide) + _over(shift)
        stride, padding, dilation, groups = c.geometry()
        wanted = self.launch.kernel == "conv_dgrad"
        dx, dw, _ = torch.ops.aten.convolution_backward(
            dy.to(dtype), act, weight, None, stride, padding, dilation, False, [0, 0], groups,
            [wanted, not wanted, False],
        )  # fmt: skip
        if not wanted:
            return dw
        return torch.where(self._passes(config), dx, 0.0) if self.launch.prologue else dx

    def _normed(self, dtype: torch.dtype) -> Tensor:
        assert self.x.vectors is not None
        v = self.x.vectors.to(dtype)
        return self.x.y.to(dtype) * _over(v[SCALE]) + _over(v[SHIFT])

    def _passes(self, config: Config) -> Tensor:
        """Return which elements pass the ReLU below, as the forward pass decided."""
        if config == CUDNN or not self._is_packed(config):
            return ~(self._normed(torch.float32).to(self.x.y.dtype if config == CUDNN else torch.float32) <= 0)
        assert self.x.clamp is not None
        lo, hi, threshold = (_over(self.x.clamp[row].float()) for row in (LO, HI, THRESHOLD))
        return self.x.y.float().clamp(lo, hi) != threshold


FP32_SUM = 1e-3
"""Largest error of a channel's statistics or sums. A sum in fp32 by tiles is a thousand times better."""

TILES_BELOW = 400
"""Tiles of a passenger's sums: more than one chunk of a channel block."""


def _same(what: str, found: Tensor | None, wanted: Tensor | None) -> None:
    """Check what a passenger wrote against the same sums in another order."""
    assert found is not None and wanted is not None
    worst = ((found - wanted).norm() / wanted.norm()).item()
    if not worst <= FP32_SUM:
        raise AssertionError(f"{what} has a relative error of {worst:.2e}")


def _same_sums(found: Tensor, terms: Tensor) -> None:
    """Check fp32 sums over images and pixels of ``terms``, in units of the sum of magnitudes."""
    error = (found - terms.sum((0, 2, 3))).abs() / terms.abs().sum((0, 2, 3)).clamp_min(1e-30)
    worst = error.max().item()
    if not worst <= FP32_SUM:
        raise AssertionError(f"the sum of a channel is off by {worst:.2e} of its terms' magnitudes")


def launch_problem(launch: LaunchSpec, device: str | torch.device = "cpu", seed: int = 0) -> Any:
    """Return the random tensors of a launch, of inference or of a training step."""
    return training_problem(launch, device, seed) if is_training(launch) else problem(launch, device, seed)


def training_problem(
    launch: LaunchSpec, device: str | torch.device = "cpu", seed: int = 0
) -> TrainingProblem | FoldedProblem:
    """Return a launch's random tensors, NHWC, with activations and gradients surrounded by NaN.

    Args:
        launch: a launch of a training step.
        device: where the tensors are.
        seed: the same seed gives the same tensors.
    """
    if launch.folded:
        return folded_problem(launch, device, seed)
    generator = torch.Generator(device).manual_seed(seed)
    c = launch.last
    dtype = getattr(torch, c.dtype)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    def normed(y: Tensor, batch: bool) -> tuple[Tensor, Tensor | None]:
        channels = y.shape[1]
        norm = Norm(1 + 0.2 * random(channels), 0.5 * random(channels), None, None, batch, 0.1, 1e-5)
        if not batch:
            out = batch_norm.outputs(channels, dtype, y.device)
            batch_norm.constant(norm, None, None, out)
            return out
        partials, rows = cudnn_passes.statistics(y)
        return batch_norm.finalized(partials, rows, y.numel() // channels, norm, dtype)

    weight = random(c.co, c.ci // c.groups, c.r, c.s) / c.gemm_k**0.5
    weight = weight.contiguous(memory_format=torch.channels_last)
    x = guarded((random(c.n, c.ci, c.h, c.w) + 0.5 * _over(random(c.ci))).to(dtype))
    act = Act(x, *normed(x, True)) if launch.prologue else Act(x)
    y = guarded((random(c.n, c.co, c.ho, c.wo) + 0.5 * _over(random(c.co))).to(dtype))
    g = guarded((random(*y.shape) + 0.3 * y.float()).to(dtype))
    vectors, _ = normed(y, c.batch_stats)
    away = y.float() - _over(vectors[MEAN])
    sums = torch.stack([g.float().sum((0, 2, 3)), (g.float() * away).sum((0, 2, 3))])[:, None]
    grad = norm_gradient.gradient_of(g, y, c.batch_stats)
    norm_gradient.coefficients(grad, sums, vectors)
    return TrainingProblem(launch, weight, act, grad)
