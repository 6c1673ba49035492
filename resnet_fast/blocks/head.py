"""What follows the last stage of a net, pooling and classifier, in batch-invariant mode.

PyTorch's matrix product, and its mean on a GPU, add in an order that the batch decides. In the mode

* a backend that gets one image at a time has a head that does the same: the net's own layers on one image;
* for a backend that runs whole batches alike, the average is a sum by halves, six additions of whole tensors for 7x7
  pixels, and the classifier is the op ``conv_bn_act``, a 1x1 convolution on that backend:

      x (N, C, H W) -> x[..., :h] + x[..., h:] -> ... -> (N, C) / (H W) -> w . x + b

  An addition of whole tensors rounds each element by itself, so no order is left to choose. Two launches per image,
  which the layers one image at a time would take, are as long as the rest of a large batch.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .. import invariance, ops
from ..calls import Call, Conv, Norm
from ..dispatch import select
from ..errors import UserError
from .children import child
from .obstacles import is_altered


def refuse_compiler() -> None:
    """Raise in batch-invariant mode, because a compiler would choose the head's kernels by the batch.

    Raises:
        UserError: the mode is on.
    """
    if invariance.is_on():
        raise UserError(
            "a net that runs eagerly in batch-invariant mode",
            "torch.compile, which chooses kernels by the batch",
            f"call the net itself; to compile it, {invariance.TODO}",
        )


def run(net: Any, x: Tensor) -> Tensor:
    """Return ``net.head_forward(x)``; in batch-invariant mode, each image alike in any batch.

    Args:
        net: an accelerated net.
        x: the last stage's output (N, C, H, W).

    Raises:
        UserError: in the mode, autograd records the head.
    """
    if torch.compiler.is_compiling() or not invariance.is_on():
        y: Tensor = net.head_forward(x)
        return y
    if torch.is_grad_enabled() and any(p.requires_grad for p in (x, *net.fc.parameters())):
        raise UserError(
            "inference in batch-invariant mode",
            "a classifier that autograd records",
            f"use torch.inference_mode(); to train, {invariance.TODO}",
        )
    if _is_plain(net) and select.runs_whole_batches(x.device, net.backend):
        return _classified(net.fc, _mean(x), net.backend)
    return invariance.singly(net.head_forward, x)


def _is_plain(net: Any) -> bool:
    """Return whether the head is torchvision's global average pooling and a linear layer."""
    pool, fc = child(net, "avgpool"), child(net, "fc")
    return (
        type(pool) is nn.AdaptiveAvgPool2d
        and pool.output_size in (1, (1, 1))
        and type(fc) is nn.Linear
        and not is_altered(pool)
        and not is_altered(fc)
    )


def _mean(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, C, 1, 1), the mean over the pixels in fp32, rounded once."""
    n, c, h, w = x.shape
    total = x.permute(2, 3, 0, 1).reshape(h * w, n, c).float()
    while len(total) > 1:
        half = len(total) // 2
        paired = total[:half] + total[half : 2 * half]
        total = paired if len(total) % 2 == 0 else torch.cat([paired[:-1], paired[-1:] + total[-1:]])
    return (total[0] * (1.0 / (h * w))).to(x.dtype)[:, :, None, None]


def _classified(fc: nn.Linear, x: Tensor, backend: str) -> Tensor:
    """(N, C, 1, 1) -> (N, classes)."""
    conv = Conv(_filters(fc), fc.bias, (1, 1), (0, 0), (1, 1), 1)
    return torch.flatten(ops.run(Call("conv_bn_act", x, (conv,), (Norm(),), relu=False), backend), 1)


_kept: WeakKeyDictionary[nn.Linear, Tensor] = WeakKeyDictionary()


def _filters(fc: nn.Linear) -> Tensor:
    """Return the weight as 1x1 filters, the same object while it is the same memory: it is a key of what is packed."""
    weight, found = fc.weight, _kept.get(fc)
    if found is None or (found.data_ptr(), found.shape[:2], found.dtype) != (
        weight.data_ptr(),
        weight.shape,
        weight.dtype,
    ):
        with torch.inference_mode(False), torch.no_grad():
            found = _kept[fc] = weight.detach()[:, :, None, None]  # it has the weight's version counter
    return found
