"""What this very card can do: copies, matrix products, the cost of a launch. Each beside the figure of the model.

Every figure is the best of its runs, the least disturbed one: a ceiling, not an average.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from resnet_fast.devices import Device

from .common import Case, Row, Settings, Skipped
from .timing import graphed, seconds

GIB = 1024**3
KERNELS = 200
"""Kernels of the graph that launch costs are taken from."""


def _row(value: float, unit: str, modelled: float | None, note: str) -> Row:
    row: Row = {"status": "measured", "value": value, "unit": unit, "note": note}
    if modelled:
        row |= {"modelled": modelled, "model_error": round(modelled / value - 1, 3)}
    return row


def cases(settings: Settings, device: Device) -> Iterator[Case]:
    """One case per ceiling; on the CPU the same code on small sizes."""
    on_gpu, gpu = settings.on_gpu, device.gpu
    assert gpu is not None

    def copy(nbytes: int, modelled: float, what: str, times: int = 1) -> Callable[[], Row]:
        def run() -> Row:
            source = torch.zeros(nbytes, dtype=torch.uint8, device=settings.device).random_(0, 255)
            target = torch.empty_like(source)

            def several() -> None:
                for _ in range(times):
                    target.copy_(source)

            call = graphed(several) if on_gpu and times > 1 else several
            rate = 2 * nbytes * times / min(seconds(call, on_gpu))
            return _row(rate, "B/s", modelled, f"{rate / 1e12:.3f} TB/s read and written; {what}")

        return run

    def product(dtype: str, size: int, tf32: bool = False) -> Callable[[], Row]:
        def run() -> Row:
            before = torch.backends.cuda.matmul.allow_tf32
            torch.backends.cuda.matmul.allow_tf32 = tf32
            try:
                a = torch.randn(size, size, device=settings.device).to(getattr(torch, dtype))
                b, out = torch.randn_like(a), torch.empty_like(a)
                rate = 2 * size**3 / min(seconds(lambda: torch.mm(a, b, out=out), on_gpu))
            finally:
                torch.backends.cuda.matmul.allow_tf32 = before
            modelled = device.rate(dtype).value
            return _row(rate, "FLOP/s", modelled, f"{rate / 1e12:.1f} TFLOP/s, {size}^3 random numbers")

        return run

    def launch(as_graph: bool) -> Callable[[], Row]:
        def run() -> Row:
            if as_graph and not on_gpu:
                raise Skipped("CUDA graphs need a GPU")
            x = torch.zeros(256, device=settings.device)

            def many() -> None:
                for _ in range(KERNELS):
                    x.add_(1)

            cost = min(seconds(graphed(many) if as_graph else many, on_gpu, 10)) / KERNELS
            how = "from one kernel of a graph to the next, with the smallest kernel" if as_graph else "an eager add_"
            return _row(cost, "s", gpu.launch_s.value if as_graph else None, f"{cost * 1e6:.2f} us, {how}")

        return run

    large, size = (8 << 20, 256) if settings.quick else (2 * GIB, 8192)
    yield Case("ceiling copy", copy(large, device.bandwidth.value, f"{large >> 20} MiB to another"))
    inside = (1 << 20) if settings.quick else 16 << 20
    note = f"{inside >> 20} MiB to another, again and again: both stay in L2"
    yield Case("ceiling copy in L2", copy(inside, gpu.l2_bandwidth.value, note, times=4 if settings.quick else 50))
    yield Case("ceiling product bfloat16", product("bfloat16", size))
    yield Case("ceiling product float16", product("float16", size))
    yield Case("ceiling product tf32", product("float32", size, tf32=True))
    yield Case("ceiling launch in a graph", launch(True))
    yield Case("ceiling launch in eager", launch(False))
