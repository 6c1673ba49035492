"""Measure what this GPU can do: copies, matrix products, the cost of a launch. The model's figure goes next to each.

Every figure is the best of its runs: a ceiling, not an average.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from resnet_fast.devices import Device

from ..harness import best, graphed
from .session import GpuCase, Row, Settings, Skipped

GIB = 1024**3
KERNELS = 200
"""Kernels of the graph that launch costs are taken from."""


def cases(settings: Settings, device: Device) -> Iterator[GpuCase]:
    """Yield one case per ceiling; on the CPU the same code on small sizes."""
    gpu, at = device.gpu, settings.device
    assert gpu is not None
    large, size = (8 << 20, 256) if settings.quick else (2 * GIB, 8192)
    inside, times = (1 << 20, 4) if settings.quick else (16 << 20, 50)
    again = f"{inside >> 20} MiB to another, again and again: both stay in L2"
    work = {
        "copy": partial(_copy, at, large, device.bandwidth.value, f"{large >> 20} MiB to another"),
        "copy in L2": partial(_copy, at, inside, gpu.l2_bandwidth.value, again, times),
        "product bfloat16": partial(_product, at, "bfloat16", size, device.rate("bfloat16").value),
        "product float16": partial(_product, at, "float16", size, device.rate("float16").value),
        "product tf32": partial(_product, at, "float32", size, device.rate("float32").value),
        "launch in a graph": partial(_launch, at, gpu.launch_s.value),
        "launch in eager": partial(_launch, at, None),
    }
    for name, run in work.items():
        yield GpuCase(f"ceiling {name}", run)


def _row(value: float, unit: str, modelled: float | None, note: str) -> Row:
    row: Row = {"status": "measured", "value": value, "unit": unit, "note": note}
    if modelled:
        row |= {"modelled": modelled, "model_error": round(modelled / value - 1, 3)}
    return row


def _copy(device: str, nbytes: int, modelled: float, what: str, times: int = 1) -> Row:
    source = torch.zeros(nbytes, dtype=torch.uint8, device=device).random_(0, 255)
    target = torch.empty_like(source)

    def several() -> None:
        for _ in range(times):
            target.copy_(source)

    rate = 2 * nbytes * times / best(graphed(several) if device == "cuda" and times > 1 else several, device)
    return _row(rate, "B/s", modelled, f"{rate / 1e12:.3f} TB/s read and written; {what}")


def _product(device: str, dtype: str, size: int, modelled: float) -> Row:
    """A product of square matrices; in float32 its operands are rounded to TF32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = dtype == "float32"
    try:
        a = torch.randn(size, size, device=device).to(getattr(torch, dtype))
        b, out = torch.randn_like(a), torch.empty_like(a)
        rate = 2 * size**3 / best(lambda: torch.mm(a, b, out=out), device)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return _row(rate, "FLOP/s", modelled, f"{rate / 1e12:.1f} TFLOP/s, {size}^3 random numbers")


def _launch(device: str, modelled: float | None) -> Row:
    """Seconds per launch of the smallest kernel: in a graph where there is a model's figure, else in eager."""
    if modelled and device != "cuda":
        raise Skipped("CUDA graphs need a GPU")
    x = torch.zeros(256, device=device)

    def many() -> None:
        for _ in range(KERNELS):
            x.add_(1)

    cost = best(graphed(many) if modelled else many, device, 10) / KERNELS
    how = "from one kernel of a graph to the next, with the smallest kernel" if modelled else "an eager add_"
    return _row(cost, "s", modelled, f"{cost * 1e6:.2f} us, {how}")
