"""Reasons why a call cannot be fused: who observes it, and which layers differ from the plain ones.

Every function returns one sentence (what was expected, what came), or an empty string where there is no obstacle. The
same sentence appears in ``explain``, in the log and in strict mode's error.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import BatchNorm2d, Conv2d, Identity, Parameter, SyncBatchNorm
from torch.nn.modules.module import _has_any_global_hook
from torch.overrides import _get_current_function_mode_stack as _function_modes
from torch.utils._device import DeviceContext

from ..errors import UserError
from . import frozen_norms
from .children import geometry

# Imports its parts at its first call. Done here: a process that forks while a thread is inside that import would leave
# the child an import that never ends.
torch.onnx.is_in_onnx_export()

NORMS = "BatchNorm2d, SyncBatchNorm, FrozenBatchNorm2d or Identity"


def untraceable(x: Any) -> str:
    """Return why a call with this input must run the stock layers: a tracer or transform that cannot read our ops."""
    if type(x) is not Tensor and isinstance(x, torch.fx.Proxy):
        return "torch.fx traces the stock layers, so that the nodes have torchvision's names"
    if torch.compiler.is_exporting():
        return "torch.export records the stock layers, which quantizers and other runtimes know"
    if torch.jit.is_tracing() or torch.onnx.is_in_onnx_export():
        return "torch.jit.trace and ONNX export record the stock layers, which other runtimes know"
    if torch.compiler.is_compiling():
        return ""
    if torch._C._functorch.maybe_current_level() is not None:
        return "torch.func transforms the stock layers, which have rules for every transform"
    if _has_any_global_hook():
        return "a global module hook observes every inner layer"
    if torch._C._len_torch_function_stack() and any(type(m) is not DeviceContext for m in _function_modes()):
        return "a torch function mode is on and observes each operation"
    return ""


def require_tensor(x: Any) -> None:
    """Raise UserError unless this is a Tensor or of a subclass."""
    if not isinstance(x, Tensor):
        kind = f"{type(x).__module__}.{type(x).__qualname__}"
        raise UserError("a tensor of images (N, C, H, W)", kind, "convert it, for example with torch.as_tensor")


_plain_function = getattr(Tensor.__torch_function__, "__func__", None)


def overridden_tensor(x: Any) -> str:
    """Return why an input of this class must run the stock layers: it overrides ``__torch_function__``."""
    kind = type(x)
    if kind is Tensor or torch.compiler.is_compiling():
        return ""
    require_tensor(x)
    own = getattr(kind.__torch_function__, "__func__", None)  # None: torch's own, for DTensor and similar classes
    if own is None or own is _plain_function:
        return ""
    got = f"{kind.__module__}.{kind.__qualname__}, which observes each operation by its __torch_function__"
    return f"expected a Tensor, got {got}; it runs unfused"


def is_altered(m: nn.Module) -> bool:
    """Return whether a fused call would skip something attached to this layer: a hook, or a forward of its own."""
    fields = m.__dict__
    return bool(
        fields["_forward_hooks"]
        or fields["_forward_pre_hooks"]
        or fields["_backward_hooks"]
        or fields["_backward_pre_hooks"]
        or (len(fields) != _FIELDS.get(type(m)) and _overrides(fields))
    )


def _overrides(fields: dict[str, Any]) -> bool:
    """Return whether an instance with these attributes behaves differently from its class."""
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
"""Number of attributes of an unchanged layer: one comparison instead of a search for each name."""


def obstacle(expected: str, got: Any) -> str:
    """Return the sentence that gives ``got`` as the reason why something runs unfused."""
    return f"expected {expected}, got {_described(expected, got)}; it runs unfused"


def _described(expected: str, got: Any) -> str:
    """Describe ``got`` in one line. A class has its full name where its short one would repeat ``expected``."""
    kind = type(got)
    if got is None:
        return "None"
    if not isinstance(got, nn.Module):
        return f"a {kind.__name__}" + (f" {got.__name__}" if hasattr(got, "__name__") else "")
    name = kind.__name__
    if is_altered(got):
        return f"{name} with a hook or a replaced forward"
    return f"{kind.__module__}.{kind.__qualname__}" if name in re.findall(r"\w+", expected) else name


def conv_obstacle(name: str, conv: Any, kind: type[nn.Module] = Conv2d) -> str:
    """Return why this convolution cannot be part of a fused call. ``kind``: the class that it must have."""
    if type(conv) is not kind or is_altered(conv):
        return obstacle(f"{name} to be a plain Conv2d", conv)
    fields = conv.__dict__
    parameters = fields["_parameters"]
    if fields["padding_mode"] != "zeros" or type(fields["padding"]) is str:
        got = f"{conv.padding_mode} {conv.padding}"
        return f"expected {name} with zero padding given in pixels, got {got}; it runs unfused"
    if geometry(fields) is None:
        got = f"{conv.stride}, {conv.padding}, {conv.dilation}"
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
    """Return the sentence for a layer whose tensors are not all plain parameters or buffers."""
    for tensor in _TENSORS:
        if tensor in fields:  # a plain attribute hides a parameter of that name
            got: Any = fields[tensor]
        else:
            got = fields["_parameters"].get(tensor, fields["_buffers"].get(tensor, _TENSORS))
        if got is _TENSORS:
            return f"expected {name}'s {tensor} to be a plain parameter or None, got none; it runs unfused"
        is_buffer = tensor in fields["_buffers"]
        if tensor in fields or (
            type(got) is not Parameter and got is not None and not (is_buffer and type(got) is Tensor)
        ):
            kind = type(got)
            what = f"{kind.__module__}.{kind.__qualname__}"
            plain = "buffer" if is_buffer else "parameter"
            return f"expected {name}'s {tensor} to be a plain {plain}, got {what}; it runs unfused"
    return f"expected {name}'s weight to be a plain parameter, got None; it runs unfused"


def norm_obstacle(name: str, norm: Any) -> str:
    """Return why this norm cannot be part of a fused call."""
    kind = type(norm)
    learns = kind is BatchNorm2d or kind is SyncBatchNorm
    if not (learns or kind is Identity or frozen_norms.is_frozen(norm)) or is_altered(norm):
        return frozen_norms.unlike(name, norm) or obstacle(f"{name} to be {NORMS}", norm)
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
    if not (type(mean) is type(var) is Tensor and (learns or type(weight) is type(bias) is Tensor)):
        for t in (mean, var) if learns else (weight, bias, mean, var):
            if not (t is None or type(t) is Tensor or type(t) is Parameter or torch.compiler.is_compiling()):
                return _no_parameter(name, fields)
    if (mean is None) != (var is None):
        return f"expected {name} with both running_mean and running_var or neither, got one; it runs unfused"
    eps = fields["eps"] if learns else frozen_norms.eps_of(norm)
    if not (type(eps) is float or type(eps) is int) or not eps >= 0:
        return f"expected {name}'s eps to be a number of at least 0, got {eps!r}; it runs unfused"
    if not learns:
        return ""
    momentum = fields["momentum"]
    if not (type(momentum) is float or momentum is None or type(momentum) is int):
        return f"expected {name}'s momentum to be a number or None, got {momentum!r}; it runs unfused"
    plain = (weight is None or type(weight) is Parameter) and (bias is None or type(bias) is Parameter)
    return "" if plain or torch.compiler.is_compiling() else _no_parameter(name, fields)
