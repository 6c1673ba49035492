"""Folded bottlenecks for the native kernel bottleneck_fwd, and the same computation in stock PyTorch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

native = torch.ops.resnet_fast_native


@dataclass
class Block:
    """A folded bottleneck on random numbers, rounded to ``dtype``."""

    x: Tensor
    weights: tuple[Tensor, ...]  # conv1, conv2, conv3, and the projection if there is one
    biases: tuple[Tensor, Tensor, Tensor]

    def packed(self) -> Tensor:
        w1, w2, w3, *projection = self.weights
        cmid = w1.shape[0]
        first = w1.reshape(cmid, -1, 64).permute(1, 0, 2)
        second = w2.permute(2, 3, 0, 1).reshape(9, cmid, cmid // 64, 64).permute(0, 2, 1, 3).reshape(-1, cmid, 64)
        last = torch.cat([w3, *projection], 1).flatten(1)
        last = last.reshape(last.shape[0] // cmid, cmid, -1, 64).permute(0, 2, 1, 3).reshape(-1, cmid, 64)
        return torch.cat([first, second, last]).contiguous()

    def run(self) -> Tensor:
        return native.bottleneck_fwd(self.x, self.packed(), *self.biases, len(self.weights) == 4)

    def eager(self, dtype: torch.dtype, relu: bool = True) -> Tensor:
        x, (w1, w2, w3, *projection) = self.x.to(dtype), [w.to(dtype) for w in self.weights]
        b1, b2, b3 = (b.to(dtype) for b in self.biases)
        t = torch.relu(F.conv2d(torch.relu(F.conv2d(x, w1, b1)), w2, b2, padding=1))
        shortcut = F.conv2d(x, projection[0]) if projection else x
        y = F.conv2d(t, w3, b3) + shortcut
        return torch.relu(y) if relu else y


def block(n: int, h: int, w: int, ci: int, cmid: int, co: int, dtype: torch.dtype, seed: int = 0) -> Block:
    """Return a random bottleneck and its input (n, ci, h, w); it has a projection if ``ci`` and ``co`` differ."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    shapes = [(cmid, ci, 1, 1), (cmid, cmid, 3, 3), (co, cmid, 1, 1)] + ([(co, ci, 1, 1)] if ci != co else [])
    weights = tuple((random(*s) / (s[1] * s[2] * s[3]) ** 0.5).to(dtype) for s in shapes)
    x = random(n, ci, h, w).to(dtype).contiguous(memory_format=torch.channels_last)
    return Block(x, weights, (random(cmid), random(cmid), random(co)))
