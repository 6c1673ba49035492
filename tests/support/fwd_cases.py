"""Forward convolutions of a training step on random tensors: kernel, truth in fp64, and what stock autocast computes.

The truth starts from what is given to all three: the raw input as stored, the fp32 parameters, the vectors of the norm.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fast import numerics
from resnet_fast.backends.triton.problem import guarded
from resnet_fast.backends.triton.training import vectors as v
from resnet_fast.backends.triton.training.conv_fwd import conv_fwd
from resnet_fast.backends.triton.training.pack import pack_forward
from resnet_fast.backends.triton.training.vectors import Act
from resnet_fast.spec import ConvSpec, LaunchSpec
from resnet_fast.tuning.configs import Config
from tests.support.launch_cases import conv

VARIANTS = [
    (dtype, prologue)
    for dtype in ("float16", "bfloat16", "float32")
    for prologue in ("none", "exact", "packed")
    if (dtype, prologue) != ("float32", "packed")
]

GUARD = 64


def rectangle(ci: int, co: int, r: int, s: int, **changes: Any) -> ConvSpec:
    return replace(conv(ci, co, 1), r=r, s=s, **changes)


def guard(t: Tensor) -> Tensor:
    """Return the values of ``t``, dense, surrounded by NaN."""
    field = torch.full((t.numel() + 2 * GUARD,), float("nan"), dtype=t.dtype)
    return field[GUARD : GUARD + t.numel()].view(t.shape).copy_(t)


def norm(y: Tensor, generator: torch.Generator) -> Act:
    """A BatchNorm of ``y`` (N, C, H, W) on its own statistics, as vectors and, in 16 bit, as a clamp.

    gamma of both signs; exactly 0 in the first two channels, before a positive shift and before a negative one.
    """
    c, dtype = y.shape[1], y.dtype
    flat = y.double().transpose(0, 1).flatten(1)
    mean, invstd = flat.mean(1), (flat.var(1, unbiased=False) + 1e-5).rsqrt()
    gamma = torch.empty(c, dtype=torch.float64).uniform_(0.5, 1.5, generator=generator)
    gamma *= torch.where(torch.rand(c, generator=generator) < 0.3, -1.0, 1.0)
    beta = torch.randn(c, generator=generator, dtype=torch.float64)
    gamma[:2] = 0
    beta[:2] = torch.tensor([0.7, -0.7])[:c]
    rows = torch.zeros(10, c, dtype=torch.float64)
    rows[v.MEAN], rows[v.INVSTD] = mean, invstd
    rows[v.SCALE] = gamma * invstd
    rows[v.SHIFT] = beta - mean * rows[v.SCALE]
    rows = rows.float()
    return with_clamp(y, rows) if dtype != torch.float32 else Act(y, guard(rows))


def with_clamp(y: Tensor, rows: Tensor) -> Act:
    """Add FOLD, THR and the clamp from SCALE and SHIFT, as vectors.py defines them."""
    scale, shift = rows[v.SCALE].double(), rows[v.SHIFT].double()
    constant = shift.abs() > 65504 * scale.abs()
    threshold = torch.where(constant, 0.0, -shift / torch.where(constant, 1.0, scale)).to(y.dtype)
    one = torch.where(constant & (shift > 0), 1.0, 0.0)
    inf = torch.full_like(one, float("inf"))
    wide = threshold.double()
    lo = torch.where(constant, one, torch.where(scale > 0, wide, -inf))
    hi = torch.where(constant, one, torch.where(scale > 0, inf, wide))
    rows[v.FOLD] = torch.where(constant, shift.clamp(min=0), scale).float()
    rows[v.THR] = threshold.float()
    return Act(y, guard(rows), guard(torch.stack([lo, hi, wide]).to(y.dtype)))


@dataclass
class Case:
    """A launch, its raw input with the norm before it, master weights and the centre of the output."""

    conv: ConvSpec
    prologue: str
    x: Act
    weight: Tensor
    centre: Tensor | None

    @property
    def packed(self) -> bool:
        return self.prologue == "packed"

    @property
    def launch(self) -> LaunchSpec:
        return LaunchSpec("conv_fwd", (self.conv,), prologue=self.prologue != "none")

    def packs(self) -> tuple[Tensor, Tensor | None]:
        """Return weight and constant, surrounded by NaN."""
        act = self.x if self.packed else None
        w, const = pack_forward(self.weight, self.x.y.dtype, self.conv, act)
        return guard(w), None if const is None else guard(const)

    def run(self, config: Config, statistics: bool = True) -> tuple[Tensor, Tensor | None]:
        w, const = self.packs()
        x = self.x if self.prologue != "none" else Act(self.x.y)
        return conv_fwd(self.launch, replace(config, packed=self.packed), w, const, x, self.centre, statistics)

    def _activation(self, y: Tensor) -> Tensor:
        if self.prologue == "none":
            return y
        assert self.x.vectors is not None
        scale, shift = (self.x.vectors[i].to(y.dtype)[None, :, None, None] for i in (v.SCALE, v.SHIFT))
        return torch.relu(y * scale + shift)

    def _minus_centre(self, y: Tensor) -> Tensor:
        if self.centre is None:
            return y
        return y - torch.where(self.centre.abs() <= 65504, self.centre, 0.0).double()[None, :, None, None]

    def truth(self) -> Tensor:
        z = self._activation(self.x.y.double())
        return self._minus_centre(F.conv2d(z, self.weight.double(), None, *self.conv.geometry()))

    def eager(self) -> Tensor:
        """Stock PyTorch under autocast: the activation, the weight and the output are rounded."""
        dtype = self.x.y.dtype
        z = self._activation(self.x.y.float()).to(dtype)
        y = F.conv2d(z, self.weight.to(dtype), None, *self.conv.geometry())
        return self._minus_centre(y.double()).to(dtype)

    def check(self, config: Config) -> numerics.ErrorReport:
        """Assert that the output is within the budget and the statistics are those of the output as stored."""
        y, partials = self.run(config)
        assert y.dtype == self.x.y.dtype and y.is_contiguous(memory_format=torch.channels_last)
        assert partials is not None
        assert_moments(y, partials, config.block_m)
        return numerics.assert_close(y, self.truth(), self.eager(), self.conv.gemm_k)


def case(conv: ConvSpec, prologue: str, seed: int = 0, mean: float = 0.5, centre: bool = True, images: int = 1) -> Case:
    """Random tensors. ``mean``: size of a channel's mean in standard deviations. ``images``: every n-th of a batch."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    y = random(images * conv.n, conv.ci, conv.h, conv.w) + mean * random(conv.ci)[None, :, None, None]
    y = guarded(y.to(getattr(torch, conv.dtype)))[::images]
    weight = random(conv.co, conv.ci // conv.groups, conv.r, conv.s) / conv.gemm_k**0.5
    middle = guard(random(conv.co) * 0.5) if centre else None
    return Case(conv, prologue, norm(y, generator) if prologue != "none" else Act(y), weight, middle)


def moments(partials: Tensor, rows: int, block_m: int) -> tuple[Tensor, Tensor]:
    """Merge (2, tiles, C) in fp64 into mean and population variance per channel (Chan, Golub and LeVeque 1979)."""
    mean, m2 = partials.double()
    counts = torch.tensor([min(block_m, rows - t * block_m) for t in range(mean.shape[0])]).double()[:, None]
    total = (counts * mean).sum(0) / rows
    return total, (m2.sum(0) + (counts * (mean - total) ** 2).sum(0)) / rows


def assert_moments(y: Tensor, partials: Tensor, block_m: int, tolerance: float = 1e-4) -> float:
    """Assert that variances match the values of ``y`` as stored within ``tolerance``; return the largest error."""
    flat = y.double().transpose(0, 1).flatten(1)
    assert partials.shape == (2, -(-flat.shape[1] // block_m), flat.shape[0]) and partials.dtype == torch.float32
    mean, var = moments(partials, flat.shape[1], block_m)
    size = flat.abs().amax(1)
    torch.testing.assert_close(mean, flat.mean(1), rtol=0, atol=1e-6 * size.max().item())
    true = flat.var(1, unbiased=False)
    error = ((var - true).abs() / (true + 1e-9 * size**2 + 1e-30)).max().item()
    assert error <= tolerance, error
    return error
