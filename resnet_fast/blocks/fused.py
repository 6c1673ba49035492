"""What all fused modules share: when a module may run as one op, and how its children become the op's arguments."""

from __future__ import annotations

import re
import types
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import BatchNorm2d, Conv2d, Identity, Parameter, ReLU, SyncBatchNorm
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import _has_any_global_hook
from torch.overrides import _get_current_function_mode_stack as _function_modes
from torch.utils._device import DeviceContext
from torchvision.ops.misc import FrozenBatchNorm2d

from .. import parameter_cache
from ..calls import Conv, Norm
from ..dispatch import record, select
from . import pristine

NORMS = "BatchNorm2d, SyncBatchNorm, FrozenBatchNorm2d or Identity"


KNOWN: dict[type[nn.Module], type[Fused]] = {}
"""Stock class -> the fused class that stands for it, of the libraries whose blocks were asked for."""


class StockMethod:
    """A method of the stock class, under the name of the attribute that holds it: what TorchScript compiles.

    TorchScript compiles a method of its class under the name it bears, so it gets a copy of the function, as it is in
    the stock class at that moment.
    """

    def __init__(self, method: str = ""):
        self._method = method  # by default the first of the class's ``stock_methods``

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type[Fused]) -> Any:
        if not hasattr(owner, "stock_class"):
            return self
        f = getattr(owner.stock_class, self._method or owner.stock_methods[0])
        copy = types.FunctionType(f.__code__, f.__globals__, self._name, f.__defaults__, f.__closure__)
        copy.__annotations__, copy.__kwdefaults__ = f.__annotations__, f.__kwdefaults__
        return copy if instance is None else types.MethodType(copy, instance)


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
    stock_methods: ClassVar[tuple[str, ...]] = ("forward",)  # of the stock class, which a fused call passes by
    watched: ClassVar[pristine.Watched]
    own_methods: ClassVar[dict[str, Any]]  # as this package wrote them, by name
    part: ClassVar[str] = (
        ""  # the child that stands for the op's layers in reports, where the op is not the whole module
    )
    __jit_unused_properties__: ClassVar[list[str]] = ["backend", "save"]
    stock_forward: Any = StockMethod()

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if "stock_class" in cls.__dict__:  # FSDP2 derives a class of its own from ours
            KNOWN[cls.stock_class] = cls
            cls.own_methods = {name: getattr(cls, name) for name in (*cls.stock_methods, "__call__")}
            cls.watched = pristine.Watched(cls.stock_class, cls.stock_methods)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._release()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._release()
        super()._load_from_state_dict(*args, **kwargs)

    def _release(self) -> None:
        """Let go of the weights if PyTorch is about to swap them, which it does not with weak references about."""
        if torch.__future__.get_swap_module_params_on_conversion():
            parameter_cache.release(self.parameters())

    def runs_stock(self, x: Tensor) -> bool:
        """Must this call run the stock layers? If so, the reason is counted (and raised in strict mode).

        A tracer or transform that cannot read our ops is no fallback: it is shown the layers it asks for.
        """
        reason = untraceable(x)
        if reason:
            return True
        reason = self.unfusable() or self.unserved(x) or self.unsynchronized(x) or self.unkept()
        quiet = not reason
        if torch.is_grad_enabled():
            reason = reason or self.unequal(x)
        if reason:
            record.stock(self, self.op, reason, quiet)
        return bool(reason)

    def unequal(self, x: Tensor) -> str:
        """Why the op's gradients would not be the stock layers' bit for bit, as they must be without training kernels.

        Empty if they would be, nothing needs a gradient, or a backend was asked for by name, which is then what runs.
        The reference computes BatchNorm in the order of operations of ``batch_norm``, and FrozenBatchNorm2d has
        another.
        """
        got = self.unlike_reference()
        if not got or select.requested(self.backend) != "auto":
            return ""
        names = {"downsample", *(name for pair in self.layers for name in pair)} & self._modules.keys()
        layers = [m for name in names if (m := self._modules[name]) is not None]
        if not x.requires_grad and not any(p.requires_grad for m in layers for p in m.parameters()):
            return ""
        if select.trains(x.device.type, x.dtype, self.backend):
            return ""
        return f"expected layers that the reference repeats bit for bit in training, got {got}; it runs unfused"

    def unlike_reference(self) -> str:
        """What the reference rounds in another order than this module's own layers; empty if nothing."""
        frozen = any(type(self._modules.get(norm)) is FrozenBatchNorm2d for _, norm in self.layers)
        return "FrozenBatchNorm2d" if frozen else ""

    def unkept(self) -> str:
        """Why nothing that inference derives from the weights can be kept; empty if it can.

        FSDP2 frees a unit's weights after a call and gathers others at the same address, with the same version counter.
        """
        if not hasattr(type(self), "set_requires_gradient_sync"):
            return ""
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters()):
            return ""
        return "expected weights that stay where they are, got FSDP2's; in inference it runs unfused"

    def is_own(self) -> bool:
        """Does calling this module run this class's code? Not if a subclass or somebody's function took its place."""
        cls = type(self)
        return all([getattr(cls, name) is method for name, method in cls.own_methods.items()])

    def unserved(self, x: Tensor) -> str:
        """Why this input is for the stock layers: its class has a say in each operation, or it is an image without a
        batch, which all layers but BatchNorm2d take."""
        if type(x) is not Tensor and _has_a_say(x):
            kind = type(x)
            got = f"{kind.__module__}.{kind.__qualname__}, whose __torch_function__ wants to see each operation"
            return f"expected a Tensor, got {got}; it runs unfused"
        if x.dim() != 3 or any(isinstance(self._modules[norm], _BatchNorm) for _, norm in self.layers):
            return ""
        return f"expected a batch of images (N, C, H, W), got one of shape {tuple(x.shape)}; it runs unfused"

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
        reason = self.watched.changed()
        if reason:
            return reason
        fields = self.__dict__
        children = fields["_modules"]
        for conv, norm in self.layers:
            if conv in fields or norm in fields:  # which hide the child of that name
                hidden = conv if conv in fields else norm
                return obstacle(f"{hidden} to be a child module", fields[hidden])
            reason = conv_obstacle(conv, children.get(conv)) or norm_obstacle(norm, children.get(norm))
            if reason:
                return reason
        for name in self.acts:
            act = fields[name] if name in fields else children.get(name)
            if type(act) is not ReLU or is_altered(act):
                return obstacle(f"{name} to be a plain ReLU", act)
        for name in self.absent:
            child = fields[name] if name in fields else children.get(name)
            if child is not None and (type(child) is not nn.Identity or is_altered(child)):
                return obstacle(f"{name} to be absent", child)
        return ""

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


def untraceable(x: Any) -> str:
    """Why a call with this input must see the stock layers: what traces or transforms it cannot read our ops."""
    if isinstance(x, torch.fx.Proxy):
        return "symbolic tracing by torch.fx takes the stock layers, whose node names are torchvision's"
    if torch.compiler.is_exporting():
        return "torch.export takes the stock layers, which quantizers and other runtimes know"
    if torch.jit.is_tracing() or torch.onnx.is_in_onnx_export():
        return "torch.jit.trace and ONNX export take the stock layers, which other runtimes know"
    if torch.compiler.is_compiling():
        return ""
    if torch._C._functorch.maybe_current_level() is not None:
        return "torch.func transforms take the stock layers, which have their rules"
    if _has_any_global_hook():
        return "a global module hook wants to see every inner layer"
    if torch._C._len_torch_function_stack() and any(type(m) is not DeviceContext for m in _function_modes()):
        return "a torch function mode is on, which wants to see each operation"
    return ""


_plain_function = getattr(Tensor.__torch_function__, "__func__", None)


def _has_a_say(x: Any) -> bool:
    own = getattr(type(x).__torch_function__, "__func__", None)  # None: torch's own, for DTensor and its like
    return own is not None and own is not _plain_function and not torch.compiler.is_compiling()


def is_altered(m: nn.Module) -> bool:
    """Has somebody attached to this layer what a fused call would pass by: a hook, or a forward of its own?"""
    d = m.__dict__
    return bool(
        d["_forward_hooks"]
        or d["_forward_pre_hooks"]
        or d["_backward_hooks"]
        or d["_backward_pre_hooks"]
        or (len(d) != _FIELDS.get(type(m)) and overrides(d))
    )


def overrides(fields: dict[str, Any]) -> bool:
    """Does an instance with these attributes do something else than its class?"""
    return (
        "forward" in fields
        or "_call_impl" in fields
        or "_compiled_call_impl" in fields
        or "_conv_forward" in fields
        or "_check_input_dim" in fields
    )


_FIELDS: dict[type[nn.Module], int] = {
    type(m): len(m.__dict__)
    for m in (
        nn.Conv2d(1, 1, 1, device="meta"),
        nn.BatchNorm2d(1, device="meta"),
        nn.SyncBatchNorm(1, device="meta"),
        nn.ReLU(),
        nn.Identity(),
        nn.Sequential(),
    )
}
"""How many attributes a layer has that nobody has added any to: one comparison instead of a search for each name."""


def child(m: nn.Module, name: str) -> Any:
    """What ``m.name`` is if it was set on the instance; None if it was not. A plain attribute comes before a module."""
    fields = m.__dict__
    return fields[name] if name in fields else fields["_modules"].get(name)


def obstacle(expected: str, got: Any) -> str:
    """The sentence that gives ``got`` as the reason why something runs unfused."""
    return f"expected {expected}, got {_described(expected, got)}; it runs unfused"


def _described(expected: str, got: Any) -> str:
    """What stands there instead, in one line: a class by its full name where its short one would say the same."""
    kind = type(got)
    if got is None:
        return "None"
    if not isinstance(got, nn.Module):
        return f"a {kind.__name__}" + (f" {got.__name__}" if hasattr(got, "__name__") else "")
    name = kind.__name__
    if is_altered(got):
        return f"{name} with a hook or a replaced forward"
    return f"{kind.__module__}.{kind.__qualname__}" if name in re.findall(r"\w+", expected) else name


def conv_obstacle(name: str, conv: Any) -> str:
    """Why this convolution cannot be part of a fused call; empty if it can."""
    if type(conv) is not Conv2d or is_altered(conv):
        return obstacle(f"{name} to be a plain Conv2d", conv)
    fields = conv.__dict__
    stride, padding, dilation, parameters = (
        fields["stride"],
        fields["padding"],
        fields["dilation"],
        fields["_parameters"],
    )
    if fields["padding_mode"] != "zeros" or type(padding) is str:
        got = f"{conv.padding_mode} {padding}"
        return f"expected {name} with zero padding given in pixels, got {got}; it runs unfused"
    exact = (
        type(stride) is type(padding) is type(dilation) is tuple and len(stride) == len(padding) == len(dilation) == 2
    )
    if not exact and not (_is_pair(stride) and _is_pair(padding) and _is_pair(dilation)):
        got = f"{stride}, {padding}, {dilation}"
        return f"expected {name}'s stride, padding and dilation as one or two ints, got {got}; it runs unfused"
    try:
        weight, bias = parameters["weight"], parameters["bias"]
    except KeyError:
        return _no_parameter(name, fields)
    if type(weight) is Parameter and (bias is None or type(bias) is Parameter):
        if len(fields) != _FIELDS[Conv2d] and ("weight" in fields or "bias" in fields):
            return _no_parameter(name, fields)
        return "" if fields["out_channels"] else f"expected {name} to have output channels, got none; it runs unfused"
    if weight is not None and torch.compiler.is_compiling():  # which swaps in fake tensors
        return ""
    return _no_parameter(name, fields)


_TENSORS = ("weight", "bias", "running_mean", "running_var")


def _no_parameter(name: str, fields: dict[str, Any]) -> str:
    """The sentence for a layer one of whose tensors is not its plain parameter or buffer."""
    for tensor in _TENSORS:
        if tensor in fields:  # a plain attribute hides what bears the same name
            got: Any = fields[tensor]
        else:
            got = fields["_parameters"].get(tensor, fields["_buffers"].get(tensor, _TENSORS))
        if got is _TENSORS:
            return f"expected {name}'s {tensor} to be a plain parameter or None, got none; it runs unfused"
        if tensor in fields or (type(got) is not Parameter and got is not None):
            kind = type(got)
            what = f"{kind.__module__}.{kind.__qualname__}"
            return f"expected {name}'s {tensor} to be a plain parameter, got {what}; it runs unfused"
    return f"expected {name}'s weight to be a plain parameter, got None; it runs unfused"


def _is_pair(value: Any) -> bool:
    return isinstance(value, int) or (isinstance(value, (tuple, list)) and len(value) in (1, 2))


def norm_obstacle(name: str, norm: Any) -> str:
    """Why this norm cannot be part of a fused call; empty if it can."""
    kind = type(norm)
    learns = kind is BatchNorm2d or kind is SyncBatchNorm
    if not (learns or kind is FrozenBatchNorm2d or kind is Identity) or is_altered(norm):
        return obstacle(f"{name} to be {NORMS}", norm)
    if kind is Identity:
        return ""
    fields = norm.__dict__
    buffers = fields["_buffers"]
    affine = fields["_parameters"] if learns else buffers
    try:
        weight, bias, mean, var = affine["weight"], affine["bias"], buffers["running_mean"], buffers["running_var"]
        if learns:
            buffers["num_batches_tracked"]
    except KeyError as missing:
        return f"expected {name}'s {missing.args[0]} to be a plain parameter or buffer, got none; it runs unfused"
    if len(fields) != _FIELDS.get(kind) and any([t in fields for t in _TENSORS]):
        return _no_parameter(name, fields)
    if (mean is None) != (var is None):
        return f"expected {name} with both running_mean and running_var or neither, got one; it runs unfused"
    eps = fields["eps"]
    if not (type(eps) is float or type(eps) is int) or not eps >= 0:
        return f"expected {name}'s eps to be a number of at least 0, got {eps!r}; it runs unfused"
    if not learns:
        return ""
    momentum = fields["momentum"]
    if not (type(momentum) is float or momentum is None or type(momentum) is int):
        return f"expected {name}'s momentum to be a number or None, got {momentum!r}; it runs unfused"
    plain = (weight is None or type(weight) is Parameter) and (bias is None or type(bias) is Parameter)
    return "" if plain or torch.compiler.is_compiling() else _no_parameter(name, fields)


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
    # libraries that dilate nets assign ints and lists
    if not (
        type(stride) is type(padding) is type(dilation) is tuple and len(stride) == len(padding) == len(dilation) == 2
    ):
        stride, padding, dilation = _pair(stride), _pair(padding), _pair(dilation)
    return Conv(parameters["weight"], parameters["bias"], stride, padding, dilation, d["groups"])


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    return tuple(value) if len(value) == 2 else (value[0], value[0])


def counts(norm: Any) -> bool:
    """Does a call of this norm count a batch? Its record may then be made once per call."""
    return (type(norm) is BatchNorm2d or type(norm) is SyncBatchNorm) and norm.__dict__["training"]


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
