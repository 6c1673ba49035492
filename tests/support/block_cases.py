"""torchvision's residual blocks with trained norms, and a training step of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def projection(ci: int, co: int, stride: int) -> nn.Sequential:
    """Return a 1x1 convolution and its norm, torchvision's option B."""
    return nn.Sequential(nn.Conv2d(ci, co, 1, stride, bias=False), nn.BatchNorm2d(co))


def made(
    make: Callable[[], nn.Module], n: int, channels: int, h: int, w: int, device: str = "cpu"
) -> tuple[nn.Module, Tensor]:
    """Return the block in training mode, with gammas of both signs, and an input (n, channels, h, w) in NHWC."""
    torch.manual_seed(0)
    block = nn.Sequential(make()).to(device).train()
    for m in block.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, -1, 1.5)
            nn.init.normal_(m.bias)
    return block, torch.randn(n, channels, h, w, device=device).contiguous(memory_format=torch.channels_last)


def step(block: nn.Module, x: Tensor, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return output, dx and every parameter's gradient, in autocast to a 16-bit ``dtype``."""
    x = x.clone().requires_grad_()
    with torch.autocast(x.device.type, dtype=dtype, enabled=dtype.itemsize == 2):
        y = block(x)
    y.backward(torch.cos(torch.arange(y.numel(), device=y.device, dtype=torch.float64)).reshape(y.shape).to(y.dtype))
    return [y.detach(), x.grad, *(p.grad for p in block.parameters())]  # type: ignore[list-item]
