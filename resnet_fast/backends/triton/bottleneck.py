r"""The tail of a bottleneck in one launch: conv2 3x3 + ReLU, conv3 1x1 + shortcut + ReLU, conv2's output on chip.

    t[m, c]  = relu( conv2'(y1)[m, c] + b2[c] ), rounded to the tensors' dtype          c < Cmid
    y[m, co] = relu( sum_c t[m, c] * w3'[co, c] + b3[co] + shortcut[m, co] )            co < Co = 4 Cmid

    y1 (N, H, W, Cmid)   w2' (Cmid, 3, 3, Cmid)   w3' (Co, Cmid)   y (N, Ho, Wo, Co)
    shortcut: residual (N, Ho, Wo, Co) | xp[prow(m), :] . wp'[co, :]   (the block's projection, fused)

Saved bytes. conv2's output is neither written nor read: at 56x56 with Cmid 64 in 16 bit, 2 * 0.40 MB of the block's
4.82 MB per image. One launch of three is saved too.

GEMM. Two products of the same gemm_m = N*Ho*Wo rows: first gemm_n = Cmid, gemm_k = 9*Cmid, then gemm_n = Co,
gemm_k = Cmid.

     conv2: 9 taps x Cmid            conv3: for each BLOCK_N channels of y
    +----------+  BLOCK_M       t  +----------+   +-------+        one program owns BLOCK_M pixels and ALL of Cmid
    | fp32 acc |  ------------->   | 16 bit,  | x | w3'   |  -->   (BLOCK_C = Cmid rounded up to a power of two), so
    | BLOCK_C  |  relu, round      | shared m.|   |BLOCK_N|  y     that t never leaves the SM. Its tile of y is walked
    +----------+                   +----------+   +-------+        BLOCK_N channels at a time; w3' comes from L2.

Cost. Fewer, larger programs (one per BLOCK_M pixels, not one per tile of Co), and BLOCK_M * BLOCK_C accumulators in
registers, which limits Cmid to 256 (``TAIL_CHANNELS``). At Cmid 512, 32 pixels would fill the register file.

Numerics: tiles.py; t is rounded as if it had been stored. Limits: tuning/configs.py (``verdict``). Alone:
``TRITON_INTERPRET=1 python -m pytest tests/backends/triton -k tail``; timing: ``resnet-fast tune --only bottleneck``.

Not taken: conv1 in the same launch. It needs a halo (10x18 pixels for an 8x16 tile) in addressable shared memory, which
Triton does not have.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...spec import LaunchSpec
from ...tuning.configs import Config, chain_width
from .conv_bn_act_3x3 import accumulate_3x3
from .launch import FoldedWeights, common, new_output, steps_of, submit
from .tiles import accumulate_1x1, finish_tile, multiply, pixel_of_row, relu, round_to, row_offset


@triton.jit(do_not_specialize=["gemm_m", "H", "W", "Ho", "Wo"])
def _bottleneck_tail_fwd_kernel(
    x_ptr, w2_ptr, bias2_ptr, w3_ptr, bias3_ptr, res_ptr, y_ptr, xp_ptr, wp_ptr,
    gemm_m, H, W, Ho, Wo, Co, Cp,
    x_stride_n, x_stride_h, x_stride_w, xp_stride_n, xp_stride_h, xp_stride_w,
    CI: tl.constexpr, CMID: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    PROJ: tl.constexpr, PROJ_STRIDE_H: tl.constexpr, PROJ_STRIDE_W: tl.constexpr, PROJ_EVEN_K: tl.constexpr,
    RES: tl.constexpr, RELU: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # this program's pixels, and all channels between the two convolutions
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.arange(0, BLOCK_C)
    row_mask, c_mask = m < gemm_m, c < CMID
    n, ho, wo = pixel_of_row(m, Ho, Wo)
    h, w = ho * STRIDE_H - PAD_H, wo * STRIDE_W - PAD_W
    rows = x_ptr + row_offset(n, x_stride_n) + (h * x_stride_h + w * x_stride_w)

    # t = relu(conv2'(x) + b2), rounded; channels beyond CMID come out as relu(0 + 0)
    acc = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    acc = accumulate_3x3(
        acc, rows, h, w, row_mask, w2_ptr + c * (9 * CI), c_mask, 0, 9 * ((CI + BLOCK_K - 1) // BLOCK_K),
        H, W, x_stride_h, x_stride_w, CI, DIL_H, DIL_W, BLOCK_K, PRECISION, UPCAST,
    )  # fmt: skip
    acc += tl.load(bias2_ptr + c, mask=c_mask, other=0.0)[None, :]
    t = round_to(relu(acc), x_ptr.dtype.element_ty, UPCAST)

    if PROJ:
        prows = xp_ptr + row_offset(n, xp_stride_n)
        prows += ho * PROJ_STRIDE_H * xp_stride_h + wo * PROJ_STRIDE_W * xp_stride_w
    for start in range(0, Co, BLOCK_N):
        # tile = t @ w3'[co, :].T
        co = start + tl.arange(0, BLOCK_N)
        co_mask = co < Co
        b = tl.load(w3_ptr + co[:, None] * CMID + c[None, :], mask=co_mask[:, None] & c_mask[None, :], other=0.0)
        tile = multiply(t, b, tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32), PRECISION, UPCAST)
        # tile += xp[prow(m), :] @ wp'[co, :].T
        if PROJ:
            tile = accumulate_1x1(
                tile, prows, row_mask, wp_ptr + co * Cp, co_mask, 0, Cp, Cp, BLOCK_K, PROJ_EVEN_K, PRECISION, UPCAST
            )
        # y = relu(tile + b3 + residual)
        finish_tile(tile, bias3_ptr, res_ptr, y_ptr, m, co, row_mask, co_mask, Co, RES, RELU, UPCAST)


def bottleneck(
    spec: LaunchSpec, config: Config, packed: FoldedWeights, x: Tensor, res: Tensor | None, xp: Tensor | None
) -> Tensor:
    """Launch the kernel.

    Args:
        spec: the launch.
        config: its tiles.
        packed: its weights.
        x: conv1's output, NHWC with dense rows.
        res: the residual, dense NHWC, or None.
        xp: the projection's input, NHWC with dense rows, or None.

    Returns:
        y, dense NHWC.
    """
    conv2, conv3, proj = spec.first, spec.last, spec.projection
    y = new_output(conv3, x)
    xp_strides = (0, 0, 0) if xp is None else (xp.stride(0), xp.stride(2), xp.stride(3))
    cp = 0 if proj is None else proj.ci
    submit(
        _bottleneck_tail_fwd_kernel, (-(-conv3.gemm_m // config.block_m),),
        x, packed.inner, packed.inner_bias, packed.weight, packed.bias, res, y, xp, packed.projection,
        conv3.gemm_m, conv2.h, conv2.w, conv2.ho, conv2.wo, conv3.co, cp,
        x.stride(0), x.stride(2), x.stride(3), *xp_strides,
        CI=conv2.ci, CMID=conv2.co, **steps_of(conv2),
        PROJ=proj is not None, PROJ_STRIDE_H=proj.stride[0] if proj else 1, PROJ_STRIDE_W=proj.stride[1] if proj else 1,
        PROJ_EVEN_K=cp % config.block_k == 0,
        BLOCK_N=config.block_n, BLOCK_C=chain_width(spec), **common(spec, config, x.dtype),
    )  # fmt: skip
    return y
