"""Input gradients of convolutions on random tensors: kernel, truth in fp64, and what stock autocast computes.

The truth starts from what is given to all three: g and y as stored, the fp32 weight, and the statistics of y in fp64.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from resnet_fast import numerics
from resnet_fast.backends.triton.problem import guarded
from resnet_fast.backends.triton.training import vectors as v
from resnet_fast.backends.triton.training.conv_dgrad import conv_dgrad
from resnet_fast.backends.triton.training.vectors import Act, Grad
from resnet_fast.spec import ConvSpec, LaunchSpec
from resnet_fast.tuning.configs import Config
from resnet_fast.tuning.routes import merged_groups
from tests.support.fwd_cases import guard, norm, rectangle
from tests.support.launch_cases import conv

EPS = 1e-5
EPILOGUES = ("plain", "below", "below exact", "add", "strided", "all")

GEOMETRIES = {
    "1x1": conv(33, 40, 1),
    "1x1_whole_blocks": conv(32, 64, 1, h=8, w=4),
    "1x1_stride2": conv(48, 40, 1, stride=2),
    "1x1_stride3_padded": conv(16, 24, 1, stride=3, padding=1),
    "1x1_padded": conv(16, 40, 1, padding=1),
    "3x3_whole_blocks": conv(32, 64, 3, h=4, w=4, n=1),
    "3x3_stride2": conv(24, 20, 3, stride=2),
    "3x3_stride2_even": conv(24, 20, 3, h=8, w=6, stride=2),
    "3x3_stride2_no_padding": conv(24, 20, 3, h=8, w=6, stride=2, padding=0),
    "3x3_dilation2": conv(16, 20, 3, dilation=2),
    "3x3_stride2_dilation2": conv(16, 24, 3, stride=2, dilation=2),
    "3x3_stride2_dilation3": conv(16, 24, 3, stride=2, dilation=3),
    "3x3_stride3_dilation2": conv(16, 24, 3, stride=3, dilation=2),
    "3x3_stride4_dilation6": conv(16, 24, 3, h=14, w=13, stride=4, dilation=6, n=1),
    "3x3_no_padding": conv(24, 20, 3, padding=0),
    "3x3_wide_padding": conv(24, 16, 3, padding=4, n=1),
    "5x5_dilation2": conv(16, 20, 5, dilation=2, n=1),
    "even_filter": conv(16, 17, 4, padding=1, n=1),
    "stride_beyond_filter": conv(16, 17, 2, stride=4, padding=1),
    "1x3_unequal": rectangle(18, 24, 1, 3, stride=(2, 1), padding=(0, 1)),
    "3x1_unequal": rectangle(18, 24, 3, 1, stride=(1, 3), padding=(2, 0), dilation=(2, 1)),
    "16_taps": rectangle(16, 16, 1, 16, padding=(0, 8), n=1, h=2),
    "17_taps_beyond_a_half_word": rectangle(16, 16, 17, 1, padding=(8, 0), n=1, w=2),
    "7x7_three_channels": conv(3, 24, 7, stride=2, n=1),
    "eight_output_channels": conv(24, 8, 3, n=1),
    "one_channel": conv(1, 1, 3),
    "groups": conv(32, 64, 3, groups=2, h=5, w=4, n=1),
    "groups_merged": conv(32, 32, 3, groups=8, stride=2),
    "groups_of_three": conv(8, 12, 3, groups=4, n=1),
    "depthwise": conv(40, 40, 3, groups=40, h=5, w=4, n=1),
    "one_pixel": conv(24, 20, 3, h=1, w=1, n=9),
    "one_pixel_stride3": conv(24, 20, 1, h=1, w=1, n=9, stride=3),
    "one_column": conv(24, 20, 3, h=6, w=1, n=3, stride=2),
}


def over(row: Tensor) -> Tensor:
    """Return a value per channel that broadcasts over images."""
    return row[None, :, None, None]


def packed_weight(weight: Tensor, conv: ConvSpec, dtype: torch.dtype, a: Tensor | None) -> Tensor:
    """Return what ``pack_dgrad`` makes, spelled out: (Ci, R, S, Co/merged groups), block-diagonal for merged groups."""
    scaled = weight.float() if a is None else weight.float() * a[:, None, None, None]
    ci, co, merged = conv.ci // conv.groups, conv.co // conv.groups, conv.co // merged_groups(conv)
    out = torch.zeros(conv.ci, conv.r, conv.s, merged)
    for group in range(conv.groups):
        rows, start = slice(group * ci, (group + 1) * ci), group * co % merged
        out[rows, ..., start : start + co] = scaled[group * co : (group + 1) * co].permute(1, 2, 3, 0)
    return out.to(dtype)


@dataclass
class Case:
    """A launch, the gradient of its raw output, and the layers before it; ``gamma`` of the following norm in fp64."""

    conv: ConvSpec
    prologue: str
    g: Tensor
    y: Tensor
    gamma: Tensor
    weight: Tensor
    below: Act | None = None
    below_packed: bool = False
    add: Tensor | None = None
    add_strided: tuple[Tensor, tuple[int, int]] | None = None

    @property
    def batch(self) -> bool:
        return self.prologue != "none"

    @property
    def packed(self) -> bool:
        """Without batch statistics only A is left, which the weight takes in 16 bit."""
        return self.prologue == "packed" or (self.prologue == "none" and self.g.dtype != torch.float32)

    def coefficients(self) -> Tensor:
        """Return A, B, C of vectors.py in fp64, from the statistics of y and the two means of g."""
        g, y = self.g.double(), self.y.double()
        mean, var = y.mean((0, 2, 3)), y.var((0, 2, 3), unbiased=False)
        invstd = (var + EPS).rsqrt()
        s1, s2 = g.mean((0, 2, 3)), (g * (y - over(mean)) * over(invstd)).mean((0, 2, 3))
        a = self.gamma * invstd
        if not self.batch:
            return torch.stack([a, torch.zeros_like(a), torch.zeros_like(a)])
        return torch.stack([a, -a * invstd * s2, a * (invstd * s2 * mean - s1)])

    def grad(self) -> Grad:
        """Return the gradient as the following norm passes it on, surrounded by NaN."""
        rows = self.coefficients()
        packed = None
        if self.packed:
            a = torch.where(rows[v.A] == 0, 1.0, rows[v.A])
            beta, gamma = rows[v.B] / a, rows[v.C] / a
            hi = beta.to(self.g.dtype)
            packed = guard(torch.stack([hi.double(), beta - hi.double(), gamma, -gamma]).to(self.g.dtype))
        y = self.y if self.batch else torch.full_like(self.y, float("nan"))  # must not be read
        return Grad(self.g, y, guard(rows.float()), packed, self.batch)

    def run(self, config: Config, compact: bool = False) -> tuple[Tensor, Tensor | None]:
        launch = LaunchSpec("conv_dgrad", (self.conv,), prologue=self.below is not None)
        grad = self.grad()
        wt = guard(packed_weight(self.weight, self.conv, self.g.dtype, grad.coefficients[v.A] if self.packed else None))
        config = replace(config, packed=self.packed)
        return conv_dgrad(launch, config, wt, grad, self.below, self.below_packed, self.add, self.add_strided, compact)

    def dy(self) -> Tensor:
        a, b, c = self.coefficients()
        return over(a) * self.g.double() + over(b) * self.y.double() + over(c)

    def passes(self) -> Tensor | None:
        """Return which elements the preceding ReLU passes, by the comparison of the forward pass."""
        if self.below is None:
            return None
        y = self.below.y
        if self.below_packed:
            assert self.below.clamp is not None
            lo, hi, threshold = (over(row) for row in self.below.clamp.float())
            return y.float().clamp(lo, hi) != threshold
        assert self.below.vectors is not None
        return ~(y.float() * over(self.below.vectors[v.SCALE]) + over(self.below.vectors[v.SHIFT]) <= 0)

    def _finished(self, dx: Tensor) -> Tensor:
        """Add the other gradients and apply the preceding ReLU, rounding each operation to the dtype of ``dx``."""
        if self.add is not None:
            dx = dx + self.add.to(dx.dtype)
        if self.add_strided is not None:
            added, (sh, sw) = self.add_strided
            dx = dx.clone()
            dx[:, :, ::sh, ::sw] += added.to(dx.dtype)
        passes = self.passes()
        return dx if passes is None else torch.where(passes, dx, 0.0)

    def _input_gradient(self, dy: Tensor, weight: Tensor) -> Tensor:
        c = self.conv
        stride, padding, dilation, groups = c.geometry()
        empty = torch.empty(c.n, c.ci, c.h, c.w, dtype=dy.dtype)
        return torch.ops.aten.convolution_backward(
            dy, empty, weight, None, stride, padding, dilation, False, [0, 0], groups, [True, False, False]
        )[0]

    def truth(self) -> Tensor:
        return self._finished(self._input_gradient(self.dy(), self.weight.double()))

    def eager(self) -> Tensor:
        """Stock PyTorch under autocast: dy, the weight and dx are rounded."""
        dtype = self.g.dtype
        a, b, c = self.coefficients().float()
        dy = (over(a) * self.g.float() + over(b) * self.y.float() + over(c)).to(dtype)
        return self._finished(self._input_gradient(dy, self.weight.to(dtype)))

    def check(self, config: Config) -> numerics.ErrorReport:
        """Assert that dx is within the budget and the sums are those of dx as stored."""
        dx, partials = self.run(config)
        assert dx.dtype == self.g.dtype and dx.is_contiguous(memory_format=torch.channels_last)
        assert (partials is None) == (self.below is None)
        if self.below is not None:
            assert partials is not None
            assert_sums(dx, partials, self.below)
        report = numerics.assert_close(dx, self.truth(), self.eager(), self.conv.co // self.conv.groups * 9)
        passes = self.passes()
        assert passes is None or not dx[~passes].any()
        return report


def assert_sums(dx: Tensor, partials: Tensor, below: Act) -> None:
    """Compare sums over tiles with sums over the pixels of ``dx``, relative to the size of the terms."""
    assert below.vectors is not None
    assert partials.dtype == torch.float32 and partials.shape[::2] == (2, dx.shape[1])
    wide, away = dx.double(), below.y.double() - over(below.vectors[v.MEAN].double())
    for found, terms in zip(partials.double().sum(1), (wide, wide * away), strict=True):
        wanted, size = terms.sum((0, 2, 3)), terms.abs().sum((0, 2, 3))
        assert ((found - wanted).abs() <= 1e-6 * size + 1e-30).all(), (found - wanted).abs().max()


def case(conv: ConvSpec, prologue: str, epilogue: str = "below", seed: int = 0, mean: float = 0.5) -> Case:
    """Random tensors. ``mean``: size of a channel's mean in standard deviations, in y and in the raw input below.

    The following norm's gamma has both signs and is 0 in the first channel; for the preceding norm see fwd_cases.py.
    """
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, conv.dtype)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def image(c: int, h: int, w: int, means: float = 0.0) -> Tensor:
        return guarded((random(conv.n, c, h, w) + means * over(random(c))).to(dtype))

    y = image(conv.co, conv.ho, conv.wo, mean)
    g = guarded((random(*y.shape) + 0.3 * y.float() + 0.2).to(dtype))  # both means are far from 0
    gamma = (0.5 + torch.rand(conv.co, generator=generator).double()) * torch.where(random(conv.co) < -0.5, -1.0, 1.0)
    gamma[0] = 0
    weight = random(conv.co, conv.ci // conv.groups, conv.r, conv.s) / (conv.co // conv.groups * conv.r * conv.s) ** 0.5
    found = Case(conv, prologue, g, y, gamma, weight)
    if epilogue.startswith("below") or epilogue == "all":
        found.below = norm(image(conv.ci, conv.h, conv.w, mean), generator)
        found.below_packed = dtype != torch.float32 and epilogue != "below exact"
    if epilogue in ("add", "all"):
        found.add = image(conv.ci, conv.h, conv.w)
    if epilogue in ("strided", "all"):
        found.add_strided = image(conv.ci, -(-conv.h // 2), -(-conv.w // 3)), (2, 3)
    return found
