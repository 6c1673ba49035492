r"""Conv 1x1 + BatchNorm + residual or projection + ReLU as one matrix product.

    y[m, co] = relu( sum_ci x[row(m), ci] * w'[co, ci]  +  b'[co]  +  shortcut[m, co] )
    w' = scale * w,  b' = shift + scale * b      (BatchNorm folded in fp32, w' rounded once; folding.py)

    x (N, H, W, Ci)   w' (Co, Ci)   b' (Co) fp32   y (N, Ho, Wo, Co)
    shortcut: nothing | residual (N, Ho, Wo, Co) | xp[prow(m), :] . wp'[co, :]   (the block's projection, fused)

Saved bytes. Stock runs conv, BN, add and ReLU as up to four kernels: y is written 4 times and read 3 times. Here it is
written once. Fusing the projection into conv3 of a stage's first block saves two more passes over y (the projection is
written, then read by the add): 256 channels at 56x56 in 16 bit are 3.2 MB per image -> 0.

GEMM. gemm_m = N*Ho*Wo pixels, gemm_n = Co, gemm_k = Ci; K runs fastest in both operands ("TN").

                 gemm_k ->                     one program: BLOCK_M pixels x BLOCK_N channels
              +---+---+---+                    each K step loads BLOCK_M x BLOCK_K of x (whole channel runs of
    pixels    | x | x | x |  BLOCK_M           neighbouring pixels, 16 bytes a lane) and BLOCK_N x BLOCK_K of w',
              +---+---+---+        +-------+   NUM_STAGES steps ahead, and multiplies them into fp32 registers;
    channels  | w'| w'| w'| BLOCK_N| y tile|   after the last step (and the projection's) the tile is finished
              +---+---+---+        +-------+   in registers and stored once.

Split-K. A batch of one has fewer tiles than the GPU has multiprocessors, each a long chain of K steps. SPLITS programs
then share a tile's steps, and the last of them to arrive adds their sums (tiles.py, ``join_splits``).

Two kernels, which differ in their loads. ``pointer``: any stride and size, cp.async on sm_80 and later. ``descriptor``:
x and w' as 2-d tensor descriptors (the bulk copy engine of sm_90 and later: one thread issues a tile, without address
registers); it needs stride 1, dense rows and channel runs of a multiple of 16 bytes.

Numerics: tiles.py. Limits: tuning/configs.py (``verdict``). Alone: ``TRITON_INTERPRET=1 python -m pytest
tests/backends/triton -k 1x1``; timing: ``resnet-fast tune --only conv_bn_act_1x1``.

Not taken: w' stored as (Ci, Co), which avoids the transpose. TF32 on sm_90 reads both operands K-major only, and 16-bit
operands of either order need the same number of instructions (HGMMA, counted in SASS).
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ...spec import LaunchSpec
from ...tuning.configs import Config
from .launch import FoldedWeights, address_of, common, described, grid_of, new_output, partial_sums, submit
from .tiles import (
    accumulate_1x1,
    finish_tile,
    join_splits,
    multiply,
    pixel_of_row,
    row_offset,
    steps_of_split,
    tile_of_program,
)


@triton.jit(do_not_specialize=["gemm_m", "Ho", "Wo"])
def _conv_bn_act_1x1_fwd_kernel(
    x_ptr, w_ptr, bias_ptr, res_ptr, y_ptr, xp_ptr, wp_ptr, partials_ptr, arrivals_ptr,
    gemm_m, Ho, Wo, Ci, Co, Cp,
    x_stride_n, x_stride_h, x_stride_w, xp_stride_n, xp_stride_h, xp_stride_w,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, DENSE: tl.constexpr,
    PROJ: tl.constexpr, PROJ_STRIDE_H: tl.constexpr, PROJ_STRIDE_W: tl.constexpr,
    RES: tl.constexpr, RELU: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    # tile (pid_m, pid_n) of y
    tiles_m, tiles_n = tl.cdiv(gemm_m, BLOCK_M), tl.cdiv(Co, BLOCK_N)
    pid_m, pid_n = tile_of_program(tl.program_id(0), tiles_m, tiles_n, GROUP_M)
    m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    co = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask, co_mask = m < gemm_m, co < Co
    n, ho, wo = pixel_of_row(m, Ho, Wo)

    # row(m): pixel (n, ho * stride, wo * stride) of x; the same pixel m where nothing is skipped
    if DENSE:
        rows = x_ptr + row_offset(m, Ci)
    else:
        rows = x_ptr + row_offset(n, x_stride_n) + (ho * STRIDE_H * x_stride_h + wo * STRIDE_W * x_stride_w)

    # tile = sum over ci of x[row(m), ci] * w'[co, ci], or over this split's share of ci
    first, end = 0, Ci
    if SPLITS > 1:
        first, end = steps_of_split(tl.cdiv(Ci, BLOCK_K), SPLITS)
        first, end = first * BLOCK_K, min(end * BLOCK_K, Ci)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    acc = accumulate_1x1(
        acc, rows, row_mask, w_ptr + co * Ci, co_mask, first, end, Ci, BLOCK_K, EVEN_K, PRECISION, UPCAST
    )

    # tile += sum over cp of xp[prow(m), cp] * wp'[co, cp]
    if PROJ:
        prows = xp_ptr + row_offset(n, xp_stride_n)
        prows += ho * PROJ_STRIDE_H * xp_stride_h + wo * PROJ_STRIDE_W * xp_stride_w
        acc = accumulate_1x1(
            acc, prows, row_mask, wp_ptr + co * Cp, co_mask, 0, Cp, Cp, BLOCK_K, EVEN_K, PRECISION, UPCAST
        )

    # y = relu(tile + b' + residual)
    if SPLITS == 1:
        finish_tile(acc, bias_ptr, res_ptr, y_ptr, m, co, row_mask, co_mask, Co, RES, RELU, UPCAST)
    else:
        tile = pid_m * tiles_n + pid_n
        finishes, acc = join_splits(acc, partials_ptr, arrivals_ptr, tile, SPLITS, BLOCK_M, BLOCK_N)
        if finishes:
            finish_tile(acc, bias_ptr, res_ptr, y_ptr, m, co, row_mask, co_mask, Co, RES, RELU, UPCAST)


@triton.jit(do_not_specialize=["gemm_m"])
def _conv_bn_act_1x1_descriptor_fwd_kernel(
    x_desc, w_desc, bias_ptr, res_ptr, y_ptr, gemm_m, Ci, Co,
    RES: tl.constexpr, RELU: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    # tile (pid_m, pid_n) of y
    tiles_m, tiles_n = tl.cdiv(gemm_m, BLOCK_M), tl.cdiv(Co, BLOCK_N)
    pid_m, pid_n = tile_of_program(tl.program_id(0), tiles_m, tiles_n, GROUP_M)

    # tile = sum over ci of x[m, ci] * w'[co, ci]; beyond the edges the copy engine fills zeros
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, Ci, BLOCK_K):
        a = x_desc.load([pid_m * BLOCK_M, k])
        b = w_desc.load([pid_n * BLOCK_N, k])
        acc = multiply(a, b, acc, PRECISION, UPCAST)

    # y = relu(tile + b' + residual)
    m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    co = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    finish_tile(acc, bias_ptr, res_ptr, y_ptr, m, co, m < gemm_m, co < Co, Co, RES, RELU, UPCAST)


def conv_bn_act_1x1(
    spec: LaunchSpec,
    config: Config,
    packed: FoldedWeights,
    x: Tensor,
    res: Tensor | None,
    xp: Tensor | None,
    arrivals: Tensor | None = None,
) -> Tensor:
    """Launch the kernel.

    Args:
        spec: the launch.
        config: its tiles.
        packed: its weights.
        x: NHWC with dense rows.
        res: the residual, dense NHWC, or None.
        xp: the projection's input, NHWC with dense rows, or None.
        arrivals: for ``config.splits`` above 1, zeros of :func:`~.launch.arrivals`; they are zeros again afterwards.

    Returns:
        y, dense NHWC.
    """
    conv, proj = spec.last, spec.projection
    y = new_output(conv, x)
    shared: dict[str, Any] = common(spec, config, x.dtype) | {"GROUP_M": config.group_m, "BLOCK_N": config.block_n}
    grid = grid_of(conv, config)
    dense = conv.stride == (1, 1) and (conv.n == 1 or x.stride(0) == conv.h * conv.w * conv.ci)
    # gaps between images, or a base that is not 16-byte aligned: the pointer kernel, with the same tiles
    if config.descriptors and dense and address_of(x) % 16 == 0:
        x_desc = described(x, (conv.gemm_m, conv.ci), (config.block_m, config.block_k))
        w_desc = described(packed.weight, (conv.co, conv.ci), (config.block_n, config.block_k))
        submit(
            _conv_bn_act_1x1_descriptor_fwd_kernel, grid,
            x_desc, w_desc, packed.bias, res, y, conv.gemm_m, conv.ci, conv.co, **shared,
        )  # fmt: skip
        return y
    xp_strides = (0, 0, 0) if xp is None else (xp.stride(0), xp.stride(2), xp.stride(3))
    cp = 0 if proj is None else proj.ci
    submit(
        _conv_bn_act_1x1_fwd_kernel, grid,
        x, packed.weight, packed.bias, res, y, xp, packed.projection, partial_sums(conv, config, x), arrivals,
        conv.gemm_m, conv.ho, conv.wo, conv.ci, conv.co, cp,
        x.stride(0), x.stride(2), x.stride(3), *xp_strides,
        STRIDE_H=conv.stride[0], STRIDE_W=conv.stride[1], DENSE=dense,
        PROJ=proj is not None, PROJ_STRIDE_H=proj.stride[0] if proj else 1, PROJ_STRIDE_W=proj.stride[1] if proj else 1,
        EVEN_K=conv.ci % config.block_k == 0 and cp % config.block_k == 0,
        SPLITS=config.splits, **shared,
    )  # fmt: skip
    return y
