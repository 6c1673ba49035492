"""Read the children of a fused module, as they are at the moment of a call, into call records."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import BatchNorm2d, Identity, SyncBatchNorm

from .. import parameter_cache
from ..calls import Conv, Norm, record
from ..spec import Pair
from . import frozen_norms


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
    made: Conv = record(Conv, (parameters["weight"], parameters["bias"], *pairs, fields["groups"]))
    return made


def norm_record(norm: Any) -> Norm:
    """Return what the norm's own forward would pass to ``batch_norm``.

    In training this counts the batch, as ``nn.BatchNorm2d.forward`` does (source: torch/nn/modules/batchnorm.py).
    """
    kind = type(norm)
    if kind is Identity:
        return Norm()
    fields = norm.__dict__
    parameters, buffers = fields["_parameters"], fields["_buffers"]
    if kind is not BatchNorm2d and kind is not SyncBatchNorm:
        eps = frozen_norms.eps_of(norm)
        return Norm(buffers["weight"], buffers["bias"], buffers["running_mean"], buffers["running_var"], eps=eps)
    weight, bias = parameters["weight"], parameters["bias"]
    mean, var = buffers["running_mean"], buffers["running_var"]
    momentum, eps = fields["momentum"], fields["eps"]
    if not fields["training"]:
        if mean is not None and mean.device.type != "cpu" and not torch.compiler.is_compiling():
            parameter_cache.follow(mean, buffers["num_batches_tracked"])
        return Norm(weight, bias, mean, var, mean is None and var is None, momentum or 0.0, eps)
    if fields["track_running_stats"]:
        momentum = _count_batch(norm, momentum)
    else:
        mean = var = None
    group = sync_group(norm) if kind is SyncBatchNorm else ""
    made: Norm = record(Norm, (weight, bias, mean, var, True, momentum or 0.0, eps, group))
    return made


def _count_batch(norm: Any, momentum: float | None) -> float | None:
    """Count a batch of a norm in training, and return its momentum: of a cumulative average if it is None."""
    counter = norm.__dict__["_buffers"]["num_batches_tracked"]
    if counter is None or "num_batches_tracked" in norm.__dict__ or torch.compiler.is_compiling():
        counter = norm.num_batches_tracked  # a plain attribute hides the buffer; a compiler reads it as stock does
        if counter is None:
            return momentum
    elif momentum is not None and type(counter) is Tensor:
        _batches.count(counter)
        return momentum
    counter.add_(1)
    return 1.0 / float(counter) if momentum is None else momentum


class _Batches(threading.local):
    """Counters of batches that this thread has yet to increment, by identity; None outside :class:`counting_together`.

    One kernel increments all of them. A kernel for each would be 53 launches in a step of ResNet-50.
    """

    pending: dict[int, Tensor] | None = None

    def count(self, counter: Tensor) -> None:
        pending = self.pending
        if pending is None or id(counter) in pending:  # a norm that runs twice counts twice
            counter.add_(1)
        else:
            pending[id(counter)] = counter


_batches = _Batches()


class counting_together:
    """A context at whose end the batches of all norms that ran in it are counted, also if one of them failed.

    Nothing that a fused call runs reads a counter. A context inside another does nothing.
    """

    __slots__ = ("_counts",)

    def __enter__(self) -> None:
        # a compiler fuses the increments as it likes, and cannot trace what belongs to a thread
        self._counts = not torch.compiler.is_compiling() and _batches.pending is None
        if self._counts:
            _batches.pending = {}

    def __exit__(self, *error: object) -> None:
        if self._counts:
            pending, _batches.pending = _batches.pending, None
            if pending:
                torch._foreach_add_(list(pending.values()), 1)


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
