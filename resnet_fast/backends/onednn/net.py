"""``net``: the stem and every block of a net as one compiled oneDNN graph.

    x -> stem -> block -> … -> block, BatchNorm folded, each convolution with its bias, add and ReLU one primitive

A call of ``mkldnn::_convolution_pointwise`` takes about 50 us in addition to the arithmetic, because it looks up its
primitive (measured on an AVX2 machine), and the Python between two calls takes as long; a ResNet-50 has 53 of them.
oneDNN's graph API, which ATen exposes through TorchScript, keeps the compiled primitives: 46.8 ms instead of 50.1 for
ResNet-50 at batch 1, 44.4 instead of 46.2 ms per image at batch 16 in tiles of four (measured;
docs/notes/one-graph.md).

Compiling takes about a second and serves one input size and one set of weights. So a size runs its parts one by one,
with weights packed as for any other call, until its calls have earned the compilation
(:mod:`resnet_fast.packing_budget`): the fifth call at the earliest, about the twentieth at batch 1. Sizes and weights
that keep changing never compile. The graph is traced from weights folded in fp32. A bf16 net is compiled in bf16 where
the CPU has it: 12.6 ms instead of 14.5 at batch 1 (measured with AVX-512 BF16; the results are equal bit for bit). If
this CPU runs 16-bit tensors in fp32, only the net's input and output are 16-bit.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import folding, packing_budget
from ...calls import Conv, NetCall, Norm
from ...locks import ForkSafeLock
from ...spec import NetSpec, Verdict
from . import bottleneck, bounds, conv_bn_act, stem
from .conv_bn_act import PackedCall, compute_dtype, like_reference, nhwc

CALLS_BEFORE_COMPILING = 4
COMPILED = (torch.float32, torch.bfloat16)
"""Dtypes that nets are compiled for. In fp16 each part's output is checked for overflow."""

_RUN: dict[str, Callable[..., Tensor | Verdict]] = {
    "stem": stem.run,
    "conv_bn_act": conv_bn_act.run,
    "bottleneck": bottleneck.run,
    "basic_block": bottleneck.run,
}
log = logging.getLogger("resnet_fast")
_compiling = ForkSafeLock()  # the switch that lets TorchScript use oneDNN's graph is process-wide


@dataclass
class NetState:
    """The state of one input size of a net: packed parts until the graph is compiled, then the graph.

    ``reaches``: the largest allowed input of some parts, by the part's number (:func:`bounds.stretches`).
    """

    parts: list[PackedCall] | None
    reaches: dict[int, float]
    weights: int  # bytes of one packed copy of all parts
    turn: list[int]  # which of the net's states ran last; all of them share it
    graph: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
    calls: int = 0
    patience: int = -1  # calls to come before it is compiled; counted when first needed
    grown: bool = False  # the graph holds more than the parts did
    fails: bool = False  # compiling was tried and gave nothing
    lock: ForkSafeLock = field(default_factory=ForkSafeLock)


_NEEDED = ("_jit_set_llga_enabled", "_jit_llga_enabled", "_create_graph_by_tracing", "CompilationUnit")


def compile_obstacle() -> str:
    """Return why no net can be compiled now; empty if it can.

    A later torch may lack the private functions of TorchScript, and a user may have switched TorchScript off.
    """
    missing = [name for name in _NEEDED if not hasattr(torch._C, name)]
    if missing:
        return f"expected a torch with {', '.join(missing)}, got {torch.__version__}"
    if not torch.jit._state._enabled:
        return "TorchScript is switched off (PYTORCH_JIT=0)"
    if not torch._C._get_graph_executor_optimize():
        return "TorchScript's optimizations are switched off (torch.jit.optimized_execution)"
    return ""


@cache
def _say_once(reason: str) -> None:
    log.info("nets on oneDNN run part by part, not as one graph: %s", reason)


def prepare(call: NetCall, spec: NetSpec, earlier: list[NetState]) -> NetState:
    """Pack every part. Weights of equal layout are shared with ``earlier`` sizes that still hold them."""
    held = [e.parts for e in earlier if e.parts is not None]
    parts = [
        conv_bn_act.prepare(part._replace(x=call.x), part_spec, [parts[i] for parts in held])
        for i, (part, part_spec) in enumerate(zip(call.parts, spec.parts, strict=True))
    ]
    reaches = bounds.stretches([p.bounds for p in parts])
    parts = [p._replace(reach=reaches.get(i, math.inf)) for i, p in enumerate(parts)]
    return NetState(parts, reaches, conv_bn_act.nbytes(parts), earlier[0].turn if earlier else [0])


def elements(call: NetCall, spec: NetSpec, earlier: list[NetState]) -> int:
    """Return how many weights :func:`prepare` would have to fold and pack."""
    held = [e.parts for e in earlier if e.parts is not None]
    counted: set[Hashable] = set()
    return sum(
        conv_bn_act.elements(part._replace(x=call.x), part_spec, [parts[i] for parts in held], counted)
        for i, (part, part_spec) in enumerate(zip(call.parts, spec.parts, strict=True))
    )


def nbytes(states: list[NetState]) -> int:
    """Return the bytes of packed weights and graphs. A graph holds the folded weights and oneDNN's reordered copy."""
    packed = [folded for state in states for folded in state.parts or ()]
    return conv_bn_act.nbytes(packed) + sum(2 * state.weights for state in states if state.parts is None)


def run(call: NetCall, spec: NetSpec, state: NetState) -> Tensor | Verdict:
    """Return the last block's output."""
    dtype = compute_dtype(call.x.dtype)
    x = nhwc(call.x, dtype)
    # a graph may round otherwise than its parts, and a batch would bring its compilation nearer
    if state.graph is None and not state.fails and dtype in COMPILED and not spec.invariant:
        _try_to_compile(call, x, spec, state)
    parts = state.parts  # another thread may compile and drop them meanwhile
    y: Any = x
    if parts is None:
        assert state.graph is not None
        y = _run_graph(state.graph, state.reaches, x)
    else:
        for part, part_spec, packed in zip(call.parts, spec.parts, parts, strict=True):
            y = _RUN[part.op](part._replace(x=y), part_spec, packed)
            if isinstance(y, Verdict):
                break
    return y if isinstance(y, Verdict) else like_reference(y, call.x.dtype, spec.layout)


def _run_graph(
    graph: Callable[[Tensor], tuple[Tensor, Tensor]], reaches: dict[int, float], x: Tensor
) -> Tensor | Verdict:
    """Return the graph's output, or a refusal if a value in it may have overflowed."""
    first, *later = reaches.values()
    refusal = bounds.verdict((x,), first)
    if refusal is not None:
        return refusal
    y, norms = graph(x)
    # a norm is valid if those before it are within reach
    fits = all(norm <= reach for norm, reach in zip(norms.tolist(), later, strict=True))
    return y if fits else bounds.OVERFLOW


def calls_before_compiling(spec: NetSpec) -> int:
    """Return how many consecutive calls of one size and one set of weights earn the net's compilation."""
    convolutions = len(spec.convs)
    work = packing_budget.of_stock_call(spec.flops(), convolutions)
    earned = packing_budget.earned_by(work, packed=True)
    return max(CALLS_BEFORE_COMPILING, math.ceil(packing_budget.COMPILE * convolutions / earned))


def _try_to_compile(call: NetCall, x: Tensor, spec: NetSpec, state: NetState) -> None:
    """Count a call, and compile after enough of them. While another thread compiles, parts run one by one."""
    reason = compile_obstacle()
    if reason:
        _say_once(reason)
        return
    if not state.lock.acquire(blocking=False):
        return
    try:
        if state.turn[0] != id(state):  # sizes that alternate do not compile: a graph each would take much memory
            state.turn[0] = id(state)
            state.calls = 0
        state.calls += 1
        if state.patience < 0:
            state.patience = calls_before_compiling(spec)
        if state.calls <= state.patience or state.graph is not None or not _compiling.acquire(blocking=False):
            return
        try:
            state.graph = _compile(call, spec, x, [i for i in state.reaches if i > 0])
            state.parts, state.grown = None, True
        except RuntimeError as error:
            state.fails = True
            log.warning("compiling a net for oneDNN failed, its parts run one by one: %s", str(error).splitlines()[0])
        finally:
            _compiling.release()
    finally:
        state.lock.release()


@contextmanager
def _fusing() -> Iterator[None]:
    """Let TorchScript pass subgraphs to oneDNN inside the ``with``."""
    global _switch_before
    _switch_before = torch._C._jit_llga_enabled()
    torch._C._jit_set_llga_enabled(True)
    try:
        yield
    finally:
        _restore_switch()


_switch_before: bool | None = None  # what a compile under way must put back


def _restore_switch() -> None:
    """Restore the switch, also in a child process if its parent was compiling at the fork."""
    global _switch_before
    if _switch_before is not None:
        torch._C._jit_set_llga_enabled(_switch_before)
        _switch_before = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_restore_switch)


class _Convolution(NamedTuple):
    """A folded convolution as plain tensors, which become constants of a trace."""

    weight: Tensor
    bias: Tensor
    conv: Conv

    @staticmethod
    def of(conv: Conv, norm: Norm, dtype: torch.dtype) -> _Convolution:
        weight, bias = (t.to(dtype) for t in folding.fold(conv, norm))
        return _Convolution(weight.contiguous(memory_format=torch.channels_last), bias, conv)

    def __call__(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, *self.conv.numbers())


def _plainly(
    call: NetCall, spec: NetSpec, dtype: torch.dtype, measured: list[int]
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Return the net in ``dtype`` as a function of basic operations, which the graph's patterns match.

    The function returns the output and the norms of the inputs of the parts in ``measured``.
    """
    pairs = [pair for part in call.parts for pair in zip(part.convs, part.norms, strict=True)]
    folded = [_Convolution.of(conv, norm, dtype) for conv, norm in pairs]
    shortcuts = [part.shortcut for part in spec.parts]

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        convs = iter(folded)
        norms = [x.new_empty(0)]
        for i, part in enumerate(call.parts):
            if i in measured:
                norms.append(torch.linalg.vector_norm(x)[None])
            y = x
            for _ in part.main()[:-1]:
                y = torch.relu(next(convs)(y))
            y = next(convs)(y)
            if shortcuts[i] != "none":
                y = y + (next(convs)(x) if part.projection else x)
            y = torch.relu(y) if part.relu else y
            x = F.max_pool2d(y, *part.pool) if part.pool else y
        return x, torch.cat(norms)

    return forward


def _compile(call: NetCall, spec: NetSpec, x: Tensor, measured: list[int]) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Trace and fuse for inputs like ``x``. The executor observes one run and fuses in the next.

    ``torch.jit.trace`` and ``freeze`` add functions to TorchScript's process-wide compilation unit, which never frees
    them or their weights. A separate unit is freed with the graph (docs/notes/derived-weights.md).
    """
    with torch.inference_mode(False), torch.no_grad(), _fusing():
        example = torch.zeros_like(x)  # an inference tensor cannot be traced
        graph, _ = torch._C._create_graph_by_tracing(
            _plainly(call, spec, x.dtype, measured), (example,), lambda _: "", True, False
        )
        run = torch._C.CompilationUnit().create_function("net", graph)
        for _ in range(3):
            run(example)
    return run
