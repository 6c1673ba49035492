"""What every launcher of this backend needs: packed parameters, the grid, the arguments that all kernels share."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ...spec import ConvSpec, LaunchSpec
from ...tuning.configs import Config
from ...tuning.routes import merged_groups
from ..layouts import nhwc as nhwc
from . import interpreter

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Does this process run kernels in Triton's interpreter? Triton decides it when a kernel is defined."""

if INTERPRETED:
    interpreter.repair()


class FoldedWeights(NamedTuple):
    """A launch's parameters with BatchNorm folded: weights (Co, R, S, Ci/groups) dense, biases (Co) fp32.

    For PyTorch's own kernels ``bias`` comes in the weight's dtype. ``inner``: the chain's first convolution where there
    are two; ``projection``: its weight (Co, Cp), whose bias is part of ``bias``.
    """

    weight: Tensor
    bias: Tensor
    inner: Tensor | None = None
    inner_bias: Tensor | None = None
    projection: Tensor | None = None


def grid_of(conv: ConvSpec, config: Config) -> tuple[int, int]:
    """Tiles of one group, groups."""
    groups = merged_groups(conv)
    return (-(-conv.gemm_m // config.block_m)) * (-(-(conv.co // groups) // config.block_n)), groups


def empty_nhwc(x: Tensor, n: int, c: int, h: int, w: int) -> Tensor:
    """An uninitialised (n, c, h, w) like ``x``, dense NHWC; not a view, which autograd lets nobody change in place."""
    return torch.empty((n, c, h, w), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def new_output(conv: ConvSpec, x: Tensor) -> Tensor:
    """An uninitialised (N, Co, Ho, Wo) in dense NHWC: a convolution's output before any pooling."""
    return empty_nhwc(x, conv.n, conv.co, conv.ho, conv.wo)


def upcasts(dtype: torch.dtype) -> bool:
    """Does this process need the kernels' detour around the interpreter's bfloat16?"""
    return INTERPRETED and dtype == torch.bfloat16


def product(conv: ConvSpec, config: Config, dtype: torch.dtype) -> dict[str, Any]:
    """The keyword arguments that every kernel with products takes: how they round, and the tiles."""
    arguments: dict[str, Any] = {
        "PRECISION": "tf32" if conv.tf32 else "ieee",
        "UPCAST": upcasts(dtype),
        "BLOCK_M": config.block_m,
        "BLOCK_K": config.block_k,
    }
    if not INTERPRETED:
        arguments |= {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return arguments


def common(spec: LaunchSpec, config: Config, dtype: torch.dtype) -> dict[str, Any]:
    """The keyword arguments that every convolution kernel of inference takes."""
    return {"RES": spec.residual, "RELU": spec.last.epilogue.relu, **product(spec.last, config, dtype)}


def steps_of(conv: ConvSpec) -> dict[str, int]:
    """Strides, padding and dilation as the keyword arguments of a kernel."""
    (sh, sw), (ph, pw), (dh, dw) = conv.stride, conv.padding, conv.dilation
    return {"STRIDE_H": sh, "STRIDE_W": sw, "PAD_H": ph, "PAD_W": pw, "DIL_H": dh, "DIL_W": dw}


def alignment(itemsize: int, *starts: int) -> int:
    """16 if every one of ``starts`` (addresses and distances in bytes) lies on a 16-byte word, else ``itemsize``.

    For a kernel whose loads choose between two places: the compiler does not see the alignment through the choice.
    """
    return 16 if all(start % 16 == 0 for start in starts) else itemsize


def described(t: Tensor, shape: tuple[int, int], block: tuple[int, int]) -> Any:
    """A tensor descriptor over ``t`` seen as a dense matrix of ``shape``."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(t, list(shape), [shape[1], 1], list(block))
