"""Predict the time of a CUDA kernel on an idle GPU from what the emulator counted of it.

    DRAM      sectors of 32 bytes, each once over the launch                      / copy bandwidth
    L2        sectors that a block had not read before; copies by cp_async, all   / L2 bandwidth
    shared    wavefronts: cycles of the 32 banks, bulk copies' writes among them  / (multiprocessors * clock)
    tensor    multiply-adds of the tensor cores                                   / (rate / 2 * share of it reached)

The four work at the same time, so the time is the longest of them plus a launch. Exposed latency is not included: a
prediction is a bound from counted work, as a floor is a bound from least work. A kernel that loads per block and walks
over many tiles is counted with one image and with two, and extrapolated (:func:`extrapolated`); work is rounded up to
whole rounds, because some blocks get one tile more than others.

Torch-free; ``launch`` is a dictionary of the emulator's ``take_counters()``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..devices import Device
from ..errors import UserError

SECTOR = 32
WAVEFRONT = 128
MMA_MACS = 16 * 8 * 16

WARP_MMA_REACHES = {80: 1.0, 90: 0.62}
"""The part of the tensor cores' dense rate that warp-level ``mma.sync`` reaches, by architecture. sm_90: Luo et al.
2024, "Benchmarking and Dissecting the Nvidia Hopper GPU Architecture"; only ``wgmma`` reaches the full rate. Other
architectures are assumed to reach 1."""


@dataclass(frozen=True)
class KernelCounts:
    """What the emulator counted of one launch.

    Attributes:
        kernel: its name.
        blocks, threads: of the grid, and of a block.
        shared: bytes of shared memory per block.
        dram, l2: bytes read plus written.
        wavefronts: cycles of shared memory.
        macs: multiply-adds that the tensor cores do by ``mma.sync``.
        group_macs: the same by ``wgmma``.
    """

    kernel: str
    blocks: int
    threads: int
    shared: int
    dram: float
    l2: float
    wavefronts: float
    macs: float
    group_macs: float = 0.0

    @staticmethod
    def of(launch: Mapping[str, Any]) -> KernelCounts:
        buffers = launch["buffers"].values()
        shared = [s for s in launch["sites"] if not s["kind"].startswith("global")]
        return KernelCounts(
            launch["kernel"],
            launch["blocks"],
            launch["threads"],
            launch["shared"],
            SECTOR * sum(b["unique_sectors_read"] + b["unique_sectors_written"] for b in buffers),
            SECTOR * sum(b["l2_sectors_read"] + b["sectors_written"] for b in buffers),
            sum(s["units"] for s in shared) + launch["bulk_bytes"] / WAVEFRONT,
            MMA_MACS * launch["mma"],
            launch["wgmma_multiply_adds"],
        )

    def __str__(self) -> str:
        return (
            f"{self.kernel}: DRAM {self.dram / 1e6:.2f} MB, L2 {self.l2 / 1e6:.2f} MB, "
            f"{self.wavefronts:,.0f} shared wavefronts, {(self.macs + self.group_macs) / 1e6:.1f} M multiply-adds"
        )


def extrapolated(one: KernelCounts, two: KernelCounts, images: int, blocks: int, tiles: int) -> KernelCounts:
    """Extrapolate a launch for many images from one for one image and one for two, each on a single block.

    Work that does not grow with the batch is done per block (weights that stay): once for DRAM, once per block for the
    other resources.

    Args:
        one, two: counts for one image and for two.
        images: the batch.
        blocks: blocks of the launch.
        tiles: tiles of all images; the blocks take them in rounds, of which the last may be partly empty.
    """
    rounded = -(-tiles // blocks) * blocks / tiles

    def grown(a: float, b: float, constant: int, share: float = 1.0) -> float:
        return constant * (2 * a - b) + images * (b - a) * share

    return KernelCounts(
        one.kernel,
        blocks,
        one.threads,
        one.shared,
        grown(one.dram, two.dram, 1),
        grown(one.l2, two.l2, blocks),
        grown(one.wavefronts, two.wavefronts, blocks, rounded),
        grown(one.macs, two.macs, blocks, rounded),
        grown(one.group_macs, two.group_macs, blocks, rounded),
    )


@dataclass(frozen=True)
class KernelTime:
    """The predicted time of a launch: ``seconds`` is the longest of ``parts`` plus the cost of the launch itself."""

    seconds: float
    bound: str
    parts: tuple[tuple[str, float], ...]

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {s * 1e6:.1f}" for name, s in self.parts)
        return f"{self.seconds * 1e6:.1f} us predicted ({self.bound}; us by resource: {parts})"


def kernel_time(counted: KernelCounts, device: Device, dtype: str = "bfloat16") -> KernelTime:
    """Predict the time of a launch.

    Args:
        counted: what the emulator counted.
        device: a GPU.
        dtype: of the products.

    Raises:
        UserError: the device is no GPU.
    """
    gpu = device.gpu
    if gpu is None:
        raise UserError("a GPU to predict for", device.name, "name one of resnet_fast.devices.gpus()")
    # the tensor cores' rate is for the multiprocessors together: a few blocks use a few of them
    busy = min(counted.blocks, gpu.sms)
    tensor = device.rate(dtype).value / 2 * busy / gpu.sms
    parts = {
        "DRAM": counted.dram / device.bandwidth.value,
        "L2": counted.l2 / gpu.l2_bandwidth.value,
        "shared": counted.wavefronts / (busy * gpu.clock_hz.value),
        "tensor": (counted.macs / WARP_MMA_REACHES.get(gpu.arch, 1.0) + counted.group_macs) / tensor,
    }
    bound = max(parts, key=lambda name: parts[name])
    return KernelTime(parts[bound] + gpu.launch_s.value, bound, tuple(parts.items()))
