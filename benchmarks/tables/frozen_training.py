"""Count what training ResNet-50's convolutions with frozen norms saves and launches, beside stock PyTorch.

    python -m resnet_fast.benchmarks.tables.frozen_training

Saved bytes are those of images that saved-tensor hooks see, each storage once, without the net's input: of stock on
fake tensors of a CPU, whose autograd saves what a GPU's does; of the fused layers on the GPU that computes nothing
(null_gpu.py), where launches are counted too. Prints a table in Markdown, which docs/notes/frozen-training.md has.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.models import resnet50
from torchvision.ops.misc import FrozenBatchNorm2d

import resnet_fast
from resnet_fast.benchmarks import markdown, null_gpu
from resnet_fast.roofline import byte_model
from resnet_fast.spec import ITEMSIZE, Spec
from resnet_fast.tuning import shapes, training_configs
from resnet_fast.tuning.routes import folded_routes

SIZES = ((8, (224, 224)), (32, (224, 224)), (8, (800, 1088)), (32, (800, 1088)))
"""Batches and images. What a batch saves per image does not depend on its size, which the table shows."""
NORMS: dict[str, Callable[[int], nn.Module]] = {"FrozenBatchNorm2d": FrozenBatchNorm2d, "eval mode": nn.BatchNorm2d}
HOW = ("autocast to bfloat16", "bfloat16", "float32")


@dataclass(frozen=True)
class SavedRow:
    """One way to train: MB that stock and fused layers save per image, and the fused layers' launches of a step."""

    norm: str
    how: str
    images: str
    stock: float
    fused: float
    launches: int


def trunk(norm: str, how: str, device: str) -> nn.Module:
    """Return ResNet-50's stem and stages, channels_last, in training mode with frozen norms."""
    net = resnet50(norm_layer=NORMS[norm]).to(device, memory_format=torch.channels_last).train()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.eval()
    net.avgpool = net.fc = nn.Identity()
    return net.bfloat16() if how == "bfloat16" else net


def saved(net: nn.Module, x: Tensor, autocast: bool) -> tuple[float, Tensor]:
    """Return MB per image that a forward pass saves, and its output."""
    own = {t.untyped_storage()._cdata for t in (x, *net.parameters(), *net.buffers())}
    sizes: dict[int, int] = {}
    kept: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if t.dim() == 4 and len(t) == len(x) and storage._cdata not in own:
            sizes[storage._cdata] = storage.nbytes()
            kept.append(t)
        return t

    how: Any = torch.autocast(x.device.type, torch.bfloat16) if autocast else nullcontext()
    with how, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = net(x)
    return sum(sizes.values()) / len(x) / 1e6, y


def row(norm: str, how: str, batch: int, size: tuple[int, int]) -> SavedRow:
    """Count one way to train."""
    autocast = how == HOW[0]

    def images(device: str) -> Tensor:
        x = torch.empty(batch, 3, *size, device=device, dtype=torch.bfloat16 if how == "bfloat16" else torch.float32)
        return x.contiguous(memory_format=torch.channels_last)

    stock = trunk(norm, how, "cpu")
    with FakeTensorMode(allow_non_fake_inputs=True):
        of_stock, _ = saved(stock, images("cpu"), autocast)
    fused, x = resnet_fast.accelerate(trunk(norm, how, "cuda")), images("cuda")
    null_gpu.launches()
    of_fused, y = saved(fused, x, autocast)
    y.backward(torch.empty_like(y))
    return SavedRow(norm, how, f"{batch} of {size[0]}x{size[1]}", of_stock, of_fused, null_gpu.launches().total())


def activations_of_fused(spec: Spec) -> int:
    """Return the least bytes of images that the launches of frozen_chain.py move in a step of a block or the stem."""
    size, main = ITEMSIZE[spec.dtype], spec.main
    route = folded_routes(spec)[-1]
    total = sum(item.activations for one in route.launches for item in byte_model.work(one))
    for i, conv in enumerate(spec.convs):
        dgrad, wgrad = training_configs.folded_launches(conv, 0 < i < len(main))
        filters = conv.co * conv.gemm_k
        total += training_configs.min_bytes(wgrad) - 4 * filters
        if spec.pool is None:
            total += training_configs.min_bytes(dgrad) - size * filters
    first, last = main[0], main[-1]
    x, y = (n * size for n in (first.n * first.h * first.w * first.ci, last.gemm_m * last.co))
    if spec.pool is not None:  # pool and its gradient: activation or gradient, pooled, a byte for the winner
        ho, wo = last.out_hw()
        pooled = last.n * ho * wo * last.co
        return total + 2 * (y + pooled * (size + 1))
    if spec.projection is not None:  # its dgrad writes the pixels that it reads, and the first convolution's adds them
        read = spec.projection.gemm_m * spec.projection.ci * size
        return total + 3 * y + 2 * read - x
    return total + 3 * y + x


def activations_of_stock(spec: Spec, passes: tuple[int, int]) -> int:
    """Return the same of stock PyTorch, an operation a kernel; ``passes``: of a norm over y, forward and backward."""
    size, total = ITEMSIZE[spec.dtype], 0
    for conv in spec.convs:
        x, y = (n * size for n in (conv.n * conv.h * conv.w * conv.ci, conv.gemm_m * conv.co))
        total += (x + y) * (2 if spec.pool else 3) + y * (sum(passes) + 5 * conv.epilogue.relu + 3 * conv.epilogue.add)
        if conv.epilogue.pool:  # with 64-bit indices
            ho, wo = conv.out_hw()
            total += 2 * (y + conv.n * ho * wo * conv.co * (size + 8))
    return total if spec.pool else total + 3 * x_of(spec)


def x_of(spec: Spec) -> int:
    """Return the bytes of a block's input, whose two gradients are added."""
    first = spec.main[0]
    return first.n * first.h * first.w * first.ci * ITEMSIZE[spec.dtype]


def moved() -> str:
    """Return the modelled bytes of images that a step of ResNet-50's trunk moves, per 224x224 image in 16 bit."""
    blocks = shapes.blocks("resnet50", 1, dtype="bfloat16")
    stem = next(iter(shapes.problems("resnet50", 1, dtype="bfloat16").values()))
    parts: list[Spec] = [stem, *blocks.values()]
    fused = sum(map(activations_of_fused, parts)) / 1e6
    lines = [f"{len(parts)} parts, fused {fused:.1f} MB"]
    for name, passes in (("FrozenBatchNorm2d", (4, 2)), ("eval mode", (2, 3))):
        stock = sum(activations_of_stock(part, passes) for part in parts) / 1e6
        lines.append(f"stock with {name} {stock:.1f} MB, of which fused moves {fused / stock:.0%}")
    return "; ".join(lines)


def main() -> None:
    print(moved())
    null_gpu.install()
    rows = [row(norm, how, *size) for norm, how, size in product(NORMS, HOW, SIZES)]
    head = ("norms", "how", "images", "stock saves, MB per image", "fused", "of stock", "launches of a step")
    cells = [
        (r.norm, r.how, r.images, f"{r.stock:.1f}", f"{r.fused:.1f}", f"{r.fused / r.stock:.0%}", r.launches)
        for r in rows
    ]
    print(markdown.table(head, cells), flush=True)
    os._exit(0)  # autograd's thread for the device would end the process by abort()


if __name__ == "__main__":
    main()
