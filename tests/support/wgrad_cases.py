"""Weight gradients of convolutions on random tensors: kernel, truth in fp64, and what stock autocast computes.

The truth starts from what is given to all three: g, y and the raw input as stored, the vectors of the norm before the
convolution, and the statistics of y in fp64. The gradient's side is that of dgrad_cases.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from resnet_fast import numerics
from resnet_fast.backends.triton.problem import guarded
from resnet_fast.backends.triton.training import vectors as v
from resnet_fast.backends.triton.training.conv_wgrad import conv_wgrad
from resnet_fast.backends.triton.training.vectors import Act
from resnet_fast.backends.triton.training.wgrad_sum import reduce_splits
from resnet_fast.spec import ConvSpec, LaunchSpec
from resnet_fast.tuning.configs import Config
from tests.support import dgrad_cases
from tests.support.dgrad_cases import over
from tests.support.fwd_cases import norm

SMS = 4
"""Multiprocessors that the launcher fills: few, so that a small launch is split as a large one is."""


@dataclass
class Case:
    """A launch: the gradient of its raw output, its input, ``raw`` or activated, and the layout and dtype of dW."""

    output_grad: dgrad_cases.Case
    x: Act
    raw: bool
    layout: str = "nhwc"
    parameter: torch.dtype = torch.float32

    @property
    def conv(self) -> ConvSpec:
        return self.output_grad.conv

    @property
    def dtype(self) -> torch.dtype:
        return self.x.y.dtype

    def run(self, config: Config, sms: int = SMS) -> Tensor:
        launch = LaunchSpec("conv_wgrad", (self.conv,), prologue=self.raw)
        config = replace(config, packed=self.output_grad.packed)
        dw, reduction = conv_wgrad(launch, config, self.output_grad.grad(), self.x, sms, self.weight())
        reduce_splits(reduction)
        return dw

    def weight(self) -> Tensor:
        """Return a parameter like which dW is written."""
        c = self.conv
        laid = torch.channels_last if self.layout == "nhwc" else torch.contiguous_format
        return torch.empty(c.co, c.ci // c.groups, c.r, c.s, dtype=self.parameter).contiguous(memory_format=laid)

    def _activation(self, y: Tensor) -> Tensor:
        if not self.raw:
            return y
        assert self.x.vectors is not None
        return torch.relu(y * over(self.x.vectors[v.SCALE].to(y.dtype)) + over(self.x.vectors[v.SHIFT].to(y.dtype)))

    def _weight_gradient(self, dy: Tensor, act: Tensor) -> Tensor:
        c = self.conv
        stride, padding, dilation, groups = c.geometry()
        empty = torch.empty(c.co, c.ci // c.groups, c.r, c.s, dtype=dy.dtype)
        return torch.ops.aten.convolution_backward(
            dy, act, empty, None, stride, padding, dilation, False, [0, 0], groups, [False, True, False]
        )[1]

    def truth(self) -> Tensor:
        return self._weight_gradient(self.output_grad.dy(), self._activation(self.x.y.double()))

    def eager(self) -> Tensor:
        """Stock PyTorch under autocast: dy, the activation and dW are rounded."""
        a, b, c = self.output_grad.coefficients().float()
        dy = over(a) * self.output_grad.g.float() + over(b) * self.output_grad.y.float() + over(c)
        act = self._activation(self.x.y.float())
        return self._weight_gradient(dy.to(self.dtype), act.to(self.dtype))

    def check(self, config: Config, sms: int = SMS) -> numerics.ErrorReport:
        """Assert that dW is within the budget, with the dtype and strides of the parameter."""
        dw, weight = self.run(config, sms), self.weight()
        c = self.conv
        assert dw.dtype == weight.dtype and dw.shape == weight.shape and dw.stride() == weight.stride()
        return numerics.assert_close(dw.to(self.dtype), self.truth(), self.eager(), c.gemm_m)


def case(
    conv: ConvSpec, prologue: str, raw: bool = True, seed: int = 0, mean: float = 0.5, images: int = 1, gap: int = 0
) -> Case:
    """Return random tensors as in dgrad_cases.py. ``images``: x is every n-th of a batch; ``gap``: elements before x in
    its memory."""
    generator = torch.Generator().manual_seed(seed + 1)
    y = torch.randn(images * conv.n, conv.ci, conv.h, conv.w, generator=generator)
    y = guarded((y + mean * over(torch.randn(conv.ci, generator=generator))).to(getattr(torch, conv.dtype)))[::images]
    if gap:
        field = torch.empty(y.numel() + gap, dtype=y.dtype)
        y = field[gap:].view(conv.n, conv.h, conv.w, conv.ci).permute(0, 3, 1, 2).copy_(y)
    x = norm(y, generator) if raw else Act(y)
    return Case(dgrad_cases.case(conv, prologue, "plain", seed, mean), x, raw)
