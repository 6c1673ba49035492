"""Compile the kernels of a ResNet-50 training step with one worker and with several, from an empty cache each time.

    python -m resnet_fast.benchmarks.cold_start [--infer] [--workers 2] [--rounds 3] [--every 1]

Needs no GPU: it compiles for an H100. Every round is a process of its own per number of workers, in turn, so that a
disturbance reaches both. Prints seconds of wall clock and of CPU, and their ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any


def planned(train: bool) -> list[Any]:
    """Return the compile jobs of ResNet-50 at batch 256 in bfloat16: of inference, or of a training step."""
    import torch
    from torchvision.models import resnet50

    import resnet_fast
    from resnet_fast.backends.triton import ahead

    found: list[Any] = []
    compile_all = ahead.compile_all
    ahead.compile_all = lambda jobs, workers, on_progress=None: found.extend(jobs) or {}  # type: ignore[func-returns-value]
    try:
        kept = torch.float32 if train else torch.bfloat16
        model = resnet_fast.accelerate(resnet50().train(train)).to(kept).to(memory_format=torch.channels_last)
        x = torch.empty(256, 3, 224, 224, dtype=kept, device="meta")
        resnet_fast.warm(model, x, train, gpu="h100", rounded=torch.bfloat16 if train else None)
    finally:
        ahead.compile_all = compile_all
    return found


def one(train: bool, workers: int, every: int) -> dict[str, float]:
    """Compile in this process and return its figures."""
    from resnet_fast.backends.triton import compiling

    jobs = planned(train)[::every]
    before, start = _cpu(), time.perf_counter()
    failed = compiling.compile_all(jobs, workers)
    assert not failed, failed
    return {"kernels": len(jobs), "wall": time.perf_counter() - start, "cpu": _cpu() - before}


def _cpu() -> float:
    """Return CPU seconds of this process and of those that it has waited for, such as ptxas."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def _apart(arguments: list[str], workers: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-m", "resnet_fast.benchmarks.cold_start", *arguments, "--one", str(workers)]
        done = subprocess.run(
            command, env={**os.environ, "TRITON_CACHE_DIR": cache}, check=True, stdout=subprocess.PIPE, text=True
        )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--infer", action="store_true", help="inference instead of a training step")
    parser.add_argument("--workers", type=int, default=2, help="kernels to compile at a time")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--every", type=int, default=1, help="compile every n-th kernel only")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(one(not given.infer, given.one, given.every)))
        return
    arguments = [*(["--infer"] if given.infer else []), "--every", str(given.every)]
    rounds = [(_apart(arguments, 1), _apart(arguments, given.workers)) for _ in range(given.rounds)]
    for single, several in rounds:
        print(
            f"{single['kernels']:.0f} kernels: 1 worker {single['wall']:.1f} s wall, {single['cpu']:.1f} s CPU; "
            f"{given.workers} workers {several['wall']:.1f} s wall, {several['cpu']:.1f} s CPU"
        )
    faster = statistics.median(single["wall"] / several["wall"] for single, several in rounds)
    dearer = statistics.median(several["cpu"] / single["cpu"] for single, several in rounds)
    print(f"{given.workers} workers: {faster:.2f} times as fast (median), {dearer:.2f} times the CPU")


if __name__ == "__main__":
    main()
