"""Read the children of a fused module, as they are at the moment of a call, into call records."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import BatchNorm2d, Identity, SyncBatchNorm
from torchvision.ops.misc import FrozenBatchNorm2d

from .. import parameter_cache
from ..calls import Conv, Norm
from ..spec import Pair


def child(m: nn.Module, name: str) -> Any:
    """Return the instance's attribute ``name``, None if it has none. A plain attribute hides a child of that name."""
    fields = m.__dict__
    return fields[name] if name in fields else fields["_modules"].get(name)


def geometry(fields: dict[str, Any]) -> tuple[Pair, Pair, Pair] | None:
    """Return the stride, padding and dilation of a convolution with these attributes as pairs.

    None if one of them is not one or two ints.
    """
    stride, padding, dilation = fields["stride"], fields["padding"], fields["dilation"]
    if type(stride) is type(padding) is type(dilation) is tuple and len(stride) == len(padding) == len(dilation) == 2:
        return stride, padding, dilation
    pairs: Any = _pair(stride), _pair(padding), _pair(dilation)
    return None if None in pairs else pairs


def _pair(value: Any) -> Pair | None:
    """Return ``value`` as two ints. Libraries that dilate nets assign ints and lists."""
    if isinstance(value, int):
        return value, value
    if not isinstance(value, (tuple, list)) or len(value) not in (1, 2):
        return None
    return value[0], value[-1]


def conv_record(conv: Any) -> Conv:
    """Return the parameters of a convolution that has no :func:`~resnet_fast.blocks.obstacles.conv_obstacle`."""
    fields = conv.__dict__  # nn.Module.__getattr__ is slow
    parameters = fields["_parameters"]
    pairs = geometry(fields)
    assert pairs is not None
    return Conv(parameters["weight"], parameters["bias"], *pairs, fields["groups"])


def norm_record(norm: Any) -> Norm:
    """Return what the norm's own forward would pass to ``batch_norm``.

    In training this counts the batch, as ``nn.BatchNorm2d.forward`` does (source: torch/nn/modules/batchnorm.py).
    """
    kind = type(norm)
    if kind is Identity:
        return Norm()
    fields = norm.__dict__
    parameters, buffers = fields["_parameters"], fields["_buffers"]
    if kind is FrozenBatchNorm2d:
        return Norm(buffers["weight"], buffers["bias"], buffers["running_mean"], buffers["running_var"], eps=norm.eps)
    weight, bias = parameters["weight"], parameters["bias"]
    mean, var = buffers["running_mean"], buffers["running_var"]
    if not fields["training"]:
        if mean is not None and mean.device.type != "cpu" and not torch.compiler.is_compiling():
            parameter_cache.follow(mean, buffers["num_batches_tracked"])
        return Norm(weight, bias, mean, var, mean is None and var is None, norm.momentum or 0.0, norm.eps)
    momentum = norm.momentum
    if norm.track_running_stats:
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
            if momentum is None:  # cumulative average
                momentum = 1.0 / float(norm.num_batches_tracked)
    else:
        mean = var = None
    return Norm(weight, bias, mean, var, True, momentum or 0.0, norm.eps, sync_group(norm))


def counts(norm: Any) -> bool:
    """Return whether a call of this norm counts a batch, so that its record may be made only once per call."""
    return (type(norm) is BatchNorm2d or type(norm) is SyncBatchNorm) and norm.__dict__["training"]


def sync_group(norm: Any) -> str:
    """Return the process group that shares this norm's statistics, as SyncBatchNorm decides it; empty if none."""
    if type(norm) is not SyncBatchNorm or not norm.training:
        return ""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return ""
    group = norm.process_group or torch.distributed.group.WORLD
    return group.group_name if torch.distributed.get_world_size(group) > 1 else ""
