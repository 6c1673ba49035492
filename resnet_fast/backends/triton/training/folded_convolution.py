r"""Run the backward pass of one convolution with a folded norm: on our kernels, or on cuDNN between passes.

    dgrad   g -> dx          ours: conv_dgrad, with mask and shortcut      cuDNN: weight, convolution, mask or sum
    wgrad   g, x -> P, Q     ours: conv_wgrad, with Q                      cuDNN: convolution, then channel_sums for Q

P is the gradient of the folded weight and Q the sum of g over the pixels, per split; fold_gradient.py makes the
gradients of the parameters from them. Where only a constant is trained (beta, or the convolution's bias), Q alone is
computed.

cuDNN takes the folded weight in the layout of the forward pass. PyTorch multiplies it out here, from the scale of the
forward pass. Its P has the dtype of g, as in stock PyTorch, and one split.

The tuner compares the two; frozen_chain.py composes them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ....calls import Conv
from ....spec import LaunchSpec
from ....tuning.configs import Config
from ....tuning.training_configs import CUDNN
from ..device import device_of
from ..launch import nhwc
from . import channel_sums, conv_dgrad, conv_wgrad
from .fold import SCALE
from .vectors import Act, Grad

Strided = tuple[Tensor, tuple[int, int]]
"""A gradient of the pixels that a stride reads, and the stride."""


class Sums(NamedTuple):
    """What the gradients of a convolution's parameters are made of.

    ``p`` (splits, Co, R*S*Ci/groups), fp32 or the dtype of g, of merged groups or of the convolution's own; None where
    only constants are trained. ``q`` (splits, Co) fp32, with a number of splits of its own; None where only the weight
    is trained.
    """

    p: Tensor | None
    q: Tensor | None


def dgrad(
    launch: LaunchSpec,
    config: Config,
    conv: Conv,
    vectors: Tensor,
    wt: Tensor | None,
    g: Tensor,
    x: Tensor,
    add: Tensor | None = None,
    strided: Strided | None = None,
    compact: bool = False,
) -> Tensor:
    """Return the gradient of a convolution's input, dense NHWC; of an activation, after the mask of its ReLU.

    Args:
        launch: a launch of kernel ``conv_dgrad``; with ``prologue``, ``x`` is the output of a ReLU.
        config: its tiles, or ``CUDNN``.
        conv: the convolution.
        vectors: (3, Co) of :func:`.fold.fold`.
        wt: its weight by :func:`.fold.begin_backward`; None with ``CUDNN``.
        g: the gradient of the folded convolution's output, dense NHWC.
        x: its input, each image dense NHWC.
        add, strided: what is added, not both, as of :func:`.conv_dgrad.conv_dgrad`.
        compact: whether only the pixels that a strided 1x1 reads are wanted; cuDNN returns all.
    """
    if config != CUDNN:
        assert wt is not None
        below = Act(x) if launch.prologue else None
        return conv_dgrad.conv_dgrad(launch, config, wt, Grad(g), below, False, add, strided, compact)[0]
    scale = vectors[SCALE][:, None, None, None]
    w = (conv.weight.detach() * scale).to(g.dtype, memory_format=torch.channels_last)
    dx = nhwc(_stock_backward(launch, g, x, w, (True, False))[0])
    if launch.prologue:
        dx = torch.ops.aten.threshold_backward(dx, x, 0)  # a NaN in x passes
    if strided is not None:
        part, (down, across) = strided
        dx[:, :, ::down, ::across] += part
    return dx if add is None else dx.add_(add)


def wgrad(launch: LaunchSpec, config: Config, weight: Tensor, g: Tensor, x: Tensor, products: bool, sums: bool) -> Sums:
    """Return the sums for the gradients of a convolution's parameters.

    Args:
        launch: a launch of kernel ``conv_wgrad``.
        config: its tiles, or ``CUDNN``.
        weight: the parameter (Co, Ci/groups, R, S).
        g: the gradient of the folded convolution's output, dense NHWC.
        x: its input, each image dense NHWC.
        products: whether ``p`` is wanted: for the weight or gamma.
        sums: whether ``q`` is wanted: for gamma, beta or the bias.
    """
    if not products:
        return Sums(None, channel_sums.channel_sums(g))
    if config == CUDNN:
        like = weight.new_empty(weight.shape, dtype=g.dtype)  # PyTorch looks at its shape
        dw = _stock_backward(launch, g, x, like, (False, True))[1]
        p = dw.permute(0, 2, 3, 1).reshape(1, len(dw), -1).contiguous()
        return Sums(p, channel_sums.channel_sums(g) if sums else None)
    gpu = device_of(g.device).gpu
    assert gpu is not None
    p, q, _ = conv_wgrad.products(launch, config, Grad(g), Act(x), gpu.sms, sums=sums)
    return Sums(p, q)


def _stock_backward(
    launch: LaunchSpec, g: Tensor, x: Tensor, weight: Tensor, mask: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    """Return (dx, dW) by cuDNN; ``mask`` says which of them to compute, the other is None."""
    stride, padding, dilation, groups = launch.last.geometry()
    dx, dw, _ = torch.ops.aten.convolution_backward(
        g, x, weight, None, stride, padding, dilation, False, [0, 0], groups, [*mask, False]
    )
    return dx, dw
