"""What all fused modules share: when a module may run as one op, and how its children become the op's arguments."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torchvision.ops.misc import FrozenBatchNorm2d

from ..dispatch import record

NORMS = "BatchNorm2d, FrozenBatchNorm2d, Identity or (in eval) SyncBatchNorm"


class Fused(nn.Module):
    """Mixin in front of a stock class. ``stock_class`` is what ``restore`` puts back, ``op`` the name in the counters.

    ``layers``: the (convolution, norm) children in order of execution; ``acts``: the ReLU children; ``absent``: children
    that must do nothing (timm's drop_block, anti-aliasing, attention, drop_path).
    """

    stock_class: ClassVar[type[nn.Module]]
    op: ClassVar[str]
    layers: ClassVar[tuple[tuple[str, str], ...]]
    acts: ClassVar[tuple[str, ...]] = ("relu",)
    absent: ClassVar[tuple[str, ...]] = ()

    def obstacle(self, x: Tensor) -> str:
        """Why this call must run the stock layers; empty if nothing stands in the way."""
        return untraceable(x) or self.unfusable()

    def unfusable(self) -> str:
        """The part of :meth:`obstacle` that depends on the module alone."""
        for conv, norm in self.layers:
            reason = conv_obstacle(conv, getattr(self, conv)) or norm_obstacle(norm, getattr(self, norm))
            if reason:
                return reason
        for name in self.acts:
            act = getattr(self, name)
            if type(act) is not nn.ReLU or is_altered(act):
                return _no(f"{name} to be a plain ReLU", act)
        for name in self.absent:
            child = getattr(self, name, None)
            if child is not None and type(child) is not nn.Identity:
                return _no(f"{name} to be absent", child)
        return ""

    def stock(self, reason: str) -> None:
        """Count one stock forward of this module."""
        record.stock(self, self.op, reason)

    @property
    def backend(self) -> str:
        """The backend that ``accelerate(model, backend=...)`` asked for."""
        return self.__dict__.get("_resnet_fast_backend", "auto")


def untraceable(x: Any) -> str:
    """Why a call with this input must see the stock layers: what traces or transforms it cannot read our ops."""
    if isinstance(x, torch.fx.Proxy):
        return "symbolic tracing by torch.fx takes the stock layers, whose node names are torchvision's"
    if torch.compiler.is_compiling():
        return ""
    if torch.jit.is_tracing() or torch.onnx.is_in_onnx_export():
        return "torch.jit.trace and ONNX export take the stock layers, which other runtimes know"
    if torch._C._functorch.maybe_current_level() is not None:
        return "torch.func transforms take the stock layers, which have their rules"
    if _has_any_global_hook():
        return "a global module hook wants to see every inner layer"
    return ""


def is_altered(m: nn.Module) -> bool:
    """Has somebody attached to this layer what a fused call would pass by: a hook, or a forward of its own?"""
    return bool(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks or "forward" in m.__dict__
    )


def _no(expected: str, got: nn.Module) -> str:
    what = type(got).__name__ + (" with a hook or a replaced forward" if is_altered(got) else "")
    return f"expected {expected}, got {what}; it runs unfused"


def conv_obstacle(name: str, conv: nn.Module) -> str:
    """Why this convolution cannot be part of a fused call; empty if it can."""
    if type(conv) is not nn.Conv2d or is_altered(conv):
        return _no(f"{name} to be a plain Conv2d", conv)
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return f"expected {name} with zero padding given in pixels, got {conv.padding_mode} {conv.padding}; it runs unfused"
    if type(conv.weight) is not nn.Parameter and type(conv.weight) is not Tensor:
        return f"expected {name}'s weight to be a plain tensor, got {type(conv.weight).__name__}; it runs unfused"
    return ""


def norm_obstacle(name: str, norm: nn.Module) -> str:
    """Why this norm cannot be part of a fused call; empty if it can."""
    kind = type(norm)
    fits = kind is nn.BatchNorm2d or kind is FrozenBatchNorm2d or kind is nn.Identity or kind is nn.SyncBatchNorm
    if not fits or is_altered(norm):
        return _no(f"{name} to be {NORMS}", norm)
    if kind is nn.SyncBatchNorm and norm.training:
        return f"expected {name} in eval mode, got SyncBatchNorm in training, whose collectives the op lacks; it runs unfused"
    return ""


class Arguments:
    """The op arguments of a chain of (convolution, norm) pairs, gathered afresh at each call."""

    __slots__ = ("batch_stats", "biases", "eps", "geometry", "momentum", "norms", "weights")

    def __init__(self) -> None:
        self.weights: list[Tensor] = []
        self.biases: list[Tensor | None] = []
        self.norms: list[Tensor | None] = []
        self.geometry: list[int] = []
        self.batch_stats: list[bool] = []
        self.momentum: list[float] = []
        self.eps: list[float] = []

    def add(self, conv: Any, norm: Any) -> None:
        self.weights.append(conv.weight)
        self.biases.append(conv.bias)
        self.geometry += (*conv.stride, *conv.padding, *conv.dilation, conv.groups)
        tensors, batch_stats, momentum, eps = norm_arguments(norm)
        self.norms += tensors
        self.batch_stats.append(batch_stats)
        self.momentum.append(momentum)
        self.eps.append(eps)

    def of_one(self) -> tuple[Any, ...]:
        """CONV_SCHEMA and NORM_SCHEMA of the first pair, in the ops' order."""
        g = self.geometry
        return (
            self.weights[0], self.biases[0], g[0:2], g[2:4], g[4:6], g[6],
            *self.norms[:4], self.batch_stats[0], self.momentum[0], self.eps[0],
        )  # fmt: skip

    def of_block(self) -> tuple[Any, ...]:
        """BLOCK_SCHEMA after ``x``, without the shortcut."""
        return self.weights, self.biases, self.norms, self.geometry, self.batch_stats, self.momentum, self.eps


def norm_arguments(norm: Any) -> tuple[tuple[Tensor | None, ...], bool, float, float]:
    """(weight, bias, mean, var), batch_stats, momentum, eps: what the norm's own forward hands to ``batch_norm``.

    In training this counts the batch, as ``nn.BatchNorm2d.forward`` does (source: torch/nn/modules/batchnorm.py).
    """
    kind = type(norm)
    if kind is nn.Identity:
        return (None, None, None, None), False, 0.0, 0.0
    if kind is FrozenBatchNorm2d:
        return (norm.weight, norm.bias, norm.running_mean, norm.running_var), False, 0.0, norm.eps
    mean, var, momentum = norm.running_mean, norm.running_var, norm.momentum
    batch_stats = norm.training or (mean is None and var is None)
    if norm.training and norm.track_running_stats and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if momentum is None:  # cumulative average
            momentum = 1.0 / float(norm.num_batches_tracked)
    if norm.training and not norm.track_running_stats:
        mean = var = None
    return (norm.weight, norm.bias, mean, var), batch_stats, 0.0 if momentum is None else momentum, norm.eps
