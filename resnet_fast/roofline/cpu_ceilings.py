"""Measure the most that this CPU can do, so that floors computed from it are real bounds.

A ceiling is the best rate that any run ever measured on this machine, plus an allowance. A busy machine measures less,
so the best of earlier runs counts; the cache folder keeps them (``ceilings.json``) by CPU model, threads and torch
version. Rates of one thread are measured in pieces of a millisecond or less, which find a quiet moment on a busy
machine, and multiplied by the threads. For memory, which the threads share, the ceiling of many threads is far above
what the chip does, but no call can exceed it.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

from .. import flags
from ..devices import Cache, Ceiling, Device, cpu_model
from ..io import safe_files

ALLOWANCE = 1.15
"""How much better a kernel may be than the best of ours: the rates are those of good kernels, not of the chip."""

CACHE_ALLOWANCE = 2.0
"""The same for a cache: a copy reads and writes in turn, and a core can do both at once."""

MEASURES = ("float32", "bfloat16", "cache", "memory")


def _best_rate(work: float, run: Callable[[], Any], budget_s: float) -> float:
    """Return the highest ``work``/s, that of the least disturbed run. All runs take about ``budget_s``."""
    run()  # the first touches pages and builds oneDNN's primitive
    best, end = math.inf, time.perf_counter() + budget_s
    while True:
        start = time.perf_counter()
        run()
        now = time.perf_counter()
        if now > start:
            best = min(best, now - start)
        if now > end:
            return work / best


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure() -> dict[str, float]:
    """Measure the rates of one thread now, in about 0.3 s.

    Returns:
        FLOP/s by dtype, and bytes/s (read plus written) in the caches and in memory, by the names of :data:`MEASURES`.
    """
    import torch
    from torch.nn.functional import conv2d

    def product(dtype: torch.dtype) -> float:
        a, out = torch.ones(256, 256, dtype=dtype), torch.empty(256, 256, dtype=dtype)
        return _best_rate(2 * 256**3, partial(torch.mm, a, a, out=out), 0.03)

    def convolution(dtype: torch.dtype) -> float:
        """Convolve, because oneDNN may use this CPU better than the library of matrix products, or worse."""
        x, weight = (
            torch.ones(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)
            for shape in ((1, 64, 58, 58), (64, 64, 3, 3))
        )
        return _best_rate(2 * 64 * 64 * 9 * 56 * 56, partial(conv2d, x, weight), 0.05)

    found: dict[str, float] = {}
    with torch.inference_mode(), _one_thread():
        found["float32"] = max(product(torch.float32), convolution(torch.float32))
        found["bfloat16"] = product(torch.bfloat16)
        if found["bfloat16"] > found["float32"] / 4:  # emulated, a convolution takes long and is slower still
            found["bfloat16"] = max(found["bfloat16"], convolution(torch.bfloat16))
        source = torch.ones(64 * 1024)  # 256 KiB and its copy are in the core's own caches
        target = torch.empty_like(source)
        found["cache"] = _best_rate(2 * source.nbytes, lambda: target.copy_(source), 0.02)
        large = torch.ones(8 * 2**20)
        other = torch.empty_like(large)
        copied = _best_rate(2 * large.nbytes, lambda: other.copy_(large), 0.05)
        found["memory"] = max(copied, _best_rate(large.nbytes, large.sum, 0.05))
    return found


def _machine(threads: int) -> str:
    import torch

    return f"{cpu_model()}, {threads} threads, torch {torch.__version__}"


def _file() -> Path:
    return flags.cache_folder() / "ceilings.json"


def _kept(path: Path) -> dict[str, dict[str, float]]:
    """Return the best rates by machine; empty if there is no file, or one that cannot be read."""
    try:
        content = safe_files.json_value(safe_files.read_plain(path))
    except (OSError, ValueError):
        return {}
    machines = content.get("machines") if isinstance(content, dict) else None
    if not isinstance(machines, dict):
        return {}

    def sound(rates: Any) -> bool:
        good = isinstance(rates, dict) and set(rates) == set(MEASURES)
        return good and all(isinstance(r, (int, float)) and 0 < r < 1e17 for r in rates.values())

    return {name: rates for name, rates in machines.items() if sound(rates)}


def best(threads: int) -> tuple[dict[str, float], str]:
    """Measure now, and return the best rates of this machine and where they are kept (or why they are not)."""
    now, name, path = measure(), _machine(threads), _file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with safe_files.locked(path):
            machines = _kept(path)
            before = machines.get(name, now)
            machines[name] = {what: max(rate, before[what]) for what, rate in now.items()}
            text = safe_files.json_text(
                {"unit": "FLOP/s and bytes/s, the best measured", "machines": machines}, indent=1
            )
            safe_files.write_whole(path, (text + "\n").encode())
        return machines[name], f"kept in {path}"
    except OSError as error:
        best_known = _kept(path).get(name, now)
        return {what: max(rate, best_known[what]) for what, rate in now.items()}, f"not kept: {error}"


def cache_bytes() -> int:
    """Return the bytes of all data caches of all CPUs, as Linux reports them; 1 GiB, more than most have, elsewhere."""
    seen: dict[tuple[str, str, str], int] = {}
    try:
        for index in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index*"):
            level, kind, shared = ((index / f).read_text().strip() for f in ("level", "type", "shared_cpu_list"))
            size = (index / "size").read_text().strip()
            if kind != "Instruction":
                seen[level, kind, shared] = int(size[:-1]) * {"K": 2**10, "M": 2**20, "G": 2**30}[size[-1]]
    except (OSError, ValueError, KeyError):
        return 2**30
    return sum(seen.values()) or 2**30


@cache
def calibrate_cpu() -> Device:
    """Return the ceilings of this CPU with torch's current threads; measured once per process, in about 0.3 s.

    bfloat16 is never below float32, because a kernel may convert. float16 and float64 are modelled from those two.
    """
    import torch

    threads = torch.get_num_threads()
    rates, place = best(threads)
    source = f"the best measured here by any run, plus {ALLOWANCE - 1:.0%}; {place}"
    f32 = Ceiling(rates["float32"] * threads * ALLOWANCE, "measured", source)
    half = rates["bfloat16"] * threads * ALLOWANCE
    bf16 = Ceiling(half, "measured", source) if half > f32.value else Ceiling(f32.value, "modelled", "as float32")
    twice = f"the best copy in a core's caches, times {CACHE_ALLOWANCE:g} and {threads} threads"
    return Device(
        f"{cpu_model()}, {threads} threads",
        bandwidth=Ceiling(rates["memory"] * threads * ALLOWANCE, "measured", source),
        rates=(
            ("float32", f32),
            ("bfloat16", bf16),
            ("float16", Ceiling(bf16.value, "modelled", "as bfloat16")),
            ("float64", Ceiling(f32.value / 2, "modelled", "half of float32")),
        ),
        cache=Cache(cache_bytes(), Ceiling(rates["cache"] * threads * CACHE_ALLOWANCE, "modelled", twice)),
    )
