r"""Conv 3x3 + BatchNorm + residual or projection + ReLU as an implicit GEMM: no im2col matrix in memory.

    y[m, co] = relu( sum_rs sum_ci x[n, ho*stride - pad + r*dil, wo*stride - pad + s*dil, ci] * w'[co, r, s, ci]
                     + b'[co] + shortcut[m, co] )                                  m = (n, ho, wo)

    x (N, H, W, Ci)   w' (Co, 3, 3, Ci/groups), BatchNorm folded   b' (Co) fp32   y (N, Ho, Wo, Co)
    shortcut: nothing | residual | the block's 1x1 projection, accumulated into the tile

Saved bytes. As for the 1x1: y is written once, where stock writes it four times and reads it three times. An im2col
matrix would be 9 copies of x; here the nine taps of a pixel hit L1 and L2, and x is read from memory once.

GEMM. gemm_m = N*Ho*Wo, gemm_n = Co/groups, gemm_k = 9*Ci/groups, tap by tap, then channel by channel:

      image rows            K steps of one tile                 for each step one tap (r, s) and BLOCK_K channels:
    h-1  . a b c .        r=0: a a' b b' c c'                  the same pixels of the tile, shifted by (r, s),
    h    . d e f .   ->   r=1: d d' e e' f f'   x  w'          each a run of BLOCK_K channels (16 bytes a lane);
    h+1  . g h i .        r=2: g g' h h' i i'                  a pixel outside the image is masked: zero padding
                                                                costs a compare, not a copy of the image.

The loop over (tap, channel block) is one loop, so that the pipeline never drains between taps. Pixels are
linearised: a tile of 128 may span several images, and nothing is wasted at 7x7 or 56x56.

Split-K as in conv_bn_act_1x1.py: SPLITS programs share a tile's steps over taps and channels.

Numerics: tiles.py. Limits: tuning/configs.py (``verdict``; eight warps run only after a measurement, see there).
Alone: ``TRITON_INTERPRET=1 python -m pytest tests/backends/triton -k 3x3``; timing: ``resnet-fast tune --only
conv_bn_act_3x3``.

Not taken: a 4-d tensor descriptor per tile of rows and columns: power-of-two boxes waste 12.5 % at 56 pixels a side and
24 % at 14 and 7.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...spec import LaunchSpec
from ...tuning.configs import Config
from ...tuning.routes import merged_groups
from .launch import FoldedWeights, common, grid_of, new_output, partial_sums, steps_of, submit
from .tiles import (
    accumulate_1x1,
    finish_tile,
    join_splits,
    multiply,
    pixel_of_row,
    row_offset,
    rows_and_channels,
    steps_of_split,
    tile_of_program,
)


@triton.jit
def accumulate_3x3(
    acc, rows, h, w, row_mask, w_rows, w_mask, first, end, H, W, x_stride_h, x_stride_w,
    CI: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Return acc plus the steps ``first`` to ``end`` of the 9 * ceil(CI / BLOCK_K) over taps and channels.

    ``rows`` point at pixel (h, w), the top left tap; ``w_rows`` at w'[co, 0, 0, 0].
    """
    blocks: tl.constexpr = (CI + BLOCK_K - 1) // BLOCK_K
    for step in range(first, end):
        # tap (r, s) and channels ci of this step
        tap = step // blocks
        ci = (step % blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
        r, s = tap // 3, tap % 3
        # a = x[n, h + r*dil, w + s*dil, ci], zero outside the image
        y_in, x_in = h + r * DIL_H, w + s * DIL_W
        inside = row_mask & (y_in >= 0) & (y_in < H) & (x_in >= 0) & (x_in < W)
        shift = r * DIL_H * x_stride_h + s * DIL_W * x_stride_w
        if CI % BLOCK_K == 0:
            a = tl.load(rows[:, None] + (shift + ci)[None, :], mask=inside[:, None], other=0.0)
            b = tl.load(w_rows[:, None] + (tap * CI + ci)[None, :], mask=w_mask[:, None], other=0.0)
        else:
            a = tl.load(rows[:, None] + (shift + ci)[None, :], mask=inside[:, None] & (ci < CI)[None, :], other=0.0)
            b = tl.load(
                w_rows[:, None] + (tap * CI + ci)[None, :], mask=w_mask[:, None] & (ci < CI)[None, :], other=0.0
            )
        acc = multiply(a, b, acc, PRECISION, UPCAST)
    return acc


@triton.jit(do_not_specialize=["gemm_m", "H", "W", "Ho", "Wo"])
def _conv_bn_act_3x3_fwd_kernel(
    x_ptr, w_ptr, bias_ptr, res_ptr, y_ptr, xp_ptr, wp_ptr, partials_ptr, arrivals_ptr,
    gemm_m, H, W, Ho, Wo, Co, Cp,
    x_stride_n, x_stride_h, x_stride_w, xp_stride_n, xp_stride_h, xp_stride_w,
    CI: tl.constexpr, GEMM_N: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    PROJ: tl.constexpr, PROJ_STRIDE_H: tl.constexpr, PROJ_STRIDE_W: tl.constexpr, PROJ_EVEN_K: tl.constexpr,
    RES: tl.constexpr, RELU: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    # tile (pid_m, pid_n) of group g; CI and GEMM_N count channels per group
    tiles_m, tiles_n = tl.cdiv(gemm_m, BLOCK_M), tl.cdiv(GEMM_N, BLOCK_N)
    pid_m, pid_n = tile_of_program(tl.program_id(0), tiles_m, tiles_n, GROUP_M)
    g = tl.program_id(1)
    m, co, row_mask, co_mask = rows_and_channels(pid_m, pid_n, g, gemm_m, GEMM_N, BLOCK_M, BLOCK_N)

    # the top left tap of each pixel: (n, ho * stride - pad, wo * stride - pad)
    n, ho, wo = pixel_of_row(m, Ho, Wo)
    h, w = ho * STRIDE_H - PAD_H, wo * STRIDE_W - PAD_W
    rows = x_ptr + row_offset(n, x_stride_n) + (h * x_stride_h + w * x_stride_w + g * CI)

    # tile = sum over taps and channels, or over this split's share of them
    first, end = 0, 9 * ((CI + BLOCK_K - 1) // BLOCK_K)
    if SPLITS > 1:
        first, end = steps_of_split(end, SPLITS)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    acc = accumulate_3x3(
        acc, rows, h, w, row_mask, w_ptr + co * (9 * CI), co_mask, first, end, H, W, x_stride_h, x_stride_w,
        CI, DIL_H, DIL_W, BLOCK_K, PRECISION, UPCAST,
    )  # fmt: skip

    # tile += sum over cp of xp[n, ho * pstride, wo * pstride, cp] * wp'[co, cp]
    if PROJ:
        prows = xp_ptr + row_offset(n, xp_stride_n)
        prows += ho * PROJ_STRIDE_H * xp_stride_h + wo * PROJ_STRIDE_W * xp_stride_w
        acc = accumulate_1x1(
            acc, prows, row_mask, wp_ptr + co * Cp, co_mask, 0, Cp, Cp, BLOCK_K, PROJ_EVEN_K, PRECISION, UPCAST
        )

    # y = relu(tile + b' + residual)
    if SPLITS == 1:
        finish_tile(acc, bias_ptr, res_ptr, y_ptr, m, co, row_mask, co_mask, Co, RES, RELU, UPCAST)
    else:
        tile = (g * tiles_m + pid_m) * tiles_n + pid_n
        finishes, acc = join_splits(acc, partials_ptr, arrivals_ptr, tile, SPLITS, BLOCK_M, BLOCK_N)
        if finishes:
            finish_tile(acc, bias_ptr, res_ptr, y_ptr, m, co, row_mask, co_mask, Co, RES, RELU, UPCAST)


def conv_bn_act_3x3(
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
    groups = merged_groups(conv)
    y = new_output(conv, x)
    xp_strides = (0, 0, 0) if xp is None else (xp.stride(0), xp.stride(2), xp.stride(3))
    cp = 0 if proj is None else proj.ci
    submit(
        _conv_bn_act_3x3_fwd_kernel, grid_of(conv, config),
        x, packed.weight, packed.bias, res, y, xp, packed.projection, partial_sums(conv, config, x), arrivals,
        conv.gemm_m, conv.h, conv.w, conv.ho, conv.wo, conv.co, cp,
        x.stride(0), x.stride(2), x.stride(3), *xp_strides,
        CI=conv.ci // groups, GEMM_N=conv.co // groups, **steps_of(conv),
        PROJ=proj is not None, PROJ_STRIDE_H=proj.stride[0] if proj else 1, PROJ_STRIDE_W=proj.stride[1] if proj else 1,
        PROJ_EVEN_K=cp % config.block_k == 0,
        SPLITS=config.splits, GROUP_M=config.group_m, BLOCK_N=config.block_n, **common(spec, config, x.dtype),
    )  # fmt: skip
    return y
