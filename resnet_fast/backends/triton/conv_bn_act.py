r"""Any convolution + BatchNorm + residual + ReLU as an implicit GEMM: the kernel for all that is not 1x1 or 3x3.

    y[m, co] = relu( sum_k x[pixel(m, k), channel(k)] * w'[co, k] + b'[co] + residual[m, co] )
    k = ((r * S) + s) * Ci/groups + ci          pixel(m, k) = (n, ho*stride - pad + r*dil, wo*stride - pad + s*dil)

    x (N, H, W, Ci)   w' (Co, R, S, Ci/groups), BatchNorm folded   b' (Co) fp32   y (N, Ho, Wo, Co)

For filters other than 1x1 and 3x3, few input channels (an image's 3), padded 1x1, and groups. Saved bytes as in
conv_bn_act_3x3.py: one read of x, one write of y, no im2col matrix.

GEMM. gemm_m = N*Ho*Wo, gemm_n = Co/groups, gemm_k = R*S*Ci/groups as ONE axis: a K step of 32 holds ten pixels of a
three-channel image, where a step per tap would hold 3 channels and 13 zeros.

      k ->    r0s0      r0s1      r0s2   ...             lane (m, k) finds its own tap (r, s) and channel by division
            | R G B | R G B | R G B | ..|                by constants; neighbours in k are neighbours in memory up to
    m  ->   one window of the image, row after row       the end of a filter row, then jump to the next image row.

Groups are the second axis of the grid. Groups of few channels are merged (tuning/routes.py: ``merged_groups``) into
groups of at least 16, with a block-diagonal filter.

Numerics: tiles.py. Limits: tuning/configs.py (``verdict``). Alone: ``TRITON_INTERPRET=1 python -m pytest
tests/backends/triton -k general``; timing: ``resnet-fast tune --only conv_bn_act``.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...spec import LaunchSpec
from ...tuning.configs import Config
from ...tuning.routes import merged_groups
from .launch import FoldedWeights, common, grid_of, new_output, steps_of, submit
from .tiles import finish_tile, multiply, pixel_of_row, row_offset, rows_and_channels, tile_of_program


@triton.jit
def accumulate_window(
    acc, rows, h, w, row_mask, w_rows, w_mask, H, W, x_stride_h, x_stride_w, x_stride_c,
    CI: tl.constexpr, R: tl.constexpr, S: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Return acc plus the window that starts at pixel (h, w), where ``rows`` point; k runs over taps and channels."""
    for start in range(0, R * S * CI, BLOCK_K):
        # k -> (r, s, ci)
        k = start + tl.arange(0, BLOCK_K)
        r, s, ci = k // (S * CI), (k // CI) % S, k % CI
        # a = x[n, h + r*dil, w + s*dil, ci], zero outside the image and after the last k
        y_in, x_in = h[:, None] + (r * DIL_H)[None, :], w[:, None] + (s * DIL_W)[None, :]
        inside = row_mask[:, None] & (y_in >= 0) & (y_in < H) & (x_in >= 0) & (x_in < W)
        real = k < R * S * CI
        shift = r * DIL_H * x_stride_h + s * DIL_W * x_stride_w + ci * x_stride_c
        a = tl.load(rows[:, None] + shift[None, :], mask=inside & real[None, :], other=0.0)
        b = tl.load(w_rows[:, None] + k[None, :], mask=w_mask[:, None] & real[None, :], other=0.0)
        acc = multiply(a, b, acc, PRECISION, UPCAST)
    return acc


@triton.jit(do_not_specialize=["gemm_m", "H", "W", "Ho", "Wo"])
def _conv_bn_act_fwd_kernel(
    x_ptr, w_ptr, bias_ptr, res_ptr, y_ptr,
    gemm_m, H, W, Ho, Wo, Co, x_stride_n, x_stride_h, x_stride_w,
    CI: tl.constexpr, GEMM_N: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    RES: tl.constexpr, RELU: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    # tile (pid_m, pid_n) of group g; CI and GEMM_N count channels per group
    tiles_m, tiles_n = tl.cdiv(gemm_m, BLOCK_M), tl.cdiv(GEMM_N, BLOCK_N)
    pid_m, pid_n = tile_of_program(tl.program_id(0), tiles_m, tiles_n, GROUP_M)
    g = tl.program_id(1)
    m, co, row_mask, co_mask = rows_and_channels(pid_m, pid_n, g, gemm_m, GEMM_N, BLOCK_M, BLOCK_N)

    # where each pixel's window starts
    n, ho, wo = pixel_of_row(m, Ho, Wo)
    h, w = ho * STRIDE_H - PAD_H, wo * STRIDE_W - PAD_W
    rows = x_ptr + row_offset(n, x_stride_n) + (h * x_stride_h + w * x_stride_w + g * CI)

    # tile = sum over the window
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    acc = accumulate_window(
        acc, rows, h, w, row_mask, w_ptr + co * (R * S * CI), co_mask, H, W, x_stride_h, x_stride_w, 1,
        CI, R, S, DIL_H, DIL_W, BLOCK_K, PRECISION, UPCAST,
    )  # fmt: skip

    # y = relu(tile + b' + residual)
    finish_tile(acc, bias_ptr, res_ptr, y_ptr, m, co, row_mask, co_mask, Co, RES, RELU, UPCAST)


def conv_bn_act(
    spec: LaunchSpec, config: Config, packed: FoldedWeights, x: Tensor, res: Tensor | None, xp: Tensor | None
) -> Tensor:
    """Launch the kernel.

    Args:
        spec: the launch.
        config: its tiles.
        packed: its weights.
        x: NHWC with dense rows.
        res: the residual, dense NHWC, or None.
        xp: unused; every launcher has the same signature.

    Returns:
        y, dense NHWC.
    """
    conv = spec.last
    groups = merged_groups(conv)
    y = new_output(conv, x)
    submit(
        _conv_bn_act_fwd_kernel, grid_of(conv, config),
        x, packed.weight, packed.bias, res, y,
        conv.gemm_m, conv.h, conv.w, conv.ho, conv.wo, conv.co, x.stride(0), x.stride(2), x.stride(3),
        CI=conv.ci // groups, GEMM_N=conv.co // groups, R=conv.r, S=conv.s, **steps_of(conv),
        GROUP_M=config.group_m, BLOCK_N=config.block_n, **common(spec, config, x.dtype),
    )  # fmt: skip
    return y
