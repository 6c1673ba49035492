"""What a new user meets: the wait before the first result, the host's time per step, a second GPU.

    cold start    seconds of the first inference and of the first training step in a process whose caches are empty, and
                  in the next process, which finds what the first one compiled
    host          CPU time per step, ours eager and replayed from CUDA graphs, and stock PyTorch's, turn by turn
    second device a net on ``cuda:1`` while ``cuda:0`` is current, against the stock net and fp64

Each part of each of them is a case of its own, so that a cut run keeps what it has shown.
"""

from __future__ import annotations

import copy
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import cases as cases_of
from .session import GpuCase, Row, Settings, Skipped, run_limited
from .worker import end_with_parent

NET, TINY = "resnet50", "cifar_resnet20"
COLD_LIMIT_S = {"inference": 60.0, "training": 110.0}
"""Most seconds of both processes together; with the host's cases they fit into the first five minutes of a budget."""

HOST_LIMIT_S = 25.0

ROUNDS = 20
"""Steps of each net to time the host with."""

ANSWER = "cold start: "
"""Begins the line that a measured process prints."""

Step = Callable[[], object]


class Kind(NamedTuple):
    """A kind of step: inference or a training step of a net at a batch size, on images of this many pixels squared."""

    train: bool
    net: str
    batch: int
    image: int
    device: str

    @property
    def name(self) -> str:
        """``inference`` or ``training``."""
        return "training" if self.train else "inference"

    def model(self, device: str) -> tuple[nn.Module, Tensor]:
        """Return the stock net and a batch; in bfloat16 for inference on a GPU, else in float32."""
        dtype = "float32" if self.train or self.device == "cpu" else "bfloat16"
        model, x = cases_of.calibrated(self.net, self.batch, self.image, device, dtype)
        if self.net == TINY:
            for stage in ("layer1", "layer2", "layer3"):
                del getattr(model, stage)[1:]
        return model.train(self.train), x


def cases(settings: Settings) -> Iterator[GpuCase]:
    """Yield every case, the shortest wait first."""
    for kind in _kinds(settings, "cold"):
        limit = COLD_LIMIT_S[kind.name]
        yield GpuCase(f"cold start {kind.name}", partial(cold_start, kind), limit_s=limit)
    for kind in _kinds(settings, "host"):
        for ours in ("eager", "captured"):
            work = _Host(kind, ours, 1 if settings.quick else ROUNDS)
            yield GpuCase(f"host {kind.name} {ours}", work, limit_s=200 if settings.quick else HOST_LIMIT_S)
    for kind in _kinds(settings, "second"):
        yield GpuCase(f"second device {kind.name}", _SecondDevice(kind), limit_s=60)


def _kinds(settings: Settings, what: str) -> Iterator[Kind]:
    for train in (False, True):
        if settings.quick:
            yield Kind(train, TINY, 2, 8, settings.device)
        elif what == "host":  # images are small, so that the GPU never holds the host up
            yield Kind(train, NET, 8 if train else 1, 64, settings.device)
        else:
            yield Kind(train, NET, 8, 224, settings.device)


def step_of(model: nn.Module, x: Tensor, train: bool) -> Step:
    """Return a function that runs inference, or a training step without an optimizer, under bfloat16 autocast."""
    labels = torch.zeros(len(x), dtype=torch.long, device=x.device)
    parameters = list(model.parameters())

    def training() -> None:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            loss = F.cross_entropy(model(x).float(), labels)
        loss.backward()
        for p in parameters:
            p.grad = None

    def inference() -> None:
        with torch.inference_mode():
            model(x)

    return training if train else inference


def _wait(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def cold_start(kind: Kind) -> Row:
    """Time the first step of a process with empty caches, and of the next process.

    Returns:
        ``first_s`` and ``next_process_s`` of the first steps, ``second_step_s`` of the step after the first.

    Raises:
        RuntimeError: a process failed or took too long, with its last line.
    """
    found: list[dict[str, float]] = []
    end = time.monotonic() + COLD_LIMIT_S[kind.name] - 5  # this process ends first, and says why
    with tempfile.TemporaryDirectory(prefix="resnet_fast_cold_") as folder:
        empty = {"TRITON_CACHE_DIR": str(Path(folder) / "triton"), "RESNET_FAST_CACHE": str(Path(folder) / "own")}
        for _ in range(2):
            command = [sys.executable, "-m", f"{__package__}.first_contact", json.dumps(kind)]
            code, output = run_limited(command, end - time.monotonic(), env=os.environ | empty)
            lines = output.strip().splitlines() or [""]
            answers = [line for line in lines if line.startswith(ANSWER)]  # libraries print before it and after it
            if code != 0 or not answers:
                reason = "stopped at its time limit" if code is None else f"exit code {code}"
                raise RuntimeError(f"process {len(found) + 1} of 2: {reason}: {lines[-1][:300]}")
            found.append(json.loads(answers[-1].removeprefix(ANSWER)))
    first, again = found
    row = {"first_s": first["first_s"], "second_step_s": first["second_s"], "next_process_s": again["first_s"]}
    return row | {"note": f"{first['first_s']:.1f} s, in the next process {again['first_s']:.1f} s"}


def _one_cold_start(kind: Kind) -> None:
    """Print the seconds of this process's first two steps as a line of JSON."""
    import resnet_fast

    model, x = kind.model(kind.device)
    step = step_of(resnet_fast.accelerate(model, backend="triton"), x, kind.train)
    seconds = []
    for _ in range(2):
        _wait(kind.device)
        start = time.perf_counter()
        step()
        _wait(kind.device)
        seconds.append(round(time.perf_counter() - start, 3))
    print(ANSWER + json.dumps({"first_s": seconds[0], "second_s": seconds[1]}), flush=True)


class _Host:
    """Time what a step costs the host, for our net (``eager``, or ``captured`` in CUDA graphs) and the stock one."""

    def __init__(self, kind: Kind, ours: str, rounds: int) -> None:
        self.kind, self.ours, self.rounds = kind, ours, rounds

    def __call__(self) -> Row:
        import resnet_fast

        kind, captured = self.kind, self.ours == "captured"
        if captured and kind.device == "cpu":
            raise Skipped("CUDA graphs need a GPU")
        stock, x = kind.model(kind.device)
        net = resnet_fast.accelerate(copy.deepcopy(stock), backend="triton", cuda_graph=captured)
        steps = {"ours": step_of(net, x, kind.train), "stock": step_of(stock, x, kind.train)}
        times: dict[str, list[float]] = {name: [] for name in steps}
        resnet_fast.reset_stats()
        for at in range(-3 if self.rounds > 1 else -1, self.rounds):
            for name, step in steps.items():
                _wait(kind.device)
                start = time.process_time()  # autograd runs the backward pass in a thread of its own
                step()
                if at >= 0:
                    times[name].append(1e3 * (time.process_time() - start))
        _wait(kind.device)
        calls = resnet_fast.stats()["calls"]
        if captured and not any(call.endswith("/replay") for call in calls):
            raise AssertionError(f"expected replays of CUDA graphs, got {calls}")
        ours, theirs = (round(statistics.median(found), 3) for found in times.values())
        note = f"{ours:.2f} ms of CPU time per step, stock {theirs:.2f} ms"
        return {"status": "measured", "ours_ms": ours, "stock_ms": theirs, "batch": kind.batch, "note": note}


class _SecondDevice:
    """Run a net on ``cuda:1`` while ``cuda:0`` is current."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind

    def __call__(self) -> Row:
        if torch.cuda.device_count() < 2:
            raise Skipped("fewer than two CUDA devices here")
        import resnet_fast
        from resnet_fast import numerics

        kind, there = self.kind, "cuda:1"
        torch.cuda.set_device(0)
        stock, x = kind.model(there)
        net = resnet_fast.accelerate(copy.deepcopy(stock), backend="triton")
        names = " and ".join(torch.cuda.get_device_name(i) for i in range(2))
        if kind.train:
            step = [_first_gradient(model, x) for model in (net, stock, copy.deepcopy(stock).double())]
            ours, eager, double = step
        else:
            with torch.inference_mode():
                ours, eager, double = net(x), stock(x), copy.deepcopy(stock).double()(x.double())
        if torch.cuda.current_device() != 0:
            raise AssertionError(f"expected device 0 to stay current, got {torch.cuda.current_device()}")
        k = max(m.weight[0].numel() for m in stock.modules() if isinstance(m, nn.Conv2d))
        found = numerics.assert_close(ours, double, eager, k)
        return {"note": f"{names}: error {found.rel:.1e}, eager's {found.eager_rel:.1e}", "rel": found.rel}


def _first_gradient(model: nn.Module, x: Tensor) -> Tensor:
    """Return the gradient of the last layer's weight after one step in the model's own precision."""
    x = x.to(next(model.parameters()).dtype)
    model(x).square().mean().backward()
    found: Any = model.fc.weight.grad  # type: ignore[union-attr]
    return found.detach()[:, :, None, None]


if __name__ == "__main__":
    end_with_parent()
    _one_cold_start(Kind(*json.loads(sys.argv[1])))
