"""Describe what devices can do: bandwidths, tensor-core rates and launch costs, each with its origin and source.

Every figure is a :class:`Ceiling` with an origin: ``measured`` on such a device, ``published`` by its maker, or
``modelled`` from other figures. The H100's copy bandwidth and bfloat16 rate were measured. Every other figure of a data
sheet is scaled by the part of its published figure that the H100 reached, so that devices and dtypes are comparable;
``Ceiling.published`` keeps the published peak::

    modelled = published * measured(H100) / published(H100)      copy: 3.02 / 3.35 = 0.90,  bfloat16: 792 / 989.4 = 0.80

Rates are dense (no 2:4 sparsity), two operations per multiply-add, sums in fp32 (int32 for int8). ``float32`` means
TF32 products; ``float64`` the tensor cores' where there are any. Torch-free, except for :func:`check_device`. For
this CPU's rates see roofline/cpu_ceilings.py.
"""

from __future__ import annotations

import difflib
import platform
import re
from dataclasses import dataclass, replace
from pathlib import Path

from .errors import UserError

ORIGINS = ("measured", "published", "modelled")

KIB, MIB = 1024, 1024 * 1024


@dataclass(frozen=True)
class Ceiling:
    """One bound of a device.

    Attributes:
        value: bytes/s, FLOP/s, or seconds of a launch.
        origin: one of :data:`ORIGINS`.
        source: where the figure comes from, in words.
        published: the maker's peak, if ``value`` is another.
    """

    value: float
    origin: str
    source: str = ""
    published: float | None = None


@dataclass(frozen=True)
class Gpu:
    """The resources of a CUDA device that decide the shape of a kernel.

    The limits by architecture are those of the CUDA C++ Programming Guide, technical specifications per compute
    capability.

    Attributes:
        arch: compute capability times ten.
        sms: streaming multiprocessors.
        shared_per_sm, shared_per_block: bytes of shared memory; per block with opt-in.
        registers_per_sm: registers of 32 bits.
        max_threads_per_sm: resident threads.
        l2_bytes: size of the L2 cache.
        l2_bandwidth: bytes/s that all multiprocessors together read from L2.
        launch_s: seconds from the end of one kernel to the start of a dependent one in a CUDA graph.
        clock_hz: boost clock.
    """

    arch: int
    sms: int
    shared_per_sm: int
    shared_per_block: int
    registers_per_sm: int
    max_threads_per_sm: int
    l2_bytes: int
    l2_bandwidth: Ceiling
    launch_s: Ceiling
    clock_hz: Ceiling


@dataclass(frozen=True)
class Cache:
    """All caches of a CPU together: the bytes that they hold, and their bandwidth in bytes/s, read plus written."""

    nbytes: int
    bandwidth: Ceiling


@dataclass(frozen=True)
class Device:
    """The ceilings of a device.

    Attributes:
        name: for people.
        bandwidth: of memory, in bytes/s, read plus written.
        rates: FLOP/s (two per multiply-add) by dtype name.
        gpu: the resources of a GPU.
        cache: the caches of a CPU. Its floors hold even if a call finds its tensors in the caches and leaves its result
            there.
    """

    name: str
    bandwidth: Ceiling
    rates: tuple[tuple[str, Ceiling], ...]
    gpu: Gpu | None = None
    cache: Cache | None = None

    def rate(self, dtype: str) -> Ceiling:
        """Return the rate for a dtype.

        Raises:
            UserError: none is known.
        """
        for name, ceiling in self.rates:
            if name == dtype:
                return ceiling
        known = ", ".join(name for name, _ in self.rates)
        raise UserError(f"a dtype that {self.name} has a known rate for", dtype, f"use one of {known}")


_ON_H100 = "on an H100 SXM 80 GB, torch 2.11, CUDA 13.0"
_COPY = Ceiling(3.02e12, "measured", f"copy of a large tensor {_ON_H100}; published: NVIDIA H100 data sheet", 3.35e12)
_PRODUCT = Ceiling(792e12, "measured", f"8192^3 product {_ON_H100}; published: NVIDIA H100 white paper", 989.4e12)

COPY_REACHED = 3.02 / 3.35
"""The part of its published memory bandwidth that the H100's copy reaches."""

RATE_REACHED = 792 / 989.4
"""The part of its published dense rate that the H100's large bfloat16 product reaches."""

L2_REACHED = 0.6
"""The part of the L2's width times its clock that all multiprocessors together are assumed to reach; not measured."""

LAUNCH = Ceiling(
    1.3e-6,
    "modelled",
    "for every GPU, what others measured for a graph node of a tiny kernel: 1.26 to 1.37 us on an H200 "
    "(te42kyfo/gpu-benches), about 1.3 us on an H100 (Hazy Research, no bubbles)",
)


def _copy(peak: float, source: str) -> Ceiling:
    """Return a copy's bandwidth from the published peak in bytes/s."""
    return Ceiling(peak * COPY_REACHED, "modelled", f"{source}, times {COPY_REACHED:.2f} as on the H100", peak)


def _rates(
    source: str, bf16: float, tf32: float, fp64: float, fp8: float | None, int8: float
) -> tuple[tuple[str, Ceiling], ...]:
    """Return rates by dtype from published dense peaks in TFLOP/s; None where the tensor cores lack the dtype."""
    peaks = {"bfloat16": bf16, "float16": bf16, "float32": tf32, "float64": fp64, "float8_e4m3fn": fp8, "int8": int8}
    why = f"{source}, times {RATE_REACHED:.2f} as on the H100"
    return tuple(
        (dtype, Ceiling(peak * 1e12 * RATE_REACHED, "modelled", why, peak * 1e12))
        for dtype, peak in peaks.items()
        if peak is not None
    )


def _l2(bytes_per_clock: int, clock: float, source: str) -> Ceiling:
    """Return the L2's read bandwidth: width times boost clock in Hz, times :data:`L2_REACHED`."""
    peak = bytes_per_clock * clock
    why = f"{source}, times the boost clock of {clock / 1e9:.4g} GHz, times {L2_REACHED} (assumed)"
    return Ceiling(peak * L2_REACHED, "modelled", why)


def _gpu(arch: int, sms: int, l2_mib: int, clock: float, l2_width: int, width_source: str) -> Gpu:
    """Return the resources of a product; ``clock`` is its boost clock in Hz, ``l2_width`` in bytes a clock."""
    shared_kib, threads = {
        80: (164, 2048), 89: (100, 1536), 90: (228, 2048), 100: (228, 2048), 103: (228, 2048), 120: (100, 1536)
    }[arch]  # fmt: skip
    # the system uses one KiB of each block's shared memory
    l2 = _l2(l2_width, clock, width_source)
    boost = Ceiling(clock, "published", "boost clock")
    return Gpu(arch, sms, shared_kib * KIB, (shared_kib - 1) * KIB, 65536, threads, l2_mib * MIB, l2, LAUNCH, boost)


# Surety of the products' figures: what each was compared with, in November 2026. The maker's own documents could be
# read in copies and quotations only, apart from NVIDIA's pages on the H100 PCIe and on Blackwell Ultra. "Driver": the
# CUDA driver of such a GPU printed it. "Clock": the published dense bfloat16 rate is multiprocessors * operations a
# clock (_FLOP_PER_CLOCK) * this boost clock, to 0.3 %. What no line names, the L2's widths and the caches of a B300
# above all, was not confirmed.
#
#   h100      sure: multiprocessors, L2, shared memory, bandwidth, rates (a copy of the data sheet). Clock: wrong, below
#   h200      sure: multiprocessors, bandwidth, rates (two sources). L2: unsure. Clock: as the H100's
#   a100      sure: multiprocessors, clock, L2, bandwidth, rates (two sources, clock)
#   b200      sure: multiprocessors, rates, bandwidth (one source, clock); L2 (NVIDIA's tuning guide, quoted)
#   rtx4090   sure: multiprocessors, rate (one source, clock)
#   h100pcie  sure: multiprocessors, L2, bandwidth (NVIDIA's page), rates (a copy of the data sheet). Clock: two sources
#             have 1.755 GHz; the rate is that of 1.62 GHz
#   gh200     sure: 96 GB of memory (two sources). Bandwidth: unsure. The rest is the H100's and H200's, by the chip
#   h20       sure: multiprocessors (driver), L2, shared memory, bandwidth (a user's port, which measured a copy of 3.71
#             TB/s), bfloat16, TF32, float64 and int8 (two sources). float8: unsure. Clock: unknown, for the rate is
#             limited
#   l40s      sure: multiprocessors (driver), bandwidth, clock, rates (a copy of the data sheet: its bfloat16 rate is
#             that of 2.49 GHz, its TF32 rate that of 2.52). L2: unsure. The L40 of the same chip has 96 MB (a paper), a
#             data base has 48 MB for the L40S
#   rtx5090   sure: multiprocessors, clock, L2, bandwidth, rate (two sources, clock)
#   b300      sure: multiprocessors (two users; NVIDIA's 160 are the full chip's), bfloat16 (NVIDIA's code, from its
#             data sheet). Bandwidth: NVIDIA writes "up to 8 TB/s" of the chip. int8: unsure, sources differ by a factor
#             of 30
#
# The Hopper SXM parts' clock of 1.755 GHz is the PCIe card's. Their rate is that of 1.83 GHz, which two sources give as
# the boost clock. With it the modelled L2 and shared-memory rates rise by 4 %, and with them every table and note that
# was made from the H100's. They must change together, so it stays as it is here.
_A100_WIDTH = "5,120 bytes a clock (NVIDIA A100 white paper)"
_H100_WIDTH = f"the A100's width, {_A100_WIDTH}"

H100 = Device(
    "NVIDIA H100 SXM",
    bandwidth=_COPY,
    rates=(
        ("bfloat16", _PRODUCT),
        *_rates("NVIDIA H100 white paper, SXM5 column, dense", 989.4, 494.7, 66.9, 1978.9, 1978.9)[1:],
    ),
    gpu=_gpu(90, 132, 50, 1.755e9, 5120, _H100_WIDTH),
)

H200 = Device(
    "NVIDIA H200",
    bandwidth=_copy(4.8e12, "NVIDIA H200 data sheet, SXM column"),
    rates=_rates("NVIDIA H200 data sheet, SXM column, dense", 989.4, 494.7, 66.9, 1978.9, 1978.9),
    gpu=_gpu(90, 132, 60, 1.755e9, 5120, _H100_WIDTH),  # the same chip, with another memory and more of its L2 cache
)

A100 = Device(
    "NVIDIA A100 SXM 80 GB",
    bandwidth=_copy(2.039e12, "NVIDIA A100 data sheet, 80GB SXM column"),
    rates=_rates("NVIDIA A100 data sheet, dense", 312, 156, 19.5, None, 624),
    gpu=_gpu(80, 108, 40, 1.41e9, 5120, _A100_WIDTH),
)

B200 = Device(
    "NVIDIA B200",
    bandwidth=_copy(7.7e12, "NVIDIA HGX B200 data sheet, one GPU of eight"),
    rates=_rates("NVIDIA HGX B200 data sheet, half of the figures with sparsity", 2250, 1100, 37, 4500, 4500),
    gpu=_gpu(100, 148, 126, 1.86e9, 2 * 5120, f"two dies of the A100's width, {_A100_WIDTH}"),
)

RTX_4090 = Device(
    "NVIDIA GeForce RTX 4090",
    bandwidth=_copy(1.008e12, "NVIDIA Ada architecture white paper"),
    rates=_rates("NVIDIA Ada architecture white paper, RTX 4090, dense", 165.2, 82.6, 1.29, 330.3, 660.6),
    gpu=_gpu(89, 128, 72, 2.52e9, 36 * 64, "36 slices of 2 MB, 64 bytes a clock each (assumed)"),
)

H100_PCIE = Device(
    "NVIDIA H100 PCIe",
    bandwidth=_copy(2.0e12, "NVIDIA H100 PCIe data sheet"),
    rates=_rates("NVIDIA H100 data sheet, PCIe column, half of the figures with sparsity", 756, 378, 51, 1513, 1513),
    gpu=_gpu(90, 114, 50, 1.755e9, 5120, _H100_WIDTH),
)

GH200 = Device(
    "NVIDIA GH200",
    bandwidth=_copy(4.0e12, "NVIDIA GH200 data sheet, 96 GB of HBM3"),
    rates=_rates("NVIDIA GH200 data sheet, half of the figures with sparsity", 989.4, 494.7, 66.9, 1978.9, 1978.9),
    gpu=_gpu(90, 132, 60, 1.755e9, 5120, _H100_WIDTH),
)

H20 = Device(
    "NVIDIA H20",
    bandwidth=_copy(4.0e12, "as sellers of the H20 with 96 GB of HBM3 give it, for want of a public data sheet"),
    rates=_rates("as sellers of the H20 give them, dense, for want of a public data sheet", 148, 74, 1, 296, 296),
    gpu=_gpu(90, 78, 60, 1.755e9, 5120, _H100_WIDTH),
)

L40S = Device(
    "NVIDIA L40S",
    bandwidth=_copy(0.864e12, "NVIDIA L40S data sheet"),
    rates=_rates("NVIDIA L40S data sheet, dense; float64 outside the tensor cores", 362.05, 183, 1.43, 733, 733),
    gpu=_gpu(89, 142, 96, 2.52e9, 48 * 64, "48 slices of 2 MB, 64 bytes a clock each (assumed)"),
)

RTX_5090 = Device(
    "NVIDIA GeForce RTX 5090",
    bandwidth=_copy(1.792e12, "NVIDIA RTX Blackwell architecture white paper"),
    rates=_rates("NVIDIA RTX Blackwell architecture white paper, RTX 5090, dense", 209.5, 104.8, 1.64, 419, 838),
    gpu=_gpu(120, 170, 96, 2.407e9, 48 * 64, "48 slices of 2 MB, 64 bytes a clock each (assumed)"),
)

B300 = Device(
    "NVIDIA B300",
    bandwidth=_copy(7.7e12, "NVIDIA HGX B300 data sheet, one GPU of eight"),
    rates=_rates("NVIDIA HGX B300 data sheet, half of the figures with sparsity", 2250, 1125, 1.25, 4500, 150),
    gpu=_gpu(103, 148, 126, 1.86e9, 2 * 5120, f"the B200's, two dies of the A100's width, {_A100_WIDTH}"),
)

_GPUS = {
    "h100": H100,
    "h200": H200,
    "a100": A100,
    "b200": B200,
    "rtx4090": RTX_4090,
    "h100pcie": H100_PCIE,
    "gh200": GH200,
    "h20": H20,
    "l40s": L40S,
    "rtx5090": RTX_5090,
    "b300": B300,
}
"""By the name on the command line."""

_WORDS = {"h100pcie": {"h100", "pcie"}, "rtx4090": {"4090"}, "rtx5090": {"5090"}}
"""Words in torch's device name that the product has; by default its name on the command line."""

_OTHER_MODELS = {"pcie", "nvl", "mig", "laptop", "d", "40gb", "144g", "3e"}
"""Words in torch's device name that mean another product, unless they are its own: other memory, or fewer units."""


def gpus() -> dict[str, Device]:
    """Return every GPU with known ceilings, by the name that :func:`gpu` and the command line take."""
    return dict(_GPUS)


def gpu(name: str) -> Device:
    """Return the GPU called ``name``.

    Raises:
        UserError: there is none; the message lists close matches.
    """
    key = re.sub(r"[\s_-]+", "", name.lower())
    if key in _GPUS:
        return _GPUS[key]
    close = difflib.get_close_matches(key, _GPUS, n=5, cutoff=0.5)
    todo = f"did you mean {' or '.join(close)}?" if close else f"choose one of {', '.join(_GPUS)}"
    raise UserError("the name of a GPU", repr(name), todo)


def detect(torch_device_name: str) -> Device | None:
    """Return the GPU with this name of ``torch.cuda.get_device_name()``; None if its ceilings are unknown."""
    words = set(re.split(r"[\s_-]+", torch_device_name.lower()))
    for name, device in _GPUS.items():
        own = _WORDS.get(name, {name})
        if own <= words and not (words & _OTHER_MODELS) - own:
            return device
    return None


_FLOP_PER_CLOCK = {80: 2048, 90: 4096, 100: 8192, 103: 8192, 110: 8192}
"""Dense bfloat16 operations of a multiprocessor and clock, from the data sheets above; 1024 for any other architecture.
A GeForce sums products in fp32 at half of that."""

_HBM_ARCHS = (80, 90, 100, 103)
"""Architectures with the A100's width of the L2 cache per multiprocessor, and with 2048 threads."""


def unknown_gpu(
    name: str,
    arch: int,
    sms: int,
    shared_per_sm: int,
    shared_per_block: int,
    l2_bytes: int,
    clock_hz: float = 0.0,
    memory_hz: float = 0.0,
    bus_bits: int = 0,
) -> Device:
    """Describe a GPU without known figures by what its driver reports; 0 is a figure that the driver does not know.

    What cannot be computed from the driver's figures is the H100's, scaled by the multiprocessors.

    Args:
        name: for people, with the product's series.
        arch: compute capability times ten.
        sms: streaming multiprocessors.
        shared_per_sm, shared_per_block: bytes of shared memory.
        l2_bytes: size of the L2 cache.
        clock_hz, memory_hz: peak clocks of the multiprocessors and of the memory, in Hz.
        bus_bits: width of the memory bus.
    """
    known = H100.gpu
    assert known is not None
    share = sms / known.sms

    def scaled(ceiling: Ceiling) -> Ceiling:
        return Ceiling(ceiling.value * share, "modelled", f"an H100's, times {sms} / {known.sms} multiprocessors")

    bandwidth, l2, clock = scaled(H100.bandwidth), scaled(known.l2_bandwidth), known.clock_hz
    rates = tuple((dtype, scaled(c)) for dtype, c in H100.rates if arch >= 89 or not dtype.startswith("float8"))
    if memory_hz and bus_bits:
        what = f"two transfers per clock of {memory_hz / 1e6:.0f} MHz, {bus_bits} bits wide, as the driver reports"
        bandwidth = _copy(2 * memory_hz * bus_bits / 8, what)
    if clock_hz:
        clock = Ceiling(clock_hz, "published", "peak clock, as the driver reports")
        rates = _rates_of(name, arch, sms, clock_hz)
        width = (5120 / known.sms if arch in _HBM_ARCHS else 18) * sms
        l2 = _l2(round(width), clock_hz, f"{width:.0f} bytes a clock, as GPUs of this kind (assumed)")
    resources = replace(
        known,
        arch=arch,
        sms=sms,
        shared_per_sm=shared_per_sm,
        shared_per_block=shared_per_block,
        max_threads_per_sm=2048 if arch in _HBM_ARCHS else 1536,
        l2_bytes=l2_bytes,
        l2_bandwidth=l2,
        clock_hz=clock,
    )
    return Device(name, bandwidth, rates, resources)


def _rates_of(name: str, arch: int, sms: int, clock_hz: float) -> tuple[tuple[str, Ceiling], ...]:
    """Return rates by dtype from the architecture's operations per clock."""
    flop = _FLOP_PER_CLOCK.get(arch, 1024) / (2 if "geforce" in name.lower() else 1)
    peak = flop * sms * clock_hz / 1e12
    fp64 = {80: 128, 90: 256, 100: 128}.get(arch, 4) * sms * clock_hz / 1e12
    why = f"{flop:.0f} bfloat16 operations a clock and multiprocessor, times {sms}, times {clock_hz / 1e9:.4g} GHz"
    return _rates(why, peak, peak / 2, fp64, 2 * peak if arch >= 89 else None, 2 * peak)


def file_stem(gpu_name: str) -> str:
    """Return a GPU's name as a file name: ``NVIDIA H100 80GB HBM3`` -> ``nvidia-h100-80gb-hbm3``."""
    return re.sub(r"[^a-z0-9]+", "-", gpu_name.lower()).strip("-")


def cpu_model() -> str:
    """Return this CPU's model name as its maker gives it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def check_device(device: str) -> None:
    """Check that ``device`` is ``cpu`` or a CUDA device of this machine.

    Raises:
        UserError: it is not.
    """
    import torch

    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise UserError("a device such as cpu or cuda:0", repr(device), "correct --device") from error
    if kind not in ("cpu", "cuda"):
        raise UserError("device cpu or cuda", repr(device), "correct --device")
    if kind == "cuda" and (torch.device(device).index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"one of the {torch.cuda.device_count()} CUDA devices that PyTorch sees",
            repr(device),
            "use --device cpu, or see `resnet-fast env`",
        )
