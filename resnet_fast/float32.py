"""Read PyTorch's switch for float32 convolutions on a GPU: TF32 products or exact ones.

Stock convolutions obey the precision of cuDNN's convolutions: ``torch.backends.cudnn.conv.fp32_precision``, which
``torch.backends.cudnn.allow_tf32`` sets too, and which falls back on ``torch.backends.cudnn.fp32_precision`` and
``torch.backends.fp32_precision``. The default is TF32. ``torch.set_float32_matmul_precision`` is for matrix products
alone. Our kernels obey the same switch. On a CPU it means nothing.
"""

from __future__ import annotations

import os
import warnings

import torch

from . import flags, stand_in


def products_are_tf32() -> bool:
    """Return whether float32 convolutions on a GPU may round their operands to TF32 (10 mantissa bits)."""
    precision: str = torch._C._get_fp32_precision_getter("cuda", "conv")
    return precision == "tf32"


def rounds(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether the products of a convolution of ``dtype`` on ``device`` are TF32.

    A call on ``meta`` is planned for a GPU. On a CPU a stand-in for one decides.
    """
    if device.type == "cpu":
        machine = stand_in.present()
        return machine is not None and machine.tf32 and dtype == torch.float32
    return dtype == torch.float32 and device.type in ("cuda", "meta") and products_are_tf32()


def warn_of_removed() -> None:
    """Warn of variables that no longer decide anything."""
    for name, instead in flags.REMOVED.items():
        if name in os.environ:
            warnings.warn(f"{name} has no effect: {instead}", RuntimeWarning, stacklevel=2)


warn_of_removed()
