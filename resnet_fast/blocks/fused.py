"""What all fused modules share: when a module may run as one op, and how its children become the op's arguments."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torchvision.ops.misc import FrozenBatchNorm2d

from .. import derived
from ..calls import Conv, Norm
from ..dispatch import record, select

NORMS = "BatchNorm2d, SyncBatchNorm, FrozenBatchNorm2d or Identity"


class Fused(nn.Module):
    """Mixin in front of a stock class. ``stock_class`` is what ``restore`` puts back, ``op`` the name in the counters.

    ``layers``: the (convolution, norm) children in order of execution; ``acts``: the ReLU children; ``absent``:
    children that must do nothing (timm's drop_block, anti-aliasing, attention, drop_path).
    """

    stock_class: ClassVar[type[nn.Module]]
    op: ClassVar[str]
    layers: ClassVar[tuple[tuple[str, str], ...]]
    acts: ClassVar[tuple[str, ...]] = ("relu",)
    absent: ClassVar[tuple[str, ...]] = ()
    part: ClassVar[str] = (
        ""  # the child that stands for the op's layers in reports, where the op is not the whole module
    )
    # TorchScript evaluates a property that is listed as a constant once, and compiles one branch of an ``if`` on it.
    __constants__: ClassVar[list[str]] = ["scripts_fused"]
    __jit_unused_properties__: ClassVar[list[str]] = ["backend", "save", "scripts_fused"]

    def runs_stock(self, x: Tensor) -> bool:
        """Must this call run the stock layers? If so, the reason is counted (and raised in strict mode).

        A tracer or transform that cannot read our ops is no fallback: it is shown the layers it asks for.
        """
        reason = untraceable(x)
        if reason:
            return True
        reason = self.unfusable() or self.unsynchronized(x) or self.unkept()
        if reason:
            record.stock(self, self.op, reason)
        return bool(reason)

    def unkept(self) -> str:
        """Why nothing that inference derives from the weights can be kept; empty if it can.

        FSDP2 frees a unit's weights after a call and gathers others at the same address, with the same version counter.
        """
        if not hasattr(type(self), "set_requires_gradient_sync"):
            return ""
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters()):
            return ""
        return "expected weights that stay where they are, got FSDP2's; in inference it runs unfused"

    def unsynchronized(self, x: Tensor) -> str:
        """Why the statistics of this block's SyncBatchNorm layers cannot be gathered by the op; empty if they can."""
        groups = {sync_group(self._modules[norm]) for _, norm in self.layers} - {""}
        if not groups:
            return ""
        if len(groups) > 1:
            return "expected the block's SyncBatchNorm layers to share a process group, got several; it runs unfused"
        if not select.trains(x.device.type, x.dtype, self.backend):
            got = f"SyncBatchNorm in training on {x.device.type} {x.dtype}, which no available training kernels serve"
            return f"expected BatchNorm2d, or Triton's training kernels, got {got}; it runs unfused"
        return ""

    def unfusable(self) -> str:
        """The part of :meth:`obstacle` that depends on the module alone."""
        children = self._modules
        for conv, norm in self.layers:
            reason = conv_obstacle(conv, children[conv]) or norm_obstacle(norm, children[norm])
            if reason:
                return reason
        for name in self.acts:
            act = children[name]
            if type(act) is not nn.ReLU or is_altered(act):
                return _no(f"{name} to be a plain ReLU", act)
        for name in self.absent:
            child = children.get(name)
            if child is not None and type(child) is not nn.Identity:
                return _no(f"{name} to be absent", child)
        return ""

    @property
    def scripts_fused(self) -> bool:
        """May TorchScript compile the op call of this module, whose norms it takes for plain ones with statistics?"""
        norms: list[Any] = [self._modules[norm] for _, norm in self.layers]
        return not self.unfusable() and all(type(n) is not nn.Identity and n.running_mean is not None for n in norms)

    def parts(self, x: Tensor) -> tuple[Any, ...] | None:
        """This module as parts of a :class:`~resnet_fast.calls.NetCall`; None if it cannot be."""
        raise NotImplementedError

    @property
    def backend(self) -> str:
        """The backend that ``accelerate(model, backend=...)`` asked for."""
        return self.__dict__.get("_resnet_fast_backend", "auto")

    @property
    def save(self) -> str:
        """What training keeps for the backward pass, as ``accelerate(model, save=...)`` asked for."""
        return self.__dict__.get("_resnet_fast_save", "raw")


def renamed(function: Callable[..., Any], name: str) -> Any:
    """A stock method under another name, since TorchScript compiles a method of its class under the name it bears."""
    return types.FunctionType(
        function.__code__, function.__globals__, name, function.__defaults__, function.__closure__
    )


def untraceable(x: Any) -> str:
    """Why a call with this input must see the stock layers: what traces or transforms it cannot read our ops."""
    if isinstance(x, torch.fx.Proxy):
        return "symbolic tracing by torch.fx takes the stock layers, whose node names are torchvision's"
    if torch.jit.is_tracing() or torch.onnx.is_in_onnx_export():
        return "torch.jit.trace and ONNX export take the stock layers, which other runtimes know"
    if torch.compiler.is_compiling():
        return ""
    if torch._C._functorch.maybe_current_level() is not None:
        return "torch.func transforms take the stock layers, which have their rules"
    if _has_any_global_hook():
        return "a global module hook wants to see every inner layer"
    return ""


def is_altered(m: nn.Module) -> bool:
    """Has somebody attached to this layer what a fused call would pass by: a hook, or a forward of its own?"""
    d = m.__dict__
    return bool(
        d["_forward_hooks"]
        or d["_forward_pre_hooks"]
        or d["_backward_hooks"]
        or d["_backward_pre_hooks"]
        or "forward" in d
    )


def _no(expected: str, got: nn.Module | None) -> str:
    altered = got is not None and is_altered(got)
    what = type(got).__name__ + (" with a hook or a replaced forward" if altered else "")
    return f"expected {expected}, got {what}; it runs unfused"


def conv_obstacle(name: str, conv: Any) -> str:
    """Why this convolution cannot be part of a fused call; empty if it can."""
    if type(conv) is not nn.Conv2d or is_altered(conv):
        return _no(f"{name} to be a plain Conv2d", conv)
    if conv.padding_mode != "zeros" or type(conv.padding) is str:
        got = f"{conv.padding_mode} {conv.padding}"
        return f"expected {name} with zero padding given in pixels, got {got}; it runs unfused"
    weight = conv._parameters.get("weight")
    if type(weight) is not nn.Parameter and not torch.compiler.is_compiling():  # export swaps in fake tensors
        return f"expected {name}'s weight to be a plain parameter, got {type(weight).__name__}; it runs unfused"
    return ""


def norm_obstacle(name: str, norm: Any) -> str:
    """Why this norm cannot be part of a fused call; empty if it can."""
    kind = type(norm)
    fits = kind is nn.BatchNorm2d or kind is FrozenBatchNorm2d or kind is nn.Identity or kind is nn.SyncBatchNorm
    if not fits or is_altered(norm):
        return _no(f"{name} to be {NORMS}", norm)
    return ""


def sync_group(norm: Any) -> str:
    """The process group that this norm shares its statistics with, as SyncBatchNorm decides it; empty if none."""
    if type(norm) is not nn.SyncBatchNorm or not norm.training:
        return ""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return ""
    group = norm.process_group or torch.distributed.group.WORLD
    return group.group_name if torch.distributed.get_world_size(group) > 1 else ""


def conv_record(conv: Any) -> Conv:
    """The convolution's parameters as they are now. From the dictionaries: ``nn.Module.__getattr__`` is slow."""
    d = conv.__dict__
    parameters = d["_parameters"]
    stride, padding, dilation = d["stride"], d["padding"], d["dilation"]
    if not type(stride) is type(padding) is type(dilation) is tuple:  # libraries that dilate nets assign ints and lists
        stride, padding, dilation = _pair(stride), _pair(padding), _pair(dilation)
    return Conv(parameters["weight"], parameters["bias"], stride, padding, dilation, d["groups"])


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def norm_record(norm: Any) -> Norm:
    """What the norm's own forward would hand to ``batch_norm``.

    In training this counts the batch, as ``nn.BatchNorm2d.forward`` does (source: torch/nn/modules/batchnorm.py).
    """
    kind = type(norm)
    if kind is nn.Identity:
        return Norm()
    fields = norm.__dict__
    parameters, buffers = fields["_parameters"], fields["_buffers"]
    if kind is FrozenBatchNorm2d:
        return Norm(buffers["weight"], buffers["bias"], buffers["running_mean"], buffers["running_var"], eps=norm.eps)
    weight, bias = parameters["weight"], parameters["bias"]
    mean, var = buffers["running_mean"], buffers["running_var"]
    if not fields["training"]:
        if mean is not None and mean.device.type != "cpu" and not torch.compiler.is_compiling():
            derived.follow(mean, buffers["num_batches_tracked"])
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
