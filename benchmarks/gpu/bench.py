"""``python3 -m resnet_fast.benchmarks.gpu.bench``: measure this GPU, stock PyTorch and our kernels on it.

    ceilings    copies, matrix products, launches of this card
    nets        ResNet-50 inference, every competitor in one interleaved run per batch
    convs       every convolution of ResNet-50 as one launch: ours, cuDNN's two forms, the roofline
    training    a step with SGD, and its peak of memory
    profiles    the kernels of such a step, stock's and ours
    compiled    torch.compile, which takes most of a minute to prepare each time, and the best of the others
    runtimes    TensorRT, Torch-TensorRT and cuDNN's frontend where they are installed, in bf16 and fp16, and the same

Every measured number comes with the model's prediction and the prediction's error.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from functools import partial

import torch

from resnet_fast.tuning import shapes

from .. import providers, runtimes
from . import ceilings, nets, profiles, report
from .session import GpuCase, Settings, begin, settings_from, update_environment
from .worker import WorkerPool

NET = "resnet50"
WITHOUT_OURS = ", stock only"
FAST = tuple(peer for peer in providers.GPU_INFERENCE if not peer.compiles)
STOCK = tuple(peer for peer in FAST if peer.stock)
STEPS = tuple(peer for peer in providers.GPU_TRAINING if not peer.compiles)


def cases(settings: Settings) -> list[GpuCase]:
    """List all cases in order of importance; those without ours run only where one with ours failed."""
    return [*_ceilings(settings), *_measured(settings), *_stock_only(settings)]


def _ceilings(settings: Settings) -> Iterator[GpuCase]:
    from resnet_fast.backends.triton.device import device_of

    yield from ceilings.cases(settings, device_of(torch.device(settings.device)))


def _measured(settings: Settings) -> Iterator[GpuCase]:
    if settings.quick:
        quick = {"dtype": "float32", "image": 8, "limit_s": 10.0}
        net = "cifar_resnet20"
        yield GpuCase(f"inference {net} batch 1", nets.NetCase(settings, net, 1, FAST, **quick), limit_s=120)  # type: ignore[arg-type]
        yield from list(_convs(settings, net, 1, "float32", 8))[:3]
        step = nets.NetCase(settings, net, 2, STEPS, training=True, image=8)
        yield GpuCase(f"training {net} batch 2", step, limit_s=60)
        yield from _profiles(settings, net, 2, 8)
        yield _compiled(settings, 1, "reduce-overhead", net)
        yield _runtimes(settings, 1, "float32", net)
        return
    for batch in (256, 1):
        yield _inference(settings, batch)
    for batch in (256, 1):
        yield from _convs(settings, NET, batch, "bfloat16", None)
    yield _training(settings, 256)
    yield from _profiles(settings, NET, 256, None)
    yield _compiled(settings, 256, "reduce-overhead")
    yield _compiled(settings, 1, "reduce-overhead")
    for batch in (128, 32, 8):
        yield _inference(settings, batch)
    for batch in (128, 64):
        yield _training(settings, batch)
    step = nets.NetCase(settings, NET, 256, providers.GPU_TRAINING, training=True)
    yield GpuCase(f"training {NET} batch 256, with torch.compile", step, limit_s=240, needs_s=120)
    for batch in (256, 1):
        yield _compiled(settings, batch, "default")
    for batch in (256, 1):
        yield _runtimes(settings, batch, "bfloat16")
    for batch in (32, 128):
        yield _compiled(settings, batch, "reduce-overhead")
    for batch in (256, 1):
        yield _runtimes(settings, batch, "float16")


def _stock_only(settings: Settings) -> Iterator[GpuCase]:
    if settings.quick:
        return
    for batch in (256, 1, 128, 32, 8):
        net = nets.NetCase(settings, NET, batch, STOCK)
        yield GpuCase(_inference(settings, batch).name + WITHOUT_OURS, net, limit_s=150, needs_s=20)


def _inference(settings: Settings, batch: int) -> GpuCase:
    return GpuCase(f"inference {NET} batch {batch}", nets.NetCase(settings, NET, batch, FAST), limit_s=180, needs_s=25)


def _training(settings: Settings, batch: int) -> GpuCase:
    step = nets.NetCase(settings, NET, batch, STEPS, training=True)
    return GpuCase(f"training {NET} batch {batch}", step, limit_s=120, needs_s=20)


def _profiles(settings: Settings, net: str, batch: int, image: int | None) -> Iterator[GpuCase]:
    for peer in STEPS:
        run = partial(profiles.profile_case, settings, net, batch, peer, image)
        yield GpuCase(f"profile training {net} batch {batch}, {peer.name}", run, limit_s=90, needs_s=15)


def _compiled(settings: Settings, batch: int, mode: str, net: str = NET) -> GpuCase:
    """torch.compile in one mode, and the anchors that its ratios are taken to."""
    frozen = mode == "reduce-overhead"
    wanted = [p for p in providers.GPU_INFERENCE if p.compiles and ("reduce-overhead" in p.name) == frozen]
    wanted += [p for p in providers.GPU_INFERENCE if p.name in providers.ANCHORS]
    image = 8 if settings.quick else None
    dtype = "float32" if settings.quick else "bfloat16"
    work = nets.NetCase(settings, net, batch, wanted, dtype=dtype, image=image)
    return GpuCase(f"compiled {mode} {net} batch {batch}", work, limit_s=200, needs_s=75)


def _runtimes(settings: Settings, batch: int, dtype: str, net: str = NET) -> GpuCase:
    """Other libraries' runtimes, eager PyTorch, which their outputs are compared with, and the anchors.

    Where none is installed, the row is their reasons, and nothing else is measured again for it.
    """
    wanted, needs_s = list(runtimes.RUNTIMES), 5.0
    if runtimes.any_installed():
        needs_s = 120.0  # to build an engine
        anchors = [p for p in providers.GPU_INFERENCE if p.name in providers.ANCHORS]
        wanted = [providers.GPU_INFERENCE[0], *wanted, *anchors]
    work = nets.NetCase(settings, net, batch, wanted, dtype=dtype, image=8 if settings.quick else None)
    return GpuCase(f"runtimes {net} batch {batch}, {dtype}", work, limit_s=300, needs_s=needs_s)


def _convs(settings: Settings, net: str, batch: int, dtype: str, image: int | None) -> Iterator[GpuCase]:
    """Yield each distinct convolution once, under its first name, with how often the net has it."""
    found: dict[object, list[str]] = {}
    for name, spec in shapes.problems(net, batch, image, dtype).items():
        found.setdefault(spec, []).append(name)
    for names in found.values():
        run = partial(nets.conv_case, settings, batch, names[0], len(names), dtype, net, image)
        yield GpuCase(f"conv {names[0]} batch {batch}", run, limit_s=60)


def _table_digest(settings: Settings) -> str:
    """Name the tuning table in use: with another one, other kernels may be chosen and must be measured again."""
    from resnet_fast.backends.triton.device import table_of

    entries = table_of(torch.device(settings.device)).entries
    text = json.dumps(entries, sort_keys=True)
    return f"table {hashlib.sha256(text.encode()).hexdigest()[:8]}" if entries else "no table"


def main() -> int:
    settings = settings_from("bench", (__doc__ or "").splitlines()[0])
    session = begin(settings, _table_digest(settings))
    everything = [*_ceilings(settings), *_measured(settings)]
    stock_only = list(_stock_only(settings))
    try:
        with WorkerPool(f"{__package__}.bench", session) as pool:
            pool.run(session.todo(everything))
            failed = {case.name for case in everything if (session.row(case.name) or {}).get("status") == "failed"}
            wanted = [case for case in stock_only if case.name.removesuffix(WITHOUT_OURS) in failed]
            pool.run(session.todo(wanted))
        rows = [session.row(case.name) for case in everything if case.name.startswith("ceiling")]
        known = {row["case"]: {k: row[k] for k in ("value", "unit")} for row in rows if row and "value" in row}
        update_environment(settings, {"ceilings": known})
    finally:
        report.write(settings)
    return session.finish([*everything, *wanted])


if __name__ == "__main__":
    sys.exit(main())
