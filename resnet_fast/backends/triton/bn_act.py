r"""BatchNorm + residual add + ReLU without a convolution, on a dense NHWC tensor seen as rows of C channels.

    y[m, c] = relu( x[m, c] * scale[c] + shift[c] + residual[m, c] )          m = (n, h, w)

Saved bytes: three passes (norm, add, ReLU) read and write the tensor 2 + 3 + 2 times; this reads x and the residual and
writes y once each.

      c ->                       A program owns BLOCK_M x BLOCK_C elements; scale and shift are loaded once per program,
    m  [ . . . . ]  BLOCK_M      16 bytes a lane along c. No reduction, no reuse: the copy bandwidth is the limit.

Numerics: fp32 arithmetic in the order scale, shift, add, ReLU; one rounding at the store. Alone: ``TRITON_INTERPRET=1
python -m pytest tests/backends/triton -k bn_act``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import folding
from ...calls import BnActCall
from ...spec import PointwiseSpec
from .launch import nhwc, upcasts
from .tiles import relu, round_to, row_offset

BLOCK_M, BLOCK_C = 16, 128


@triton.jit(do_not_specialize=["M"])
def _bn_act_fwd_kernel(
    x_ptr, scale_ptr, shift_ptr, res_ptr, y_ptr, M, C,
    RES: tl.constexpr, RELU: tl.constexpr, UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    at = row_offset(m, C)[:, None] + c[None, :]
    mask = (m < M)[:, None] & (c < C)[None, :]
    # y = relu(x * scale + shift + residual)
    y = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    y = (
        y * tl.load(scale_ptr + c, mask=c < C, other=0.0)[None, :]
        + tl.load(shift_ptr + c, mask=c < C, other=0.0)[None, :]
    )
    if RES:
        y += tl.load(res_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if RELU:
        y = relu(y)
    tl.store(y_ptr + at, round_to(y, y_ptr.dtype.element_ty, UPCAST), mask=mask)


def prepare(call: BnActCall, spec: PointwiseSpec, earlier: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """(scale, shift) of the norm, fp32."""
    return earlier[0] if earlier else folding.scale_shift(call.norm, spec.c, call.x.device)


def bn_act(call: BnActCall, spec: PointwiseSpec, state: tuple[Tensor, Tensor]) -> Tensor:
    """act(bn(x) + residual), NHWC."""
    x = nhwc(call.x)
    res = None if call.residual is None else nhwc(call.residual)
    y = torch.empty_like(x)
    rows = spec.n * spec.h * spec.w
    grid = (-(-rows // BLOCK_M), -(-spec.c // BLOCK_C))
    _bn_act_fwd_kernel[grid](
        x, *state, res, y, rows, spec.c, RES=res is not None, RELU=call.relu, UPCAST=upcasts(x.dtype),
        BLOCK_M=BLOCK_M, BLOCK_C=BLOCK_C,
    )  # fmt: skip
    return y
