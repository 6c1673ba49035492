"""Count what training ResNet-50's convolutions with frozen norms saves, moves and launches, beside stock PyTorch.

    python -m resnet_fast.benchmarks.tables.frozen_training                       what is saved, and the launches
    TRITON_INTERPRET=1 python -m resnet_fast.benchmarks.tables.frozen_training    what is moved

Each writes its part of docs/tables/frozen-training.json, and the page.

Saved bytes are those of images that saved-tensor hooks see, each storage once, without the net's input: of stock on
fake tensors of a CPU, whose autograd saves what a GPU's does; of the fused layers on the GPU that computes nothing
(null_gpu.py), where launches are counted too. Beside each is a formula over the shapes of the layers, and a test
compares both with what real steps save. What the fused layers move is counted in the interpreter, at batch 1; what
stock moves is modelled, an operation a kernel.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.models import resnet50
from torchvision.ops.misc import FrozenBatchNorm2d

import resnet_fast
from resnet_fast import devices
from resnet_fast.benchmarks import markdown, null_gpu
from resnet_fast.benchmarks.markdown import LEFT, RIGHT
from resnet_fast.spec import ITEMSIZE, Spec
from resnet_fast.tuning import launch_plan, shapes, training_configs
from resnet_fast.tuning.routes import folded_routes
from resnet_fast.tuning.tables import Table

from . import FOLDER

JSON, PAGE = FOLDER / "frozen-training.json", FOLDER / "frozen-training.md"

BATCHES = (256, 8)
IMAGE = (224, 224)
NORMS: dict[str, Callable[[int], nn.Module]] = {"FrozenBatchNorm2d": FrozenBatchNorm2d, "eval mode": nn.BatchNorm2d}
HOW = {"autocast to bfloat16": "bfloat16", "autocast to float16": "float16", "bfloat16": "bfloat16",
       "float16": "float16", "TF32": "float32"}  # fmt: skip
"""Ways to train, with the dtype of the convolutions; parameters are fp32 under autocast and for TF32."""


@dataclass(frozen=True)
class SavedRow:
    """One way to train: MB that stock and fused layers save per step, and the same by formula; launches of a step."""

    norm: str
    how: str
    batch: int
    stock: float
    fused: float
    stock_formula: float
    fused_formula: float
    launches: int


def trunk(norm: str, how: str, device: str) -> nn.Module:
    """Return ResNet-50's stem and stages, channels_last, in training mode with frozen norms."""
    net = resnet50(norm_layer=NORMS[norm]).to(device, memory_format=torch.channels_last).train()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.eval()
    net.avgpool = net.fc = nn.Identity()
    return net.to(getattr(torch, how)) if how in ("bfloat16", "float16") else net


def saved(
    net: Callable[[Tensor], Tensor], x: Tensor, autocast: torch.dtype | None, own: Iterable[Tensor] = ()
) -> tuple[int, Tensor]:
    """Return the bytes of images that a forward pass saves apart from ``x`` and what it is given, and its output.

    Args:
        net: a module, or a function of layers.
        x: images (N, C, H, W), N at least 2.
        autocast: the dtype to cast to, None for no autocast.
        own: the parameters and buffers, which are not counted.
    """
    own = tuple(own)
    given, filters = {t.untyped_storage()._cdata for t in (x, *own)}, {t.shape for t in own}
    sizes: dict[int, int] = {}
    kept: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if t.dim() == 4 and len(t) == len(x) and storage._cdata not in given and t.shape not in filters:
            sizes[storage._cdata] = storage.nbytes()
            kept.append(t)
        return t

    how: Any = nullcontext() if autocast is None else torch.autocast(x.device.type, autocast)
    with how, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = net(x)
    return sum(sizes.values()), y


def row(norm: str, how: str, batch: int) -> SavedRow:
    """Count one way to train."""
    dtype = getattr(torch, HOW[how])
    autocast = dtype if how.startswith("autocast") else None

    def images(device: str) -> Tensor:
        x = torch.empty(batch, 3, *IMAGE, device=device, dtype=torch.float32 if autocast else dtype)
        return x.contiguous(memory_format=torch.channels_last)

    def count(net: nn.Module, x: Tensor) -> tuple[float, Tensor]:
        nbytes, y = saved(net, x, autocast, (*net.parameters(), *net.buffers()))
        return nbytes / 1e6, y

    stock = trunk(norm, how, "cpu")
    with FakeTensorMode(allow_non_fake_inputs=True):
        of_stock, _ = count(stock, images("cpu"))
    fused = resnet_fast.accelerate(trunk(norm, how, "cuda"))
    null_gpu.launches()
    of_fused, y = count(fused, images("cuda"))
    y.backward(torch.empty_like(y))
    launches = null_gpu.launches().total()
    every = parts(batch, HOW[how])
    stock_formula = saved_by_stock(every, norm, autocast is not None) / 1e6
    fused_formula = saved_by_fused(every, autocast is not None) / 1e6
    return SavedRow(norm, how, batch, of_stock, of_fused, stock_formula, fused_formula, launches)


def parts(batch: int, dtype: str) -> list[Spec]:
    """Return the stem and the blocks of ResNet-50 in a training step with frozen norms."""
    stem = next(iter(shapes.problems("resnet50", batch, dtype=dtype, grad=True).values()))
    return [stem, *shapes.blocks("resnet50", batch, dtype=dtype, grad=True).values()]


def saved_by_fused(every: Iterable[Spec], autocast: bool) -> int:
    """Return the bytes of images that the fused stem and blocks save, by the shapes of their layers.

    Each keeps its output and what is between its convolutions; a stem the pooled output, a byte per window, and under
    autocast the image in 16 bit.
    """
    total = 0
    for spec in every:
        size = ITEMSIZE[spec.dtype]
        total += sum(conv.gemm_m * conv.co for conv in spec.main[:-1]) * size
        total += pooled(spec) * (size + 1) if spec.pool else spec.main[-1].gemm_m * spec.main[-1].co * size
        total += x_of(spec) if autocast and spec.pool else 0
    return total


def saved_by_stock(every: Iterable[Spec], norm: str, autocast: bool) -> int:
    """Return the same of stock layers.

    A ReLU saves its output, BatchNorm2d its input, a max-pool its input and 64-bit indices, a convolution its input:
    one that a ReLU saved already, except under autocast with FrozenBatchNorm2d, which returns float32, so that each
    convolution keeps a copy in 16 bit.
    """
    copies = autocast and norm == "FrozenBatchNorm2d"
    total = 0
    for spec in every:
        size = ITEMSIZE[spec.dtype]
        outputs = [conv.gemm_m * conv.co for conv in spec.main]  # of each ReLU
        total += sum(outputs) * (4 if copies else size)
        if norm == "eval mode":
            total += sum(conv.gemm_m * conv.co for conv in spec.convs) * size
        if copies:
            total += sum(outputs[:-1]) * size
        if spec.pool:
            total += pooled(spec) * (8 if copies else 8 + size)
            total += x_of(spec) if autocast else 0
        elif copies:
            total += x_of(spec) * (1 + (spec.projection is not None))
    return total


def pooled(spec: Spec) -> int:
    """Return the elements of a stem's output."""
    n, c, h, w = spec.out_shape()
    return n * c * h * w


def activations_of_fused(spec: Spec) -> int:
    """Return the least bytes of images that the launches of frozen_chain.py move in a step of a block or the stem."""
    size, main = ITEMSIZE[spec.dtype], spec.main
    route = folded_routes(spec)[-1]
    total = 0
    for one in route.launches:
        filters, constants = (sum(n) for n in zip(*((c.co * c.gemm_k, c.co) for c in one.all_convs()), strict=True))
        merged = one.projection.co if one.projection is not None else 0  # its constant is part of the last one's
        total += one.min_bytes() - size * filters - 4 * (constants - merged)
    for i, conv in enumerate(spec.convs):
        dgrad, wgrad = training_configs.folded_launches(conv, 0 < i < len(main))
        filters = conv.co * conv.gemm_k
        total += training_configs.min_bytes(wgrad) - 4 * filters
        if spec.pool is None:
            total += training_configs.min_bytes(dgrad) - size * filters
    first, last = main[0], main[-1]
    x, y = (n * size for n in (first.n * first.h * first.w * first.ci, last.gemm_m * last.co))
    if spec.pool is not None:  # pool and its gradient: activation or gradient, pooled, a byte for the winner
        return total + 2 * (y + pooled(spec) * (size + 1))
    if spec.projection is not None:  # its dgrad writes the pixels that it reads, and the first convolution's adds them
        read = spec.projection.gemm_m * spec.projection.ci * size
        return total + 3 * y + 2 * read - x
    return total + 3 * y + x


def activations_of_stock(spec: Spec, passes: tuple[int, int]) -> int:
    """Return the same of stock PyTorch, an operation a kernel; ``passes``: of a norm over y, forward and backward."""
    size, total = ITEMSIZE[spec.dtype], 0
    for conv in spec.convs:
        x, y = (n * size for n in (conv.n * conv.h * conv.w * conv.ci, conv.gemm_m * conv.co))
        # forward and wgrad read the pixels that a stride leaves, dgrad writes all
        total += (
            2 * (conv.touched() * size + y)
            + (0 if spec.pool else x + y)
            + y * (sum(passes) + 5 * conv.epilogue.relu + 3 * conv.epilogue.add)
        )
        if conv.epilogue.pool:  # with 64-bit indices
            ho, wo = conv.out_hw()
            total += 2 * (y + conv.n * ho * wo * conv.co * (size + 8))
    return total if spec.pool else total + 3 * x_of(spec)


def x_of(spec: Spec) -> int:
    """Return the bytes of a block's input, whose two gradients are added."""
    first = spec.main[0]
    return first.n * first.h * first.w * first.ci * ITEMSIZE[spec.dtype]


def weights_of_fused(every: Iterable[Spec], autocast: bool) -> int:
    """Return the bytes of weights that a step moves: each folded per direction, read by each, and its gradient.

    gamma's gradient reads the weight again.
    """
    total = 0
    for spec in every:
        size = ITEMSIZE[spec.dtype]
        parameter = 4 if autocast else size
        for i, conv in enumerate(spec.convs):
            dgrad = spec.pool is None or i > 0
            total += conv.co * conv.gemm_k * ((1 + dgrad) * (parameter + 2 * size) + 2 * parameter)
    return total


def weights_of_stock(every: Iterable[Spec], autocast: bool) -> int:
    """Return the same of stock: under autocast a cast, the convolutions' reads and the gradient's cast back."""
    total = 0
    for spec in every:
        size = ITEMSIZE[spec.dtype]
        for i, conv in enumerate(spec.convs):
            reads = 1 + (spec.pool is None or i > 0)
            casts = 2 * (4 + size) if autocast else 0
            total += conv.co * conv.gemm_k * (casts + (reads + 1) * size)
    return total


def sums_of_fused(every: Iterable[Spec]) -> int:
    """Return the bytes of the splits of all wgrads on an H100, written and read, with the configs that it would run."""
    from resnet_fast.backends.triton.training import conv_wgrad

    gpu, total = devices.gpu("h100"), 0
    assert gpu.gpu is not None
    for spec in every:
        plan = launch_plan.plan_folded(spec, gpu, Table(gpu.name), hopeful=True)
        for conv, config in zip(spec.convs, plan.wgrads, strict=True):
            launch = training_configs.folded_launches(conv, False)[1]
            splits, _ = conv_wgrad.splits_of(launch, config, gpu.gpu.sms)
            total += 2 * 4 * splits * conv.co * (conv.gemm_k + 1)
    return total


PASSES = {"FrozenBatchNorm2d": (4, 2), "eval mode": (2, 3)}
"""Passes of a stock norm over its convolution's output, forward and backward."""


@dataclass(frozen=True)
class MovedRow:
    """What a step of ResNet-50's trunk moves, in MB: activations, weights and the splits of wgrads.

    ``stock``: activations of stock with each kind of norm.
    """

    how: str
    batch: int
    activations: float
    weights: float
    sums: float
    stock: dict[str, float]
    stock_weights: float


def moved(counted: dict[str, int] | None) -> list[MovedRow]:
    """Return a row per way to train and batch.

    ``counted``: bytes of activations of each part of ResNet-50 in 16 bit at batch 1, see :func:`counted_parts`; None to
    take what the launches must move, which is the same.
    """
    found = []
    for how, batch in product(("autocast to bfloat16", "bfloat16", "TF32"), BATCHES):
        every, autocast = parts(batch, HOW[how]), how.startswith("autocast")
        fused = sum(map(activations_of_fused, every))
        if counted is not None and HOW[how] != "float32":
            fused = batch * sum(counted.values())
        stock = {norm: sum(activations_of_stock(one, passes) for one in every) for norm, passes in PASSES.items()}
        found.append(
            MovedRow(
                how, batch, fused / 1e6, weights_of_fused(every, autocast) / 1e6, sums_of_fused(every) / 1e6,
                {norm: nbytes / 1e6 for norm, nbytes in stock.items()}, weights_of_stock(every, autocast) / 1e6,
            )
        )  # fmt: skip
    return found


def counted_parts() -> dict[str, int]:
    """Return the bytes of activations that the launches of each part of ResNet-50 move at batch 1, times its number.

    Runs in Triton's interpreter, for minutes.
    """
    from . import training_traffic as traffic

    torch.set_num_threads(1)
    names = traffic.parts()
    return {name: times * traffic.frozen_step(spec).activations for name, (spec, times) in names.items()}


def page(table: dict[str, Any]) -> str:
    """Return the page to read."""
    kept = [SavedRow(**one) for one in table["saved"]]
    saved_cells = [
        (
            r.norm, r.how, r.batch, f"{r.stock:,.1f}", f"{r.stock_formula:,.1f}", f"{r.fused:,.1f}",
            f"{r.fused_formula:,.1f}", f"{r.fused / r.stock:.0%}", r.launches,
        )
        for r in kept
    ]  # fmt: skip
    every = moved(table["counted"])
    moved_cells = [
        (
            r.how, r.batch, f"{r.activations:,.0f}", f"{r.weights:,.0f}", f"{r.sums:,.0f}", norm, f"{of_stock:,.0f}",
            f"{r.stock_weights:,.0f}",
            f"{(r.activations + r.weights + r.sums) / (of_stock + r.stock_weights):.0%}",
        )
        for r in every
        for norm, of_stock in r.stock.items()
    ]  # fmt: skip
    least: Counter[str] = Counter()
    for name, spec in zip(("r50.conv1", *shapes.blocks("resnet50", 1)), parts(1, "float16"), strict=True):
        least[_first(name)] += activations_of_fused(spec)
    counted_cells = [
        (name, f"{nbytes / 1e3:,.1f}", f"{least[name] / 1e3:,.1f}", f"{nbytes / least[name]:.3f}")
        for name, nbytes in table["counted"].items()
    ]
    blocks = [
        "# Training with frozen norms, counted",
        "ResNet-50 without its head, 224x224, every parameter trained (those of FrozenBatchNorm2d are buffers). MB per "
        "step. Written by benchmarks/tables/frozen_training.py; nothing here was measured on a GPU.",
        "## Saved for the backward pass",
        "Images, each memory once, without the net's input. Counted: stock by saved-tensor hooks on fake tensors, "
        "fused on the GPU that computes nothing. By formula: over the shapes of the layers.",
        markdown.table(
            ("norms", "how", "batch", "stock", "by formula", "fused", "by formula", "of stock", "launches"),
            saved_cells, (LEFT, LEFT, *[RIGHT] * 7),
        ),
        "## Moved",
        "Activations in 16 bit are counted in the interpreter at batch 1 and multiplied by the batch. Those in TF32, "
        "weights, the splits of weight gradients (configs of an H100) and all of stock are modelled: an operation a "
        "kernel, caches perfect within one. FrozenBatchNorm2d under autocast is modelled as if it returned 16 bit; it "
        "returns float32.",
        markdown.table(
            ("how", "batch", "activations", "weights", "splits", "stock's norms", "activations", "weights", "of stock"),
            moved_cells, (LEFT, *[RIGHT] * 4, LEFT, *[RIGHT] * 3),
        ),
        "Counted activations of each part in float16 at batch 1, times its number in the net, and the least that its "
        "launches must move:",
        markdown.table(("part", "counted KB", "least KB", "ratio"), counted_cells, (LEFT, *[RIGHT] * 3)),
    ]  # fmt: skip
    return "\n\n".join(blocks) + "\n"


def _first(name: str) -> str:
    """Return the name of the first block of the same shape, as :func:`counted_parts` names it."""
    stage, _, block = name.rpartition(".")
    return name if not stage or not block.isdigit() or int(block) < 2 else f"{stage}.1"


def write(new: dict[str, Any]) -> None:
    """Write a part of the table, and the page if the other part is there."""
    table = json.loads(JSON.read_text()) if JSON.exists() else {}
    table |= new
    JSON.write_text(json.dumps(table, indent=1) + "\n")
    if table.keys() >= {"saved", "counted"}:
        PAGE.write_text(page(table))


def main() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        write({"counted": counted_parts()})
        return
    null_gpu.install()
    write({"saved": [asdict(row(norm, how, batch)) for norm, how, batch in product(NORMS, HOW, BATCHES)]})
    os._exit(0)  # autograd's thread for the device would end the process by abort()


if __name__ == "__main__":
    main()
