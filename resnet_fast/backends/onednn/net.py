"""``net``: the stem and every block of a net as one compiled oneDNN graph.

    x -> stem -> block -> … -> block, BatchNorm folded, each convolution with its bias, add and ReLU one primitive

A call of ``mkldnn::_convolution_pointwise`` takes about 50 us besides the arithmetic (it looks its primitive up anew;
measured on an AVX2 machine), 53 times per ResNet-50, and as much Python lies between the calls. oneDNN's graph API,
which ATen exposes through TorchScript, keeps the compiled primitives instead: 46.8 ms against 50.1 for ResNet-50 at
batch 1, 44.4 against 46.2 ms per image at batch 16 in tiles of four (measured; docs/notes/one-graph.md).

Compiling takes about a second and is good for one input size, so a size runs its parts one by one, with weights packed
as for any other call, until it comes for the fifth time. Sizes that keep changing never compile. The graph is traced
from folded fp32 weights; where this CPU runs 16-bit tensors in fp32, only the net's input and output are 16-bit.
"""

from __future__ import annotations

import threading
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import folding
from ...calls import BlockCall, Conv, NetCall, Norm, StemCall
from ...spec import NetSpec
from .bottleneck import bottleneck
from .conv_bn_act import Packed, compute_dtype, conv_bn_act, like_reference, nhwc
from .conv_bn_act import prepare as pack
from .stem import stem

CALLS_BEFORE_COMPILING = 4
_compiling = threading.Lock()  # the switch that lets TorchScript use oneDNN's graph is process-wide


@dataclass
class State:
    """One input size of one net: packed parts until the graph is compiled, then the graph."""

    parts: list[list[Packed]] | None
    graph: Any = None
    calls: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


def can_compile() -> bool:
    """Has this torch the switch? It is private, and TorchScript is no longer developed: without it, parts run apart."""
    return hasattr(torch._C, "_jit_set_llga_enabled") and hasattr(torch._C, "_jit_llga_enabled")


def prepare(call: NetCall, spec: NetSpec, earlier: list[State]) -> State:
    """Pack every part. ``earlier`` sizes share what they still hold in equal layout."""
    held = [e.parts for e in earlier if e.parts is not None]
    return State(
        [
            pack(part._replace(x=call.x), part_spec, [parts[i] for parts in held])
            for i, (part, part_spec) in enumerate(zip(call.parts, spec.parts, strict=True))
        ]
    )


def net(call: NetCall, spec: NetSpec, state: State) -> Tensor:
    """The last block's output."""
    dtype = compute_dtype(call.x.dtype)
    if state.graph is None and dtype == torch.float32 and can_compile():
        with state.lock:
            state.calls += 1
            if state.calls > CALLS_BEFORE_COMPILING and state.graph is None:
                state.graph = _compile(call, nhwc(call.x, dtype))
                state.parts = None
    x = nhwc(call.x, dtype)
    parts = state.parts  # another thread may compile and drop them meanwhile
    if parts is None:
        y = state.graph(x)
    else:
        y = x
        for part, part_spec, packed in zip(call.parts, spec.parts, parts, strict=True):
            run: Any = (
                bottleneck if isinstance(part, BlockCall) else stem if isinstance(part, StemCall) else conv_bn_act
            )
            y = run(part._replace(x=y), part_spec, packed)
    return like_reference(y, call.x.dtype, spec.layout)


class _Convolution(nn.Module):
    """A folded convolution as TorchScript sees it."""

    weight: Tensor
    bias: Tensor

    def __init__(self, conv: Conv, norm: Norm):
        super().__init__()
        weight, bias = folding.fold(conv, norm)
        self.register_buffer("weight", weight.contiguous(memory_format=torch.channels_last))
        self.register_buffer("bias", bias)
        self.conv = conv[2:]

    def forward(self, x: Tensor) -> Tensor:
        stride, padding, dilation, groups = self.conv
        return F.conv2d(x, self.weight, self.bias, stride, padding, dilation, groups)


class _Parts(nn.Module):
    """The net in the plainest operations, which is what the graph's patterns are made of."""

    def __init__(self, call: NetCall):
        super().__init__()
        self.parts = call.parts
        self.convs = nn.ModuleList()
        for part in call.parts:
            pairs = (
                zip(part.convs, part.norms, strict=True) if isinstance(part, BlockCall) else [(part.conv, part.norm)]
            )
            self.convs.extend(_Convolution(conv, norm) for conv, norm in pairs)

    def forward(self, x: Tensor) -> Tensor:
        convs = iter(self.convs)
        for part in self.parts:
            if isinstance(part, BlockCall):
                y = x
                for _ in part.main()[:-1]:
                    y = torch.relu(next(convs)(y))
                y = next(convs)(y)
                x = torch.relu(y + (next(convs)(x) if part.projection else x))
            else:
                x = next(convs)(x)
                x = torch.relu(x) if isinstance(part, StemCall) or part.relu else x
                x = F.max_pool2d(x, *part.pool) if isinstance(part, StemCall) else x
        return x


def _compile(call: NetCall, x: Tensor) -> Any:
    """Trace, freeze and fuse for inputs like ``x``. The executor observes one run and fuses in the next."""
    with _compiling, torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript's own announcements of its retirement
        example = torch.zeros_like(x)  # an inference tensor cannot be traced
        before = torch._C._jit_llga_enabled()
        torch._C._jit_set_llga_enabled(True)
        try:
            graph = torch.jit.freeze(torch.jit.trace(_Parts(call).eval(), example, check_trace=False))
            for _ in range(3):
                graph(example)
        finally:
            torch._C._jit_set_llga_enabled(before)
    return graph
