"""A stage of a net (layer1 ... layer4): channels_last between its blocks, the caller's layout at both ends.

    x NCHW -> [NHWC] block -> block -> ... -> block -> [NCHW] y

A fused block returns the layout of its input. On a CPU its kernels work in NHWC, so a net in NCHW that is not run as a
whole (a detector, a segmentation net) would convert twice per block. A stage converts twice in all. For a ResNet-50 at
224 x 224 in fp32, counted: 25 MB are moved per image in place of 89 MB.
"""

import types
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import ops
from ..dispatch import select
from .fused import Fused


class ConvertingStage(nn.Module):
    """Mixin placed before the stock class of a container whose forward takes x through its blocks."""

    stock_class: ClassVar[type[nn.Module]]

    def blocks(self) -> Iterable[nn.Module]:
        """Return the blocks in order."""
        return self.layers  # type: ignore[return-value]

    def eager_forward(self, x: Tensor) -> Tensor:
        """Run the stock forward, in channels_last where the blocks' backend works so."""
        if self.converts(x):
            return self.stock_class.forward(self, x.contiguous(memory_format=torch.channels_last)).contiguous()
        return self.stock_class.forward(self, x)

    def converts(self, x: Tensor) -> bool:
        """Return whether ``x`` is a plain NCHW tensor in inference, and a block's backend works in NHWC."""
        if not _is_plain_nchw(x) or self.training:
            return False
        fused = next((block for block in self.blocks() if isinstance(block, Fused) and not block.unfusable()), None)
        return fused is not None and select.prefers_nhwc(x.device, fused.backend)


class Sequential(ConvertingStage, nn.Sequential):
    """A Sequential of fused blocks."""

    stock_class = nn.Sequential

    # The stock signature, for callers by keyword and for the names of fx's nodes.
    def forward(self, input):  # type: ignore[no-untyped-def]
        if not torch.jit.is_scripting():
            return self.eager_forward(input)
        for block in self:
            input = block(input)
        return input

    def blocks(self) -> Iterable[nn.Module]:
        return self


def class_for(m: nn.Module, containers: set[type[nn.Module]]) -> type[ConvertingStage] | None:
    """Return the class of a stage for a stock container, None for other modules.

    Args:
        m: the module, after the classes of its blocks were exchanged.
        containers: classes of a library whose forward takes x through the children of ``layers``.
    """
    kind = type(m)
    if kind is nn.Sequential:
        return Sequential if m and _all_fused(m) else None
    return derived(kind) if kind in containers and _all_fused(m.layers) else None


def _all_fused(blocks: Any) -> bool:
    return all(isinstance(block, Fused) for block in blocks)


_derived: dict[type[nn.Module], type[ConvertingStage]] = {}


def derived(stock_class: Any) -> type[ConvertingStage]:
    """Return the stage of a container's class, under its names and with the names of its parameters."""
    if stock_class not in _derived:
        _derived[stock_class] = _derive(stock_class)
    return _derived[stock_class]


def _derive(stock_class: Any) -> type[ConvertingStage]:
    parameter = stock_class.forward.__code__.co_varnames[1]
    forward = types.FunctionType(_forward.__code__.replace(co_varnames=("self", parameter)), globals(), "forward")
    forward.__annotations__ = {parameter: Tensor, "return": Tensor}
    forward.__qualname__ = f"{stock_class.__qualname__}.forward"
    fields = {
        "__doc__": stock_class.__doc__,
        "__module__": __name__,
        "__qualname__": stock_class.__qualname__,
        "stock_class": stock_class,
        "forward": forward,
        "__reduce_ex__": _reduce,
    }
    return types.new_class(
        stock_class.__name__, (ConvertingStage, stock_class), exec_body=lambda space: space.update(fields)
    )


def _forward(self: Any, x: Tensor) -> Tensor:
    return self.eager_forward(x)


def _reduce(self: Any, protocol: Any) -> Any:
    reduced = nn.Module.__reduce_ex__(self, protocol)
    if "stock_class" not in type(self).__dict__:  # FSDP2 derives a class of its own from ours
        return reduced
    return rebuild, (self.stock_class,), *reduced[2:]


def rebuild(stock_class: type[nn.Module]) -> ConvertingStage:
    """Return an empty stage, for copies and pickles."""
    cls = derived(stock_class)
    return cls.__new__(cls)


def converts(x: Tensor, training: bool, backend: str) -> bool:
    """Return whether a block in pieces should convert ``x`` once for all of them, in inference."""
    return _is_plain_nchw(x) and not training and select.prefers_nhwc(x.device, backend)


def _is_plain_nchw(x: Tensor) -> bool:
    """Return whether ``x`` is a plain tensor (N, C, H, W) in that layout, outside of autograd."""
    if not ops.is_plain_inference(x) or x.dim() != 4:
        return False
    return x.is_contiguous() and not x.is_contiguous(memory_format=torch.channels_last)


_own_forward = Sequential.forward


def is_own() -> bool:
    """Return whether calling a stage runs the code above, not a function put in its place."""
    return Sequential.forward is _own_forward
