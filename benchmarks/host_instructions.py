"""Count the instructions that a step of a net takes on the host, ours and stock PyTorch's, without a GPU.

    python -m resnet_fast.benchmarks.host_instructions                     every case on the GPU, as a table
    python -m resnet_fast.benchmarks.host_instructions --case train-amp --top 40

The steps are those of :mod:`.host_time` on a GPU that computes nothing (:mod:`.null_gpu`), run under valgrind
(:mod:`.callgrind`). The host code of cuDNN and of the driver is missing, and so is that of an optimizer. Stock PyTorch
spends most of its host time in the first two. We launch without the first and make no more launches, so the ratio of a
step that launches its kernels is an upper bound. That of a replayed graph is none: its one launch is the driver's.
An instruction is no unit of time: Python's take longer than those of C++, because more of them miss the caches.

The case of the CPU runs on the CPU itself, with a small image. Only Python's own instructions are counted there: what
PyTorch and oneDNN execute is mostly the convolutions.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

import resnet_fast
from resnet_fast.benchmarks import callgrind, extension, host_time, markdown, null_gpu
from resnet_fast.benchmarks.host_time import CASES as GPU_CASES
from resnet_fast.benchmarks.host_time import HostCase, Step
from resnet_fast.benchmarks.markdown import LEFT, RIGHT

ROUNDS = 3
"""Steps of each net that are counted; the median is taken."""

WARM_UP = 12
"""Steps of each net before: the first ones plan, prepare and keep, and CPython specialises its code as it runs."""

IMAGE = 32
"""Height and width of the image of :data:`ON_CPU`, in pixels."""

CASES: dict[str, HostCase] = GPU_CASES | {
    "infer-graph": HostCase(False, torch.bfloat16, False, 1, graph=True),
    "infer-graph-frozen": HostCase(False, torch.bfloat16, False, 1, graph=True, frozen=True),
}

ON_CPU = "infer-cpu"
"""The case of a net on the CPU, in fp32 and with one image. Its convolutions take minutes under valgrind, so it runs by
request only, best with a small model."""

SIDES = ("ours", "stock")

_LIBRARIES = {
    "libpython": "python",
    "python3": "python",
    "libtorch": "torch",
    "libc10": "torch",
    "_C.": "_C",
    "_host.": "_host",
    "libtriton": "triton",
    "resnet_fast_null_gpu": "null GPU",
}
"""How an object file's name begins -> the library that it is counted as; everything else is ``system``."""


@dataclass(frozen=True)
class StepCount:
    """The instructions of a step.

    Attributes:
        phases: instructions by phase, the median over rounds.
        libraries: instructions by library, likewise.
        functions: the functions with the most instructions of their own: (library, function, instructions).
        spread: the largest difference between two rounds over the median.
    """

    phases: dict[str, int]
    libraries: dict[str, int]
    functions: list[tuple[str, str, int]]
    spread: float

    @property
    def total(self) -> int:
        """Instructions of the whole step."""
        return sum(self.phases.values())


Counts = dict[str, dict[str, StepCount]]
"""Case -> side -> what a step of it takes."""


def count(cases: Sequence[str] = (), model: str = "resnet50", rounds: int = ROUNDS) -> Counts:
    """Run the cases (all of :data:`CASES` by default) in one process under valgrind and return what their steps take.

    Raises:
        UserError: there is no valgrind.
        RuntimeError: a case fails.
    """
    extension.built(null_gpu.SOURCE)  # outside of valgrind
    code = f"from resnet_fast.benchmarks.host_instructions import run; run({model!r}, {rounds})"
    return _read(callgrind.run(code, *(cases or CASES)))


# ------------------------------------------------------------------------------------------------ under valgrind


def run(model: str, rounds: int) -> None:
    """Run the cases that the command line names, and end the process: a part for each phase of each step."""
    requests = callgrind.Requests()
    null_gpu.install()
    torch.set_num_threads(1)
    for name in sys.argv[1:]:
        for side, phases in zip(SIDES, _phases(model, name), strict=True):
            for _ in range(WARM_UP):
                for step in phases.values():
                    step()
            gc.collect()
            gc.disable()  # a collection belongs to no step
            requests.start()
            for _ in range(rounds + 1):
                requests.part(f"{name}|{side}|")  # what a request costs
                for phase, step in phases.items():
                    step()
                    requests.part(f"{name}|{side}|{phase}")
            requests.stop()
            gc.enable()
    sys.stdout.flush()
    os._exit(0)  # the null GPU's threads wait for ever


def _phases(model: str, name: str) -> Iterator[dict[str, Step]]:
    """Yield the phases of our step and of stock's."""
    if name in CASES:
        for net in host_time.nets(model, CASES[name]):
            yield host_time.phases_of(net, CASES[name])
        return
    from torchvision import models

    torch.manual_seed(0)
    x = torch.randn(1, 3, IMAGE, IMAGE)
    net = models.get_model(model).eval()
    stock = models.get_model(model).eval()
    stock.load_state_dict(net.state_dict())
    resnet_fast.accelerate(net, backend="onednn")  # by name, it packs at once
    for each in (net, stock):
        yield {"inference": partial(_infer, each, x)}


def _infer(net: torch.nn.Module, x: torch.Tensor) -> None:
    with torch.inference_mode():
        net(x)


# --------------------------------------------------------------------------------------------------- its results


def library_of(path: str) -> str:
    """Return what an object file is counted as."""
    name = path.rsplit("/", 1)[-1]
    return next((library for start, library in _LIBRARIES.items() if name.startswith(start)), "system")


def _read(parts: Sequence[callgrind.CountedPart]) -> Counts:
    """Return the counts of a run's parts."""
    rounds: dict[str, dict[str, dict[str, list[Counter[tuple[str, str]]]]]] = {}
    for part in parts:
        if part.name:
            case, side, phase = part.name.split("|")
            rounds.setdefault(case, {}).setdefault(side, {}).setdefault(phase, []).append(part.functions)
    return {case: {side: _step(phases, case) for side, phases in sides.items()} for case, sides in rounds.items()}


def _step(rounds: dict[str, list[Counter[tuple[str, str]]]], case: str) -> StepCount:
    """Return the count of a step from the functions of its phases in each round; the first round is left out."""
    request = _by_library(rounds[""][-1], case)
    phases: dict[str, int] = {}
    libraries: Counter[str] = Counter()
    functions: Counter[tuple[str, str]] = Counter()
    spread = 0.0
    for phase, found in rounds.items():
        if not phase:
            continue
        counted = [_by_library(one, case) - request for one in found[1:]]
        for library in counted[0]:
            libraries[library] += int(statistics.median([one[library] for one in counted]))
        totals = [sum(one.values()) for one in counted]
        phases[phase] = int(statistics.median(totals))
        spread = max(spread, (max(totals) - min(totals)) / phases[phase])
        for (path, name), n in found[-1].items():
            functions[library_of(path), name] += n
    top = [(library, name, n) for (library, name), n in functions.most_common(200)]
    return StepCount(phases, dict(libraries.most_common()), top, spread)


def _by_library(functions: Counter[tuple[str, str]], case: str) -> Counter[str]:
    found: Counter[str] = Counter()
    for (path, _), n in functions.items():
        found[library_of(path)] += n
    return Counter({"python": found["python"]}) if case == ON_CPU else found


def rows(counts: Counts) -> Iterator[tuple[str, ...]]:
    """Yield the cells of a table, in the order of :data:`HEAD`."""
    for case, sides in counts.items():
        ours, stock = (sides[side] for side in SIDES)
        phases = [*ours.phases] if len(ours.phases) > 1 else []
        for phase in ["", *phases]:
            mine, theirs = (one.phases[phase] if phase else one.total for one in (ours, stock))
            split = "" if phase else ", ".join(f"{name} {n / 1e3:,.0f}" for name, n in ours.libraries.items())
            yield f"{case} {phase}".strip(), f"{mine / 1e3:,.0f}", f"{theirs / 1e3:,.0f}", f"{mine / theirs:.2f}", split


HEAD = ("step", "ours", "stock", "ratio", "ours by library")


def table(counts: Counts) -> str:
    """Return the counts as Markdown, in thousands of instructions."""
    return markdown.table(HEAD, rows(counts), (LEFT, RIGHT, RIGHT, RIGHT, LEFT))


MISSING = (
    "In thousands of instructions, counted. Missing are the host code of cuDNN and cuBLAS, which is stock's, "
    "the driver's part of every launch of both, and an optimizer. So the ratio of a step that launches its "
    "kernels is an upper bound; that of a replayed graph is none, because its one launch is the driver's. "
    "Python's cyclic garbage collection is left out."
)


def versions() -> dict[str, str]:
    """Return what the counts depend on, apart from this package."""
    import platform
    import sysconfig

    import torchvision
    import triton

    options = sysconfig.get_config_var("CONFIG_ARGS") or ""
    optimized = "optimized" if "--enable-optimizations" in options else "not optimized"
    return {
        "python": f"{platform.python_version()} by {platform.python_compiler()}, {optimized}",
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "triton": triton.__version__,
        "valgrind": callgrind.version(),
        "system": f"{platform.machine()}, {' '.join(platform.libc_ver())}",
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m resnet_fast.benchmarks.host_instructions", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", default="resnet50", help="a net of torchvision")
    parser.add_argument(
        "--case", choices=(*CASES, ON_CPU), action="append", help="may be given several times; default: all on the GPU"
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="steps of each net to count")
    parser.add_argument("--top", type=int, default=0, help="also print so many functions of our step")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    counts = count(options.case or (), options.model, options.rounds)
    if options.json:
        print(json.dumps({case: {side: vars(one) for side, one in sides.items()} for case, sides in counts.items()}))
        return
    print(MISSING, table(counts), sep="\n\n")
    for case, sides in counts.items():
        for library, name, n in sides["ours"].functions[: options.top]:
            print(f"{case}: {n:10,} {library} {name}")


if __name__ == "__main__":
    main()
