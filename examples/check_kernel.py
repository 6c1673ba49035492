"""Write a Triton kernel, and check it as this package checks its own: against float64 and stock's own error.

    python examples/check_kernel.py [--tiny]

It is the epilogue of a fused block: norm, add and ReLU in one pass, ``y = relu(x * scale + shift + residual)``. Without
a GPU, Triton's interpreter runs it.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported, which decides it

import triton
import triton.language as tl
from torch import Tensor

from resnet_fast import numerics


@triton.jit
def norm_add_relu(x_ptr, scale_ptr, shift_ptr, residual_ptr, y_ptr, rows, C: tl.constexpr, ROWS: tl.constexpr):
    """One program takes ROWS pixels of all C channels, which are contiguous (NHWC)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, C)
    at = row[:, None] * C + channel[None, :]
    inside = (row < rows)[:, None]
    scale, shift = tl.load(scale_ptr + channel)[None, :], tl.load(shift_ptr + channel)[None, :]
    x = tl.load(x_ptr + at, mask=inside).to(tl.float32)  # 16-bit in memory, fp32 in registers
    y = x * scale + shift + tl.load(residual_ptr + at, mask=inside).to(tl.float32)
    y = tl.where(y < 0, 0.0, y)  # not tl.maximum(y, 0): NaN stays NaN, as in torch.relu
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


def ours(x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor) -> Tensor:
    """Run the kernel on ``x``, ``residual`` (pixels, C) and fp32 ``scale``, ``shift`` (C,); C is a power of two."""
    rows, channels = x.shape
    y = torch.empty_like(x)
    norm_add_relu[(triton.cdiv(rows, 32),)](x, scale, shift, residual, y, rows, C=channels, ROWS=32)
    return y


def stock(x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor) -> Tensor:
    """Compute the same as separate layers do: each result is rounded to x's dtype."""
    return torch.relu((x * scale.to(x.dtype) + shift.to(x.dtype)) + residual)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="one image of 7 x 7 pixels, for a quick try")
    pixels = 7 * 7 if parser.parse_args(arguments).tiny else 4 * 28 * 28

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for dtype in (torch.float32, torch.float16):
        x, residual = (torch.randn(pixels, 64, device=device).to(dtype) for _ in range(2))
        x[0, 0] = torch.nan
        scale, shift = torch.rand(64, device=device) + 0.5, torch.randn(64, device=device)
        given = (x, scale, shift, residual)
        reference = torch.relu(x.double() * scale.double() + shift.double() + residual.double())
        # Raises if the error is more than twice stock's own, or if one side alone is NaN.
        report = numerics.assert_close(ours(*given), reference, stock(*given), gemm_k=1)
        print(f"{dtype}: {report}")


if __name__ == "__main__":
    main()
