"""The least time a problem can take on a device: bytes over bandwidth or operations over rate, whichever is longer.

Every figure of a :class:`Device` carries its origin: ``measured`` on such a device, ``published`` by its maker, or
``modelled`` from another figure. A floor is a bound of the model, not of nature: bytes count as if no cache held
anything before the call, so a problem that fits a cache may beat its floor when it runs again and again.

Torch-free, except for :func:`calibrate_cpu`, which imports torch when it is called.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Any

from .errors import UserError
from .spec import ITEMSIZE, BlockSpec, ConvSpec, PointwiseSpec, Spec

ORIGINS = ("measured", "published", "modelled")


@dataclass(frozen=True)
class Ceiling:
    """One upper bound of a device: bytes/s or FLOP/s, and where the figure comes from (one of :data:`ORIGINS`)."""

    value: float
    origin: str


@dataclass(frozen=True)
class Device:
    """``bandwidth`` in bytes/s (read plus written); ``rates`` in FLOP/s (two per multiply-add) by dtype name."""

    name: str
    bandwidth: Ceiling
    rates: tuple[tuple[str, Ceiling], ...]

    def rate(self, dtype: str) -> Ceiling:
        """The rate for ``dtype``; :class:`UserError` where none is known."""
        for name, ceiling in self.rates:
            if name == dtype:
                return ceiling
        known = ", ".join(name for name, _ in self.rates)
        raise UserError(f"a dtype that {self.name} has a known rate for", dtype, f"use one of {known}")


H100 = Device(
    "NVIDIA H100 SXM",
    bandwidth=Ceiling(3.02e12, "measured"),  # copy of a large tensor, torch 2.11
    rates=(
        ("bfloat16", Ceiling(792e12, "measured")),  # 8192^3 matrix product, torch 2.11
        ("float16", Ceiling(792e12, "modelled")),  # the same tensor cores at the same rate as bfloat16
        ("float32", Ceiling(494.5e12, "published")),  # TF32, dense: half of the data sheet's figure with sparsity
        ("float64", Ceiling(67e12, "published")),
        ("float8_e4m3fn", Ceiling(1979e12, "published")),
        ("int8", Ceiling(1979e12, "published")),
    ),
)


def _best_rate(work: float, run: Callable[[], Any], budget_s: float) -> float:
    """Highest ``work``/s over runs that together take about ``budget_s``: the best run is the least disturbed one."""
    run()  # the first touches pages and builds oneDNN's primitive
    best, end = float("inf"), time.perf_counter() + budget_s
    while True:
        start = time.perf_counter()
        run()
        now = time.perf_counter()
        best = min(best, now - start)
        if now > end:
            return work / best


@cache
def calibrate_cpu() -> Device:
    """This machine's copy bandwidth and matrix-product rates with torch's current threads; about 0.2 s, once.

    Copy: 32 MiB to another 32 MiB, beyond the usual caches, bytes read plus written. Rates: the better of a small and
    a large square product, because a large one fills many cores, and only a small one finds a quiet moment on a busy
    machine. Where bfloat16 is emulated and slower, its ceiling is float32's, because a kernel may convert; float16 and
    float64 are modelled from those two. Other load makes the ceilings too low, and so the floors too high.
    """
    import torch

    def product(dtype: torch.dtype, size: int) -> float:
        a, out = torch.ones(size, size, dtype=dtype), torch.empty(size, size, dtype=dtype)
        return _best_rate(2 * size**3, partial(torch.mm, a, a, out=out), 0.03)

    with torch.inference_mode():
        source = torch.ones(8 * 2**20)
        target = torch.empty_like(source)
        bandwidth = _best_rate(2 * source.numel() * 4, lambda: target.copy_(source), 0.04)
        small, half = product(torch.float32, 256), product(torch.bfloat16, 256)
        full = max(small, product(torch.float32, 768))
        if half > small:  # not emulated: the large product will not take long
            half = max(half, product(torch.bfloat16, 768))
    f32 = Ceiling(full, "measured")
    bf16 = Ceiling(half, "measured") if half > full else Ceiling(full, "modelled")
    return Device(
        f"CPU {platform.machine()}, {torch.get_num_threads()} threads",
        bandwidth=Ceiling(bandwidth, "measured"),
        rates=(
            ("float32", f32),
            ("bfloat16", bf16),
            ("float16", Ceiling(bf16.value, "modelled")),
            ("float64", Ceiling(f32.value / 2, "modelled")),
        ),
    )


def _separate_bytes(spec: Spec) -> int:
    """Every operation its own kernel: conv, then norm, add, ReLU and pooling, each through memory."""
    if isinstance(spec, BlockSpec):
        return sum(_separate_bytes(c) for c in spec.convs)
    size = ITEMSIZE[spec.dtype]
    e = spec.epilogue
    if isinstance(spec, PointwiseSpec):
        y, total = spec.n * spec.h * spec.w * spec.c * size, 0
    else:
        y = spec.n * spec.ho * spec.wo * spec.co * size
        total = spec.with_(epilogue=type(e)(norm=False)).min_bytes()
    total += 2 * y * e.norm + 3 * y * e.add + 2 * y * e.relu
    if isinstance(spec, ConvSpec) and e.pool:
        ho, wo = spec.out_hw()
        total += y + spec.n * ho * wo * spec.co * size
    return total


def _conv_bytes(spec: Spec) -> int:
    """One kernel per convolution, its epilogue fused."""
    return sum(c.min_bytes() for c in spec.convs) if isinstance(spec, BlockSpec) else spec.min_bytes()


def _block_bytes(spec: Spec) -> int:
    """One kernel per spec: a whole block reads its input and weights and writes its output, nothing in between."""
    return spec.min_bytes()


PLANS: dict[str, Callable[[Spec], int]] = {"separate": _separate_bytes, "conv": _conv_bytes, "block": _block_bytes}
"""The byte model of each fusion plan; a new plan is one more function here."""


def bytes_moved(spec: Spec, plan: str = "block") -> int:
    """Bytes read plus written under a fusion plan of :data:`PLANS`; :class:`UserError` for an unknown plan."""
    if plan not in PLANS:
        raise UserError(f"a fusion plan out of {', '.join(PLANS)}", repr(plan), "choose one of them")
    return PLANS[plan](spec)


@dataclass(frozen=True)
class Floor:
    """A least time. ``bound``: memory or compute, whichever takes longer. ``origin``: that of the binding figure, or
    ``mixed`` in a sum. ``nbytes``: bytes read plus written; ``flops``: two per multiply-add."""

    seconds: float
    bound: str
    origin: str
    memory_s: float
    compute_s: float
    nbytes: int
    flops: int
    device: str
    plan: str

    @property
    def intensity(self) -> float:
        """FLOP per byte."""
        return self.flops / self.nbytes if self.nbytes else 0.0

    def to_dict(self) -> dict[str, float | int | str]:
        """One flat row, for CSV or JSON."""
        return asdict(self) | {"intensity": self.intensity}


def floor_seconds(spec: Spec, device: Device, plan: str = "block") -> Floor:
    """The roofline of one problem: ``max(bytes / bandwidth, flops / rate)`` (Williams et al., Roofline, 2009)."""
    nbytes, flops, rate = bytes_moved(spec, plan), spec.flops(), device.rate(spec.dtype)
    memory_s, compute_s = nbytes / device.bandwidth.value, flops / rate.value
    memory = memory_s >= compute_s
    return Floor(
        seconds=max(memory_s, compute_s),
        bound="memory" if memory else "compute",
        origin=device.bandwidth.origin if memory else rate.origin,
        memory_s=memory_s,
        compute_s=compute_s,
        nbytes=nbytes,
        flops=flops,
        device=device.name,
        plan=plan,
    )


def net_floor(specs: Iterable[Spec], device: Device, plan: str = "block") -> Floor:
    """The floors of problems that run one after another, summed; ``bound`` says which kind takes most of the time."""
    floors = [floor_seconds(spec, device, plan) for spec in specs]
    if not floors:
        raise UserError("at least one problem", "none", "pass the values of tuning.shapes.problems(...)")
    seconds = sum(f.seconds for f in floors)
    in_memory = sum(f.seconds for f in floors if f.bound == "memory")
    origins = {f.origin for f in floors}
    return Floor(
        seconds=seconds,
        bound="memory" if in_memory >= seconds / 2 else "compute",
        origin=origins.pop() if len(origins) == 1 else "mixed",
        memory_s=sum(f.memory_s for f in floors),
        compute_s=sum(f.compute_s for f in floors),
        nbytes=sum(f.nbytes for f in floors),
        flops=sum(f.flops for f in floors),
        device=device.name,
        plan=plan,
    )
