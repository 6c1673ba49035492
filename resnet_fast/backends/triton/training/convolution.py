"""Run one convolution of a training step in each direction: on our kernel, or on cuDNN between our passes.

    forward   act -> raw output, statistics        ours: conv_fwd             cuDNN: activation, convolution, statistics
    dgrad     g -> g of the raw input, its sums    ours: conv_dgrad           cuDNN: dy, convolution, mask and sums
    wgrad     g, act -> dW                         ours: conv_wgrad           cuDNN: dy, activation, convolution

Ours read a packed weight. In a step other launches pack it, pack.py; alone, as the tuner runs a convolution, it is
packed here.

The tuner compares the two; chain.py composes them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ....spec import ConvSpec
from ....tuning.configs import Config
from ....tuning.training_configs import CUDNN, training_launch
from ..device import device_of
from ..launch import nhwc
from . import block_end, conv_dgrad, conv_fwd, conv_wgrad, cudnn_passes, pack, wgrad_sum
from .pack import Passenger
from .vectors import A, Act, Grad


def materialised(act: Act) -> Tensor:
    """Return the activation as a tensor, for cuDNN."""
    return act.y if act.vectors is None else block_end.block_end(act.y, act.vectors, None, None, True)


Packed = tuple[Tensor, Tensor | None]
"""The weight and the constant of :func:`pack.pack_forward`."""


def packing(
    weight: Tensor, spec: ConvSpec, config: Config, dtype: torch.dtype, act: Act
) -> tuple[Packed | None, Passenger]:
    """Return (what :func:`forward` takes as ``packed``, the programs that write it); nothing for cuDNN.

    ``act``: the input, whose vectors and clamp need not be written yet.
    """
    if config == CUDNN:
        return None, pack.NO_FORWARD
    rows = act.vectors if config.packed and act.clamp is not None else None
    w, const, passenger = pack.forward_passenger(weight, dtype, spec, rows)
    return (w, const), passenger


def forward(
    weight: Tensor,
    spec: ConvSpec,
    config: Config,
    act: Act,
    centre: Tensor | None,
    statistics: bool,
    bias: Tensor | None = None,
    packed: Packed | None = None,
) -> tuple[Tensor, Tensor | None, int]:
    """Return (raw output, statistics by tile or None, rows of a tile). With cuDNN ``centre`` must be None.

    Arguments as of :func:`conv_fwd.conv_fwd`. ``packed``: the weight and the constant of :func:`packing`; None to pack
    it here.
    """
    if config == CUDNN:
        x = materialised(act)
        y = nhwc(F.conv2d(x, weight.detach().to(x.dtype), None, *spec.geometry()))
        return y, *(cudnn_passes.statistics(y) if statistics else (None, 0))
    launch = training_launch("conv_fwd", spec, act.vectors is not None)
    w, const = packed or pack.pack_forward(weight, act.y.dtype, spec, act if config.packed else None)
    return *conv_fwd.conv_fwd(launch, config, w, const, act, centre, statistics, bias), config.block_m


def dgrad(
    weight: Tensor,
    spec: ConvSpec,
    config: Config,
    grad: Grad,
    below: Act | None = None,
    below_packed: bool = False,
    add: Tensor | None = None,
    add_strided: tuple[Tensor, tuple[int, int]] | None = None,
    compact: bool = False,
    wt: Tensor | None = None,
    reduction: Passenger = wgrad_sum.NO_REDUCTION,
) -> tuple[Tensor, Tensor | None]:
    """Return dx by our kernel and, with ``below``, its sums; arguments as of :func:`conv_dgrad.conv_dgrad`.

    ``wt``: the packed weight; None to pack it here.
    """
    if wt is None:
        assert grad.coefficients is not None  # a norm that is folded into the weight comes with ``wt``
        wt = pack.pack_dgrad(weight, grad.g.dtype, spec, grad.coefficients[A] if config.packed else None)
    launch = training_launch("conv_dgrad", spec, below is not None)
    return conv_dgrad.conv_dgrad(launch, config, wt, grad, below, below_packed, add, add_strided, compact, reduction)


def dgrad_to(
    weight: Tensor,
    spec: ConvSpec,
    config: Config,
    grad: Grad,
    below: Act,
    below_packed: bool,
    wt: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (gradient of the output of the norm ``below``, its sums), after the mask of the ReLU in between."""
    if config == CUDNN:
        act = materialised(below)
        assert below.vectors is not None
        dx = nhwc(stock_backward(weight, spec, grad, act, (True, False))[0])
        g, sums, _ = block_end.block_end_backward(dx, act, below.y, below.vectors, None, None)
        return g, sums
    g, found = dgrad(weight, spec, config, grad, below, below_packed, wt=wt)
    assert found is not None
    return g, found


def wgrad(
    weight: Tensor,
    spec: ConvSpec,
    config: Config,
    grad: Grad,
    x: Act,
    passenger: Passenger = conv_wgrad.NO_PASSENGER,
) -> tuple[Tensor, Passenger]:
    """Return dW in the dtype and strides of ``weight``, and the programs that are left to write it.

    ``passenger``: what our kernel takes along; cuDNN takes nothing.
    """
    if config != CUDNN:
        launch, gpu = training_launch("conv_wgrad", spec, x.vectors is not None), device_of(grad.g.device).gpu
        assert gpu is not None
        return conv_wgrad.conv_wgrad(launch, config, grad, x, gpu.sms, weight, passenger)
    assert not passenger.programs
    dw = stock_backward(weight, spec, grad, materialised(x), (False, True))[1]
    # autograd accumulates into a tensor of the weight's strides
    if dw.dtype == weight.dtype and all(t.is_contiguous(memory_format=torch.channels_last) for t in (dw, weight)):
        return dw.as_strided(weight.shape, weight.stride()), wgrad_sum.NO_REDUCTION
    return torch.empty_like(weight).copy_(dw), wgrad_sum.NO_REDUCTION


def stock_backward(weight: Tensor, spec: ConvSpec, grad: Grad, x: Tensor, mask: tuple[bool, bool]) -> tuple[Any, Any]:
    """Return (dx, dW) by cuDNN; ``mask`` says which of them to compute."""
    dy = cudnn_passes.apply_backward(grad)
    stride, padding, dilation, groups = spec.geometry()
    dx, dw, _ = torch.ops.aten.convolution_backward(
        dy, x, weight.detach().to(dy.dtype), None, stride, padding, dilation, False, [0, 0], groups, [*mask, False]
    )
    return dx, dw
