"""``resnet-fast warm``: compile a net's kernels ahead of its first run, here or for a GPU that is elsewhere."""

from __future__ import annotations

import json as json_module
from dataclasses import asdict
from typing import Annotated

import typer

from .. import devices, limits
from ..errors import UserError
from .options import one_of
from .output import progress_bar, show
from .tune import DTYPES


def warm(
    model: Annotated[str, typer.Argument(help="A net's name.")],
    batch: Annotated[str, typer.Option(help="Images per batch; several sizes with commas.")] = "1",
    image: Annotated[int | None, typer.Option(help="Side of the image in pixels; by default the net's own.")] = None,
    dtype: Annotated[str, one_of(DTYPES, "Element type; of a training step, that of autocast")] = "bfloat16",
    train: Annotated[bool, typer.Option("--train", help="Compile a training step, forward and backward.")] = False,
    gpu: Annotated[str | None, typer.Option(help="GPU to compile for; by default the present one.")] = None,
    arch: Annotated[
        int | None,
        typer.Option(help="Compute capability times ten, such as 90: every known GPU of it; by default one GPU."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, and no progress bar.")] = False,
) -> None:
    """Compile the Triton kernels of a net that Triton's cache lacks, so that its first run compiles nothing."""
    batches = _sizes(batch)
    names = _gpus(gpu, arch)
    for n in batches:
        limits.check_input(n, image, planes=0)
    import torch

    from .. import accelerate
    from .. import warm as compile_ahead
    from ..models import registry

    side = image or registry.image_size(model)
    kind = getattr(torch, dtype)
    kept = torch.float32 if train else kind  # a training step keeps fp32 parameters and rounds under autocast
    net = accelerate(registry.build(model).train(train).to(dtype=kept).to(memory_format=torch.channels_last))
    x = torch.empty(1, 3, side, side, device="meta", dtype=kept)
    rounded = kind if train and kind.itemsize == 2 else None
    reports = {}
    with progress_bar(silent=json, eta=True) as progress:
        for name in names:
            reports[name] = compile_ahead(net, x, train, batches, name, rounded, progress)
    if json:
        found = {name or "present": asdict(report) for name, report in reports.items()}
        typer.echo(json_module.dumps(found, indent=2))
    else:
        show(*[f"{name}: {report}" if name else str(report) for name, report in reports.items()])


def _sizes(text: str) -> tuple[int, ...]:
    """Return the batch sizes in ``1,8,256``."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise UserError("--batch as numbers with commas, such as 1,8,256", repr(text), "correct --batch")
    return tuple(int(part) for part in parts)


def _gpus(gpu: str | None, arch: int | None) -> list[str | None]:
    """Return the names of the GPUs to compile for; None is the present one."""
    if gpu is not None:
        devices.gpu(gpu)
    if arch is None:
        return [gpu]
    if gpu is not None:
        raise UserError("--gpu or --arch", "both", "leave one out")
    known = {name: device.gpu.arch for name, device in devices.gpus().items() if device.gpu is not None}
    found: list[str | None] = [name for name, capability in known.items() if capability == arch]
    if not found:
        there = ", ".join(str(capability) for capability in sorted(set(known.values())))
        raise UserError(f"--arch among {there}", str(arch), "correct --arch, or name a GPU with --gpu")
    return found
