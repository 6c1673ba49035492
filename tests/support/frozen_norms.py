"""Frozen norms of other libraries, as their sources write them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_fast.blocks import frozen_norms


class Constant(nn.Module):
    """With eps in the code, as in transformers' DETR models."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name, value in zip(frozen_norms.TENSORS, (1.0, 0.0, 0.0, 1.0), strict=True):
            self.register_buffer(name, torch.full((channels,), value))

    def scale(self) -> Tensor:
        return self.weight * (self.running_var + 1e-5).rsqrt()

    def forward(self, x: Tensor) -> Tensor:
        scale = self.scale()[:, None, None]
        return x * scale + (self.bias[:, None, None] - self.running_mean[:, None, None] * scale)


class Attribute(Constant):
    """With an attribute eps and a second way without autograd, as in detectron2."""

    def __init__(self, channels: int, eps: float = 1e-3) -> None:
        super().__init__(channels)
        self.eps = eps
        self.register_buffer("num_batches_tracked", None)

    def scale(self) -> Tensor:
        return self.weight * (self.running_var + self.eps).rsqrt()

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            return super().forward(x)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, eps=self.eps)


class EpsOutside(Constant):
    """A look-alike: eps is added to the deviation."""

    def scale(self) -> Tensor:
        return self.weight / (self.running_var.sqrt() + 1e-5)
