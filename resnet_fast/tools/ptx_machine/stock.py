"""Stock PyTorch on a CPU, with the TF32 products that a GPU would compute.

Kernels hand float32 operands to the tensor cores as they are, and these read the upper 19 bits (csrc/emulator,
``product.h``). The error that stock PyTorch may have is then that of the same operands. A CPU multiplies them in full.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

CONVOLUTIONS = {"aten::conv2d": 2, "aten::convolution": 2, "aten::convolution_backward": 3}
"""Operators that compute products, and how many of their first arguments are operands. Inference mode takes the first
whole, of which others see the second."""


class Tf32Convolutions(TorchDispatchMode):
    """Inside ``with Tf32Convolutions():`` convolutions of float32 tensors drop what a tensor core does not read."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operands = CONVOLUTIONS.get(func._schema.name, 0)
        args = (*map(_cut, args[:operands]), *args[operands:])
        return func(*args, **(kwargs or {}))


def _cut(t: Tensor) -> Tensor:
    """Return a float32 tensor without the lower 13 bits of its elements; any other as it is."""
    return (t.view(torch.int32) & -(1 << 13)).view(torch.float32) if t.dtype == torch.float32 else t
