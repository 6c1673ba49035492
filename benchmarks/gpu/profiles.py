"""Profile a training step: every kernel of it with its launches and microseconds, as torch.profiler has them.

The profiler's own cost lies between kernels and not inside them, so a profile says where a step's time goes and not how
long the step takes: that is measured without it (:mod:`.nets`).
"""

from __future__ import annotations

import torch
from torch.profiler import ProfilerActivity, profile

from resnet_fast.tuning import shapes

from ..providers import Provider
from . import cases as launches
from .session import Row, Settings, Skipped

WARM = 3
"""Steps before the profiled one: kernels are chosen, compiled and captured in them."""


def profile_case(settings: Settings, net: str, batch: int, peer: Provider, image: int | None = None) -> Row:
    """Profile one training step of a net on one path.

    In the interpreter, where no kernel runs on a device, the rows are PyTorch's operations on the CPU.

    Args:
        image: side of the input; None for the net's own.
    """
    torch.backends.cudnn.benchmark = True
    side = image or shapes.arch(net).image
    model, x = launches.calibrated(net, batch, side, settings.device, "float32")  # autocast keeps float32 parameters
    verdict = peer.supports(model, x.dtype, batch, settings.device)
    if not verdict:
        raise Skipped(verdict.reason)
    call = peer.prepare(model, x).call
    for _ in range(WARM):
        call()
    with profile(activities=[ProfilerActivity.CUDA if settings.on_gpu else ProfilerActivity.CPU]) as seen:
        call()
        if settings.on_gpu:
            torch.cuda.synchronize()
    took = "self_device_time_total" if settings.on_gpu else "self_cpu_time_total"
    found = [[event.key, event.count, round(getattr(event, took), 3)] for event in seen.key_averages()]
    kernels = sorted((entry for entry in found if entry[2] > 0), key=lambda entry: -entry[2])
    row: Row = {"status": "measured", "kind": "profile", "of": "training", "net": net, "batch": batch, "image": side}
    row |= {"precision": "AMP bfloat16", "peer": peer.name, "kernels": kernels}
    total = sum(entry[2] for entry in kernels) / 1e3
    return row | {"note": f"{sum(entry[1] for entry in kernels)} launches of {len(kernels)} kernels, {total:.3f} ms"}
