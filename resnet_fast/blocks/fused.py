"""The mixin of all fused modules: when a call runs as one op, and when it runs the stock layers."""

from __future__ import annotations

import types
from collections.abc import Callable
from operator import attrgetter
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import BatchNorm2d, ReLU, SyncBatchNorm
from torch.nn.modules.batchnorm import _BatchNorm

from .. import parameter_cache
from ..dispatch import record, select
from . import children, frozen_norms, pristine
from .obstacles import conv_obstacle, is_altered, norm_obstacle, obstacle, overridden_tensor, untraceable

KNOWN: dict[type[nn.Module], type[Fused]] = {}
"""Stock class -> its fused class, the first that was defined, for every library whose fused blocks were imported."""


class StockMethod:
    """A method of the stock class under another name, for TorchScript to compile.

    TorchScript compiles a method under the ``__name__`` of its function, so this returns a renamed copy. It is made at
    each access, because the stock class's method may have been replaced.
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
    """Mixin placed before a stock class in the bases.

    Attributes:
        stock_class: the class that ``restore`` puts back.
        op: the name in counters and reports.
        layers: names of the (convolution, norm) children in order of execution.
        acts: names of the ReLU children.
        absent: names of children that must do nothing (timm's drop_block, anti-aliasing, attention).
        stock_methods: methods of the stock class that a fused call skips.
        inner_methods: methods of a net that a call of all its layers at once skips.
        part: the child that reports name, where the op is not the whole module.
    """

    stock_class: ClassVar[type[nn.Module]]
    op: ClassVar[str]
    layers: ClassVar[tuple[tuple[str, str], ...]]
    acts: ClassVar[tuple[str, ...]] = ("relu",)
    absent: ClassVar[tuple[str, ...]] = ()
    stock_methods: ClassVar[tuple[str, ...]] = ("forward",)
    inner_methods: ClassVar[frozenset[str]] = frozenset()
    part: ClassVar[str] = ""
    watched: ClassVar[pristine.Watched]
    _methods_of: ClassVar[Callable[[type], Any]]
    _own_methods: ClassVar[Any]
    __jit_unused_properties__: ClassVar[list[str]] = ["backend", "save"]
    stock_forward: Any = StockMethod()

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if "stock_class" in cls.__dict__:  # FSDP2 derives a class of its own from ours
            KNOWN.setdefault(cls.stock_class, cls)
            cls._methods_of = attrgetter(*cls.stock_methods, "__call__")
            cls._own_methods = cls._methods_of(cls)
            cls.watched = pristine.Watched(cls.stock_class, cls.stock_methods)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._release()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._release()
        super()._load_from_state_dict(*args, **kwargs)

    def _release(self) -> None:
        """Forget the weights if PyTorch is about to swap them, which it refuses for weakly referenced tensors."""
        if torch.__future__.get_swap_module_params_on_conversion():
            parameter_cache.release(self.parameters())

    @classmethod
    def class_for(cls, m: nn.Module) -> type[Fused]:
        """Return the fused class for a module of the stock class: this one, unless its layers ask for another.

        Raises:
            UserError: the module has not the layers that were registered for its class.
        """
        return cls

    def is_own(self) -> bool:
        """Return whether calling this module runs this class's code, not a subclass's or a replaced method."""
        cls = type(self)
        return cls._methods_of(cls) == cls._own_methods

    def has_other_methods(self) -> bool:
        """Return whether one of ``inner_methods`` was replaced on this net or its class."""
        return bool(self.inner_methods) and not (self.is_own() and self.inner_methods.isdisjoint(self.__dict__))

    def runs_stock(self, x: Tensor) -> bool:
        """Return whether this call must run the stock layers. If so, count the reason; in strict mode raise it.

        Running the stock layers for a tracer or transform that cannot read our ops is no fallback.
        """
        if runs_for_tracer(x):
            return True
        reason = self.unfusable() or self.input_obstacle(x) or self.sync_obstacle(x) or cache_obstacle(self)
        return self.counts_as_stock(x, reason, self.unlike_reference)

    def counts_as_stock(self, x: Tensor, reason: str, unlike_reference: Callable[[], str]) -> bool:
        """Return whether there is a reason for the stock layers, this one or one of the gradients', and count it."""
        quiet = not reason
        if not reason and torch.is_grad_enabled():
            reason = gradient_obstacle(x, unlike_reference, self.op_layers, self.backend)
        if reason:
            record.stock(self, self.op, reason, quiet)
        return bool(reason)

    def unfusable(self) -> str:
        """Return the obstacle that depends on the module alone; empty if there is none."""
        reason = self.watched.changed()
        if reason:
            return reason
        fields = self.__dict__
        modules = fields["_modules"]
        for conv, norm in self.layers:
            if conv in fields or norm in fields:  # which hide the child of that name
                hidden = conv if conv in fields else norm
                return obstacle(f"{hidden} to be a child module", fields[hidden])
            reason = conv_obstacle(conv, modules.get(conv)) or norm_obstacle(norm, modules.get(norm))
            if reason:
                return reason
        for name in self.acts:
            act = fields[name] if name in fields else modules.get(name)
            if type(act) is not ReLU or is_altered(act):
                return obstacle(f"{name} to be a plain ReLU", act)
        for name in self.absent:
            child = fields[name] if name in fields else modules.get(name)
            if child is not None and (type(child) is not nn.Identity or is_altered(child)):
                return obstacle(f"{name} to be absent", child)
        return ""

    def input_obstacle(self, x: Tensor) -> str:
        """Return why this input needs the stock layers.

        Its class observes each operation, or it is an image without a batch, which all layers but BatchNorm2d take.
        """
        if type(x) is Tensor and x.dim() != 3:
            return ""
        return image_obstacle(x, any(isinstance(self._modules[norm], _BatchNorm) for _, norm in self.layers))

    def sync_obstacle(self, x: Tensor) -> str:
        """Return why the op cannot gather the statistics of this block's SyncBatchNorm layers."""
        groups = set()
        for _, norm in self.layers:
            layer = self._modules[norm]
            if type(layer) is SyncBatchNorm:
                groups.add(children.sync_group(layer))
        groups.discard("")
        return self.group_obstacle(groups, x) if groups else ""

    def group_obstacle(self, groups: set[str], x: Tensor) -> str:
        """Return why the op cannot gather statistics in these process groups."""
        return group_obstacle(groups, x, self.backend)

    def unlike_reference(self) -> str:
        """Return what the reference rounds in another order than this module's own layers; empty if nothing."""
        for _, norm in self.layers:
            layer = self._modules.get(norm)
            if type(layer) is not BatchNorm2d and frozen_norms.is_frozen(layer):
                return type(layer).__name__
        return ""

    def op_layers(self) -> list[nn.Module]:
        """Return the modules with the parameters of the op."""
        names = {"downsample", *(name for pair in self.layers for name in pair)} & self._modules.keys()
        return [m for name in names if (m := self._modules[name]) is not None]

    def own_modules(self) -> list[nn.Module]:
        """Return the modules that this one answers for: itself, and not the blocks inside a net."""
        return [self]

    def op_convs(self) -> list[nn.Module]:
        """Return the convolutions that run inside ops, of a module that is not :meth:`unfusable`."""
        return [m for conv, _ in self.layers if (m := self._modules[conv]) is not None]

    def op_name(self) -> str:
        """Return what such a module runs as: one op, or ``pieces``."""
        return self.op

    def parts(self, x: Tensor) -> tuple[Any, ...] | None:
        """Return this module as parts of a :class:`~resnet_fast.calls.NetCall`; None if it cannot be."""
        raise NotImplementedError

    @property
    def backend(self) -> str:
        """The backend that ``accelerate(model, backend=...)`` asked for."""
        return self.__dict__.get("_resnet_fast_backend", "auto")

    @property
    def save(self) -> str:
        """What training keeps for the backward pass, as ``accelerate(model, save=...)`` asked for."""
        return self.__dict__.get("_resnet_fast_save", "raw")


def runs_for_tracer(x: Tensor) -> bool:
    """Return whether this call must run the stock layers for a tracer or transform that cannot read our ops.

    Raises:
        BackendError: in batch-invariant mode, in eager code. An exported program is out of the mode's reach.
    """
    reason = untraceable(x)
    if reason and not torch.compiler.is_compiling():
        record.refuse_stock(reason)
    return bool(reason)


def image_obstacle(x: Tensor, batch_norm: bool) -> str:
    """Return why this input needs the stock layers. ``batch_norm``: whether one of them refuses a single image."""
    if type(x) is not Tensor:
        reason = overridden_tensor(x)
        if reason:
            return reason
    if x.dim() != 3 or batch_norm:
        return ""
    return f"expected a batch of images (N, C, H, W), got one of shape {tuple(x.shape)}; it runs unfused"


def group_obstacle(groups: set[str], x: Tensor, backend: str) -> str:
    """Return why the op cannot gather statistics in these process groups."""
    if len(groups) > 1:
        return "expected the block's SyncBatchNorm layers to share a process group, got several; it runs unfused"
    if not select.trains(x.device, x.dtype, backend):
        got = f"SyncBatchNorm in training on {x.device.type} {x.dtype}, which no available training kernels serve"
        return f"expected BatchNorm2d, or Triton's training kernels, got {got}; it runs unfused"
    return ""


def cache_obstacle(m: nn.Module) -> str:
    """Return why nothing that inference derives from the weights of ``m`` can be kept.

    FSDP2 frees a unit's weights after a call and gathers others at the same address, with the same version counter.
    """
    if not hasattr(type(m), "set_requires_gradient_sync"):
        return ""
    if torch.is_grad_enabled() and any(p.requires_grad for p in m.parameters()):
        return ""
    return "expected weights that stay in memory, got FSDP2's, freed after each call; in inference it runs unfused"


def gradient_obstacle(
    x: Tensor, unlike_reference: Callable[[], str], layers: Callable[[], list[nn.Module]], backend: str
) -> str:
    """Return why the op's gradients would differ from the stock layers' in the last bit.

    Without training kernels the reference runs. It computes BatchNorm in the order of operations of ``batch_norm``,
    which is not FrozenBatchNorm2d's. This is no obstacle where nothing needs a gradient, or where a backend was
    requested by name.

    Args:
        x: the input.
        unlike_reference: returns what the reference rounds in another order; empty if nothing.
        layers: returns the modules with the parameters of the op.
        backend: a name of :data:`resnet_fast.flags.BACKENDS`.
    """
    if torch.compiler.is_compiling():  # it orders sums as it likes, and cannot trace the choice of a backend
        return ""
    got = unlike_reference()
    if not got or select.requested(backend) != "auto":
        return ""
    if not x.requires_grad and not any(p.requires_grad for m in layers() for p in m.parameters()):
        return ""
    if select.trains(x.device, x.dtype, backend):
        return ""
    got = f"{got}, and no training kernels for {x.device.type} {x.dtype}"
    return f"expected layers that the reference reproduces bit for bit in training, got {got}; it runs unfused"
