"""Measure how fast the PTX machine executes: instructions of warps per second, and one step of a large tile.

    python -m resnet_fast.benchmarks.ptx_speed             seconds: medians of interleaved rounds, on an idle machine
    python -m resnet_fast.benchmarks.ptx_speed --count     host instructions under callgrind, on any machine

A tile step is what a block of a 1x1 convolution does for 64 of its input channels: it loads 128 x 64 and 64 x 128
values, waits, and multiplies them. Its cost is the difference of two launches of one block, over the steps that one has
more. The other case is all kernels of a training step of a bottleneck. Compilation, parsing, packing of arguments and
the copy of memory before a launch are not part of a figure.
"""

from __future__ import annotations

import argparse
import ctypes
import pickle
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from resnet_fast.benchmarks import callgrind, markdown
from resnet_fast.benchmarks.markdown import LEFT, RIGHT

SHORT, LONG = 5, 9
"""Tile steps of the two launches whose difference is a step's cost; more than a pipeline's stages."""

ARCHS = {80: "sm_80, mma.sync", 90: "sm_90, wgmma"}

Execution = tuple[str, str, tuple[Any, ...], tuple[int, int, int], list[tuple[int, bytes, str]]]
"""PTX, kernel, what a launch is given, its cluster, and its memory: address, bytes, name."""


@dataclass(frozen=True)
class PtxSpeed:
    """What a case costs.

    Attributes:
        name: of the case.
        warp_instructions: that its launches execute, or that a tile step does.
        cost: seconds, or instructions of the host.
    """

    name: str
    warp_instructions: int
    cost: float


# ------------------------------------------------------------------------------------------------------------ launches


def cases() -> dict[str, list[Execution]]:
    """Return the launches of each case by its name; those of a tile step in two cases, ``... 5`` and ``... 9``."""
    found: dict[str, list[Execution]] = {}
    for arch, name in ARCHS.items():
        for steps in (SHORT, LONG):
            found[f"{name}: {steps}"] = _recorded(arch, partial(_tile, 64 * steps))
        found[f"{name}: training step"] = _recorded(arch, _step)
    return found


def _recorded(arch: int, run: Any) -> list[Execution]:
    """Return what ``run`` launches, with the memory that it was given."""
    from resnet_fast.tools.ptx_machine.recorded import recorded

    with recorded(arch) as (_, launches):
        run()
    return [
        (one.text, one.kernel, one.given, one.cluster, [(at, content, name) for at, content, name, *_ in one.ranges])
        for one in launches
    ]


def _tile(ci: int) -> None:
    """Run one block of a 1x1 convolution: 128 pixels, 128 output channels, 64 input channels at a time."""
    from resnet_fast.backends.triton.problem import problem
    from resnet_fast.spec import ConvSpec, Epilogue, LaunchSpec
    from resnet_fast.tuning.configs import Config

    kernel, relu = "conv_bn_act_1x1", Epilogue(relu=True)
    spec = ConvSpec(1, 8, 16, ci, 128, 1, 1, dtype="bfloat16", epilogue=relu)
    problem(LaunchSpec(kernel, (spec,))).prepared(Config(kernel, 128, 128, 64, 8, 3))()


def _step() -> None:
    """Run a training step of a bottleneck."""
    import torch
    from torchvision.models.resnet import Bottleneck

    from resnet_fast import accelerate

    torch.manual_seed(0)
    net = accelerate(Bottleneck(64, 16), backend="triton").to(memory_format=torch.channels_last).train()
    x = torch.randn(2, 64, 9, 11).contiguous(memory_format=torch.channels_last).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = net(x)
    y.backward(torch.randn_like(y))


# ----------------------------------------------------------------------------------------------------------- execution


def _prepared(execution: Execution) -> Any:
    """Return a function that executes a launch once and returns how many instructions of warps it took."""
    from resnet_fast import _ptx

    text, kernel, given, cluster, ranges = execution
    memory, module, held = _ptx.Memory(), _ptx.Module(text, kernel), []
    module.check(kernel)
    for n, (address, content, name) in enumerate(ranges):
        own = (ctypes.c_char * len(content)).from_buffer_copy(content)
        held.append(own)
        memory.add(address, len(content), f"{n}: {name}", host=ctypes.addressof(own))

    def execute() -> int:
        report = module.launch(kernel, *given, memory, cluster=cluster)
        assert held, "the memory of the launch is there while it runs"
        return int(report.counters["instructions"])

    return execute


def speeds(costs: dict[str, tuple[int, float]]) -> list[PtxSpeed]:
    """Return the rows of the table from warp instructions and cost of each case."""
    rows = []
    for name in ARCHS.values():
        (least, a), (most, b) = (costs.pop(f"{name}: {steps}") for steps in (SHORT, LONG))
        steps = LONG - SHORT
        rows.append(PtxSpeed(f"{name}: tile step, 128 x 128 x 64", (most - least) // steps, (b - a) / steps))
    return rows + [PtxSpeed(name, *cost) for name, cost in costs.items()]


def timed(rounds: int) -> list[PtxSpeed]:
    """Execute all cases in turn, ``rounds`` times, and return medians of seconds."""
    ready = {name: [_prepared(one) for one in launches] for name, launches in cases().items()}
    instructions = {name: sum(one() for one in every) for name, every in ready.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(rounds):
        for name, every in ready.items():
            start = time.perf_counter()
            for one in every:
                one()
            seconds[name].append(time.perf_counter() - start)
    return speeds({name: (instructions[name], statistics.median(took)) for name, took in seconds.items()})


def counted(top: int = 0) -> tuple[list[PtxSpeed], dict[str, list[tuple[str, int]]]]:
    """Execute each case once under callgrind, and return instructions of the host, and the ``top`` functions of each.

    Raises:
        UserError: there is no valgrind.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "launches"
        path.write_bytes(pickle.dumps(cases()))
        parts = callgrind.run("from resnet_fast.benchmarks.ptx_speed import run; run()", str(path))
    costs, functions = {}, {}
    for part in parts:
        name, _, instructions = part.name.rpartition("|")
        if name:
            costs[name] = int(instructions), float(part.functions.total())
            functions[name] = [(f, n) for (_, f), n in part.functions.most_common(top)]
    return speeds(costs), functions


def run() -> None:
    """Execute the launches of a file, a part for each case. The program under callgrind."""
    requests = callgrind.Requests()
    for name, launches in pickle.loads(Path(sys.argv[1]).read_bytes()).items():
        every = [_prepared(one) for one in launches]
        requests.start()
        instructions = sum(one() for one in every)
        requests.stop()
        requests.part(f"{name}|{instructions}")


def table(rows: Sequence[PtxSpeed], counts: bool) -> str:
    """Return the figures as a table."""
    cells = [
        (r.name, f"{r.warp_instructions:,}", f"{r.cost:,.0f}", f"{r.cost / r.warp_instructions:,.0f}")
        if counts
        else (r.name, f"{r.warp_instructions:,}", f"{1e3 * r.cost:,.2f}", f"{r.warp_instructions / r.cost / 1e6:.2f}")
        for r in rows
    ]
    host = ("host instructions", "per warp instruction") if counts else ("ms, median", "warp instructions, M/s")
    return markdown.table(("case", "warp instructions", *host), cells, (LEFT, *[RIGHT] * 3))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", action="store_true", help="count host instructions under callgrind; no clock")
    parser.add_argument("--top", type=int, default=0, help="with --count: the functions that take most")
    parser.add_argument("--rounds", type=int, default=9, help="of all cases, one after another (default 9)")
    chosen = parser.parse_args(argv)
    if not chosen.count:
        print(table(timed(chosen.rounds), False))
        return
    rows, functions = counted(chosen.top)
    print(table(rows, True))
    for name, most in functions.items():
        for function, instructions in most:
            print(f"{name}: {instructions:,} {function}")


if __name__ == "__main__":
    main()
