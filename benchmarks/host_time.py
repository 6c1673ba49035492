"""Measure what a step of a net costs the host, ours and stock PyTorch's, on a machine without a GPU.

    python -m resnet_fast.benchmarks.host_time                      every case, as a table
    python -m resnet_fast.benchmarks.host_time --case train-amp --profile

A step runs on :mod:`.null_gpu`, a GPU that computes nothing: all Python, dispatcher and autograd run, no kernel does.
Printed are the launches of a step by kernel, exact and the same on every machine, and the CPU time of ours and of
stock PyTorch, measured turn by turn in one process. Images are small, because host time does not depend on their size.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resnet_fast
from resnet_fast.benchmarks import null_gpu
from resnet_fast.blocks import recorder
from resnet_fast.blocks.net import Net

IMAGE = 64
"""Height and width of an image, in pixels."""

Step = Callable[[], object]


@dataclass(frozen=True)
class HostCase:
    """A kind of step.

    Attributes:
        train: forward, loss and backward; otherwise inference.
        dtype: of weights and input.
        amp: run inside bfloat16 autocast.
        batch: images.
        graph: replay our net from CUDA graphs.
        frozen: promise that our net does not change.
    """

    train: bool
    dtype: torch.dtype
    amp: bool
    batch: int
    graph: bool = False
    frozen: bool = False


CASES = {
    "train-amp": HostCase(True, torch.float32, True, 8),
    "train-bf16": HostCase(True, torch.bfloat16, False, 8),
    "train-graph": HostCase(True, torch.float32, True, 8, graph=True),
    "infer-bf16": HostCase(False, torch.bfloat16, False, 1),
}


@dataclass(frozen=True)
class HostTime:
    """What a step costs the host.

    Attributes:
        launches: Triton launches of one step by kernel.
        ours_ms, stock_ms: CPU time of one step, the median over rounds.
    """

    launches: dict[str, int]
    ours_ms: float
    stock_ms: float

    @property
    def ratio(self) -> float:
        """Ours over stock."""
        return self.ours_ms / self.stock_ms


class NullRecorder(recorder.Recorder):
    """Captures by running once. A replay does nothing, as everything else on the null GPU."""

    def __init__(self, device: torch.device):
        self.device = device

    def warm_up(self, fn: Callable[[Tensor], object], x: Tensor, layout: torch.memory_format) -> Tensor:
        """Run ``fn`` once on its static input."""
        static = torch.empty_like(x, memory_format=layout)
        fn(static)
        return static

    def capture(self, fn: Callable[[Tensor], recorder.T], x: Tensor) -> tuple[Callable[[], None], recorder.T]:
        """Run ``fn``."""
        y = fn(x)
        return (lambda: None), y

    @contextmanager
    def turn(self) -> Iterator[None]:
        """There is one stream."""
        yield

    @contextmanager
    def same_random_numbers(self) -> Iterator[None]:
        """There are none."""
        yield

    def drain(self) -> None:
        """Nothing runs."""


def phases_of(model: nn.Module, case: HostCase) -> dict[str, Step]:
    """Return the phases of one step of ``model`` on the null GPU, by name and in their order.

    ``model`` is on the CPU, or on ``meta``: no kernel reads its weights.
    """
    model = model.to(case.dtype).to_empty(device="cuda").to(memory_format=torch.channels_last).train(case.train)
    if case.frozen and isinstance(model, Net):
        resnet_fast.freeze(model)
    x = torch.empty(case.batch, 3, IMAGE, IMAGE, dtype=case.dtype, device="cuda")
    x = x.contiguous(memory_format=torch.channels_last)
    labels = torch.empty(case.batch, dtype=torch.long, device="cuda")
    parameters = list(model.parameters())

    waiting: list[Tensor] = []

    def forward() -> None:
        with torch.autocast("cuda", torch.bfloat16, enabled=case.amp):
            waiting.append(F.cross_entropy(model(x).float(), labels))

    def backward() -> None:
        waiting.pop().backward()
        for p in parameters:
            p.grad = None

    def infer() -> None:
        with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16, enabled=case.amp):
            model(x)

    return {"forward": forward, "backward": backward} if case.train else {"inference": infer}


def nets(name: str, case: HostCase) -> tuple[nn.Module, nn.Module]:
    """Return the accelerated and the stock net ``name``, without memory."""
    from torchvision import models

    setattr(recorder, "Recorder", NullRecorder)  # noqa: B010 (in place of a class that needs a device)
    with torch.device("meta"):
        ours, stock = models.get_model(name), models.get_model(name)
    return resnet_fast.accelerate(ours, cuda_graph=case.graph), stock


def steps(name: str, case: HostCase) -> tuple[Step, Step]:
    """Return the steps of the accelerated and of the stock net ``name``."""
    ours, stock = (tuple(phases_of(net, case).values()) for net in nets(name, case))
    return partial(_run, ours), partial(_run, stock)


def _run(phases: tuple[Step, ...]) -> None:
    for phase in phases:
        phase()


def measure(ours: Step, stock: Step, rounds: int) -> HostTime:
    """Return the launches of a step of ours, and the CPU time of both.

    Each round runs both, so that a disturbance reaches both.
    """
    for step in (ours, stock):
        for _ in range(3):
            step()
    null_gpu.launches()
    ours()
    launches = dict(sorted(null_gpu.launches().items()))
    times: dict[Step, list[float]] = {ours: [], stock: []}
    for _ in range(rounds):
        for step, found in times.items():
            start = time.process_time()  # autograd runs the backward pass in a thread of the device
            step()
            found.append(1e3 * (time.process_time() - start))
    return HostTime(launches, statistics.median(times[ours]), statistics.median(times[stock]))


def profile(step: Step, rounds: int) -> str:
    """Return the functions that took most of ``rounds`` steps, forward and backward."""
    profiler = cProfile.Profile(builtins=False)
    with torch.autograd.set_multithreading_enabled(False):  # in this thread, where the profiler looks
        step()
        profiler.enable()
        for _ in range(rounds):
            step()
        profiler.disable()
    stats: Any = pstats.Stats(profiler)
    stats.sort_stats("tottime").print_stats(40)
    return f"{rounds} steps"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m resnet_fast.benchmarks.host_time", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", default="resnet50", help="a net of torchvision")
    parser.add_argument("--case", choices=CASES, action="append", help="may be given several times; default: all")
    parser.add_argument("--rounds", type=int, default=30, help="steps of each net to time")
    parser.add_argument("--compile", action="store_true", help="compile the kernels, which takes minutes at first")
    parser.add_argument("--profile", action="store_true", help="also print where our step spends its time")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    null_gpu.install(options.compile)
    torch.set_num_threads(1)
    found: dict[str, HostTime] = {}
    for name in options.case or CASES:
        ours, stock = steps(options.model, CASES[name])
        found[name] = measure(ours, stock, options.rounds)
        if not options.json:
            print(_text(name, found[name]), flush=True)
        if options.profile:
            profile(ours, options.rounds)
    if options.json:
        print(json.dumps({name: asdict(each) | {"ratio": each.ratio} for name, each in found.items()}))


def _text(name: str, found: HostTime) -> str:
    kernels = "\n".join(f"    {n:5} {kernel}" for kernel, n in found.launches.items())
    times = f"{found.ours_ms:.2f} ms of CPU, stock {found.stock_ms:.2f} ms, ratio {found.ratio:.2f}"
    return f"{name}: {sum(found.launches.values())} launches, {times}\n{kernels}"


if __name__ == "__main__":
    main()
