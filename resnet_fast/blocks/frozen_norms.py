"""Recognise a frozen BatchNorm by what it is, whatever its class is called.

    y = x * scale + bias - running_mean * scale,   scale = weight / sqrt(running_var + eps)

torchvision, detectron2 and a dozen models of transformers each have a class of their own for it. All keep the four
tensors as buffers, so that no optimizer sees them. A class with these buffers is recognised once it has computed the
formula for random numbers in float64, with and without autograd, in both modes. One that computes something else is
refused with a sentence. The answer belongs to the class and its ``forward``: a replaced ``forward`` is looked at again.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from . import pristine
from .pristine import FrozenBatchNorm2d

TENSORS = ("weight", "bias", "running_mean", "running_var")
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

_RTOL = 1e-12
"""Of the largest value. A sum of two terms and a root round by about 1e-15, a misplaced eps changes 1e-6."""


class FrozenFormula(NamedTuple):
    """What is known about a class with the four buffers.

    Attributes:
        forward: the function that was looked at; None for torchvision's, which :mod:`.pristine` watches.
        eps: the constant in the code; None if it is the attribute ``eps`` of the instance.
        reason: why it is no frozen BatchNorm; empty if it is one.
    """

    forward: Callable[..., Any] | None
    eps: float | None
    reason: str


_known: dict[type[nn.Module], FrozenFormula] = {FrozenBatchNorm2d: FrozenFormula(None, None, "")}
_looking = threading.local()


def is_frozen(norm: Any) -> bool:
    """Return whether this layer's class computes the formula from four buffers."""
    known = _known.get(type(norm))
    if known is None or (known.forward is not None and known.forward is not type(norm).forward):
        known = look(norm)
    return known is not None and not known.reason


def eps_of(norm: Any) -> Any:
    """Return the eps of a layer for which :func:`is_frozen` holds."""
    eps = _known[type(norm)].eps
    return norm.eps if eps is None else eps


def unlike(name: str, norm: Any) -> str:
    """Return why a layer with the four buffers is no frozen BatchNorm; empty for other layers, and if it is one."""
    known = _known.get(type(norm))
    return "" if known is None or not known.reason else f"expected {name} {known.reason}; it runs unfused"


def look(norm: Any) -> FrozenFormula | None:
    """Find out what a layer's class computes, and keep it; None for other layers, and inside a compiler or a mode."""
    if not _has_the_buffers(norm) or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return None
    if getattr(_looking, "now", False):  # its own forward asks, by a call of a fused module
        return None
    _looking.now = True
    try:
        found = _known[type(norm)] = _look(norm)
    finally:
        _looking.now = False
    return found


def _has_the_buffers(norm: Any) -> bool:
    if not isinstance(norm, nn.Module) or isinstance(norm, _NormBase) or norm._parameters or norm._modules:
        return False
    buffers = {name: value for name, value in norm._buffers.items() if value is not None}
    return buffers.keys() == set(TENSORS) and len({t.shape for t in buffers.values()}) == 1 and norm.weight.dim() == 1


def _look(norm: Any) -> FrozenFormula:
    kind = type(norm)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if not pristine.is_own(kind, "forward", kind.forward):
        return FrozenFormula(kind.forward, None, f"to run the forward of its class, got another in {name}")
    wrong = FrozenFormula(
        kind.forward,
        None,
        f"to compute (x - running_mean) / sqrt(running_var + eps) * weight + bias, got another result from {name}",
    )
    try:
        with torch.inference_mode(False), torch.autocast("cpu", enabled=False):
            probe = _Probe(norm)
            eps = None if probe.obeys_attribute() else probe.constant()
            return FrozenFormula(kind.forward, eps, "") if probe.agrees(eps) else wrong
    except Exception as error:  # anything may be in a foreign forward
        reason = f"to take an image (N, C, H, W) in float64, got {type(error).__name__} from {name}"
        return FrozenFormula(kind.forward, None, reason)


class _Probe:
    """A copy of a norm with random buffers in float64 on the CPU, without hooks."""

    def __init__(self, norm: Any):
        channels = norm.weight.shape[0]
        self._random = torch.Generator().manual_seed(0)
        self._norm = norm.__new__(type(norm))
        self._norm.__dict__ = norm.__dict__ | {hooks: type(getattr(norm, hooks))() for hooks in HOOKS}
        self._norm.__dict__["_buffers"] = self._tensors = dict(norm._buffers) | {
            "weight": self._draw(channels) + 0.5,
            "bias": self._draw(channels) - 0.5,
            "running_mean": self._draw(channels) - 0.5,
            # also so small that the place of eps shows
            "running_var": self._draw(channels) * 10.0 ** -(5 * self._draw(channels)),
        }
        self._x = self._draw(2, channels, 3, 5) - 0.5

    def _draw(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self._random, dtype=torch.float64, device="cpu")

    def obeys_attribute(self) -> bool:
        """Return whether the attribute ``eps`` is the formula's."""
        fields = self._norm.__dict__
        if not isinstance(fields.get("eps"), (int, float)):
            return False
        before, fields["eps"] = fields["eps"], 0.125
        obeyed = self._matches(0.125)
        fields["eps"] = before
        return obeyed

    def constant(self) -> float:
        """Return eps as it shows where the variance is 0, to ten digits."""
        tensors, x = self._tensors, torch.ones_like(self._x)
        kept = dict(tensors)
        tensors |= {"running_var": torch.zeros_like(kept["running_var"])}
        tensors |= {"weight": torch.ones_like(kept["weight"]), "bias": torch.zeros_like(kept["bias"])}
        tensors |= {"running_mean": torch.zeros_like(kept["running_mean"])}
        scale = float(self._norm.forward(x).flatten()[0])
        tensors |= kept
        return float(f"{scale**-2:.10g}") if math.isfinite(scale) and scale else 0.0  # 1 / sqrt(0) is infinite

    def agrees(self, eps: float | None) -> bool:
        """Return whether the forward computes the formula with and without autograd, in both modes."""
        eps = self._norm.eps if eps is None else eps
        agreed = True
        for training in (False, True):
            self._norm.training = training
            for grad in (False, True):
                self._x.requires_grad_(grad)
                agreed = agreed and self._matches(eps)
        return agreed

    def _matches(self, eps: float) -> bool:
        weight, bias, mean, var = (self._tensors[name][:, None, None] for name in TENSORS)
        want = (self._x.detach() - mean) * (weight * (var + eps).rsqrt()) + bias
        with torch.set_grad_enabled(self._x.requires_grad):
            got = self._norm.forward(self._x)
        if not isinstance(got, Tensor) or got.shape != want.shape or got.dtype != want.dtype:
            return False
        floor = (want.abs() + bias.abs() + 1).max()  # cancellation leaves the error of the terms in a small sum
        return bool((got.detach() - want).abs().max() <= _RTOL * floor)
