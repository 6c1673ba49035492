"""Parts shared by all launchers of this backend: folded weights, the grid, and common kernel arguments."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...spec import ConvSpec, LaunchSpec
from ...tuning.configs import Config
from ...tuning.routes import merged_groups
from ..layouts import nhwc as nhwc
from . import interpreter
from .fences import with_fences

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether this process runs kernels in Triton's interpreter; Triton decides it when a kernel is defined."""

if INTERPRETED:
    interpreter.repair()
    interpreter.quicken()


ZEROS = 128
"""Counters that a program sets to zero."""


class FoldedWeights(NamedTuple):
    """A launch's parameters with BatchNorm folded: dense weights (Co, R, S, Ci/groups) and fp32 biases (Co,).

    Attributes:
        weight, bias: of the last convolution. For PyTorch's own kernels the bias has the weight's dtype.
        inner, inner_bias: of a chain's first convolution.
        projection: the projection's weight (Co, Cp); its bias is part of ``bias``.
    """

    weight: Tensor
    bias: Tensor
    inner: Tensor | None = None
    inner_bias: Tensor | None = None
    projection: Tensor | None = None


class Launched(NamedTuple):
    """A launch that was recorded and not made. ``tile``: the convolution and config of a kernel with products."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    tile: tuple[ConvSpec, Config] | None


@dataclass
class Recording:
    """The launches of one :func:`recording`. ``tile`` belongs to the next of them."""

    launches: list[Launched] = field(default_factory=list)
    tile: tuple[ConvSpec, Config] | None = None

    def add(self, kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
        """Record a launch."""
        self.launches.append(Launched(kernel, grid, arguments, constants, self.tile))
        self.tile = None


_recording: ContextVar[Recording | None] = ContextVar("resnet_fast_triton_recording", default=None)


@contextmanager
def recording() -> Iterator[list[Launched]]:
    """Record what this thread submits inside the ``with`` instead of launching it. Tensors may be on ``meta``."""
    found = Recording()
    before = _recording.set(found)
    try:
        yield found.launches
    finally:
        _recording.reset(before)


@with_fences
def submit(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Launch a kernel of this backend on the current stream; no kernel is launched in another way.

    Args:
        kernel: a ``triton.jit`` function.
        grid: programs along each axis.
        arguments: its arguments in order.
        constants: its compile-time arguments and the options of the launch.
    """
    recorded = _recording.get()
    if recorded is None:
        kernel[grid](*arguments, **constants)
    else:
        recorded.add(kernel, grid, arguments, constants)


def grid_of(conv: ConvSpec, config: Config) -> tuple[int, int, int]:
    """Return (tiles of one group, groups, splits)."""
    groups = merged_groups(conv)
    tiles = (-(-conv.gemm_m // config.block_m)) * (-(-(conv.co // groups) // config.block_n))
    return tiles, groups, config.splits


def partial_sums(conv: ConvSpec, config: Config, x: Tensor) -> Tensor | None:
    """Return uninitialised memory for the sums of a split-K launch, None for a launch without splits."""
    if config.splits == 1:
        return None
    tiles, groups, splits = grid_of(conv, config)
    return x.new_empty((tiles * groups, splits, config.block_m, config.block_n), dtype=torch.float32)


@triton.jit
def _zero_kernel(out_ptr, SIZE: tl.constexpr):
    tl.store(out_ptr + tl.program_id(0) * SIZE + tl.arange(0, SIZE), 0)


def arrivals(launches: Iterable[tuple[LaunchSpec, Config]], x: Tensor) -> Tensor | None:
    """Return zeros (int32), one per tile of the largest split-K launch; None if no launch splits its K steps.

    Each launch leaves them zero, so launches one after another share them. Every call gets its own, because launches of
    other streams may run at the same time.
    """
    counts = [prod(grid_of(launch.last, c)[:2]) for launch, c in launches if c.splits > 1]
    if not counts:
        return None
    programs = -(-max(counts) // ZEROS)
    zeros = x.new_empty(programs * ZEROS, dtype=torch.int32)
    submit(_zero_kernel, (programs,), zeros, SIZE=ZEROS)
    return zeros


def empty_nhwc(x: Tensor, n: int, c: int, h: int, w: int) -> Tensor:
    """Return an uninitialised (n, c, h, w) like ``x``, dense NHWC.

    It is no view, because autograd forbids to change some views in place.
    """
    return torch.empty((n, c, h, w), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def new_output(conv: ConvSpec, x: Tensor) -> Tensor:
    """Return an uninitialised (N, Co, Ho, Wo) in dense NHWC: a convolution's output before any pooling."""
    return empty_nhwc(x, conv.n, conv.co, conv.ho, conv.wo)


def upcasts(dtype: torch.dtype) -> bool:
    """Return whether kernels must work around the interpreter's bfloat16, see tiles.py."""
    return INTERPRETED and dtype == torch.bfloat16


def product(conv: ConvSpec, config: Config, dtype: torch.dtype) -> dict[str, Any]:
    """Return the keyword arguments of every kernel with products: how they round, and the tiles."""
    recorded = _recording.get()
    if recorded is not None:
        recorded.tile = conv, config
    arguments: dict[str, Any] = {
        "PRECISION": "tf32" if conv.tf32 else "ieee",
        "UPCAST": upcasts(dtype),
        "BLOCK_M": config.block_m,
        "BLOCK_K": config.block_k,
    }
    if not INTERPRETED:
        arguments |= {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return arguments


def at_most(registers: int) -> dict[str, Any]:
    """Return the keyword arguments of a kernel that is compiled for up to ``registers`` per thread."""
    return {} if INTERPRETED else {"maxnreg": registers}


def common(spec: LaunchSpec, config: Config, dtype: torch.dtype) -> dict[str, Any]:
    """Return the keyword arguments of every convolution kernel of inference."""
    return {"RES": spec.residual, "RELU": spec.last.epilogue.relu, **product(spec.last, config, dtype)}


def steps_of(conv: ConvSpec) -> dict[str, int]:
    """Return strides, padding and dilation as keyword arguments of a kernel."""
    (sh, sw), (ph, pw), (dh, dw) = conv.stride, conv.padding, conv.dilation
    return {"STRIDE_H": sh, "STRIDE_W": sw, "PAD_H": ph, "PAD_W": pw, "DIL_H": dh, "DIL_W": dw}


def address_of(t: Tensor) -> int:
    """Return the address of ``t``; on ``meta``, where nothing has one, its distance from the start of its memory."""
    return int(t.storage_offset()) * t.element_size() if t.is_meta else t.data_ptr()


def alignment(itemsize: int, *starts: int) -> int:
    """Return 16 if every one of ``starts`` (addresses and distances in bytes) is divisible by 16, else ``itemsize``.

    Kernels whose loads select between two addresses need it: the compiler does not see the alignment after the select.
    """
    return 16 if all(start % 16 == 0 for start in starts) else itemsize


def described(t: Tensor, shape: tuple[int, int], block: tuple[int, int]) -> Any:
    """Return a tensor descriptor of ``t`` as a dense matrix of ``shape``."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(t, list(shape), [shape[1], 1], list(block))
