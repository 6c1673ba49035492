"""Compare the cycle model with times that were measured on an H100.

    python -m resnet_fast.benchmarks.simulated_peers --library .../libtorch_cuda.so [--clock 1.98e9] [KERNEL ...]

Measured are kernels of eager PyTorch 2.11.0+cu130 in a training step of ResNet-50 (batch 256, bf16, channels_last) on
an H100 SXM, summed over their launches by CUDA's profiler. ``--library`` is that PyTorch's: its kernels for sm_90
are taken from it by the cuobjdump of Triton's package, so that the code is the code that was measured. Needs no GPU.
The largest launches of BatchNorm take minutes each.

To add a kernel, write a function that returns its launches, and give it a line in :data:`PEERS`. None of these may be
used to fit a constant.
"""

from __future__ import annotations

import argparse
import struct
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from resnet_fast.errors import UserError
from resnet_fast.simulation import Kernel, Launch, MemoryRange, listing, read_kernel
from resnet_fast.simulation.constants import Constants, constants
from resnet_fast.simulation.launches import simulate_launch

from . import markdown

BATCH = 256
CLOCK = 1.98e9
"""An H100 SXM keeps its highest clock in kernels that memory bounds."""

STAGES = ((64, 3, 56), (128, 4, 28), (256, 6, 14), (512, 3, 7))
"""ResNet-50: channels inside of a block, blocks, height and width of the stage."""

_BASE, _GAP = 0x7F0000000000, 1 << 32

Channels = tuple[int, int]
"""Pixels of all images, and channels."""


def convolution_outputs() -> list[list[Channels]]:
    """Return the outputs of the stem's convolution and of each block's, a projection last."""
    found = [[(BATCH * 112 * 112, 64)]]
    for stage, (inner, blocks, size) in enumerate(STAGES):
        for block in range(blocks):
            before = 2 * size if stage and not block else size  # the block's stride is in its 3x3 convolution
            ways = [(before, inner), (size, inner), (size, 4 * inner)]
            if not block:
                ways.append((size, 4 * inner))
            found.append([(BATCH * s * s, c) for s, c in ways])
    return found


def normed() -> list[Channels]:
    """Return what goes through BatchNorm."""
    return [one for block in convolution_outputs() for one in block]


def activated() -> list[Channels]:
    """Return what goes through ReLU: all but projections."""
    return [one for block in convolution_outputs() for one in block[:3]]


def added() -> list[Channels]:
    """Return what is added: outputs of blocks in the forward pass, gradients of their inputs in the backward pass."""
    outputs = [block[2] for block in convolution_outputs()[1:]]
    return [*outputs, (BATCH * 56 * 56, 64), *outputs[:-1]]


def _pointer(number: int) -> int:
    return _BASE + number * _GAP


def _pointers(*numbers: int) -> bytes:
    return b"".join(struct.pack("<Q", _pointer(n)) for n in numbers)


def _elementwise(kernel: Kernel, shape: Channels, inputs: int, extra: bytes, in_place: bool = False) -> Launch:
    """ATen's vectorized_elementwise_kernel: 128 threads with 8 numbers of 16 bits each; the output's pointer first."""
    n = shape[0] * shape[1]
    used = [0] if in_place else list(range(inputs + 1))
    memory = tuple(MemoryRange(_pointer(i), 2 * n, f"tensor {i}") for i in used)
    pointers = _pointers(*(used * 2 if in_place else used))
    return Launch(kernel, (-(-n // 1024), 1, 1), (128, 1, 1), 0, (struct.pack("<i", n), extra, pointers), memory)


def _add(kernel: Kernel, shape: Channels) -> Launch:
    return _elementwise(kernel, shape, 2, struct.pack("<f", 1.0))


def _clamp(kernel: Kernel, shape: Channels) -> Launch:
    return _elementwise(kernel, shape, 1, bytes(24), in_place=True)


def _threshold(kernel: Kernel, shape: Channels) -> Launch:
    return _elementwise(kernel, shape, 2, bytes(16))


def channels_last_grid(pixels: int, channels: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Return grid and threads of ATen's BatchNorm kernels for channels_last, as its flexible_launch_configs does."""

    def power(n: int) -> int:
        return 1 << n.bit_length() - 1

    most, per_thread, tile, rows = 512, 16, 32, 128
    x = min(power(channels), tile)
    y = min(power(-(-pixels // per_thread)), most // x)
    if x * y != most:
        x = min(power(channels), most // y)
    return (-(-channels // x), min(-(-pixels // (y * per_thread)), rows), 1), (x, y, 1)


def _transform(kernel: Kernel, shape: Channels) -> Launch:
    """x, z (none), mean, invstd, weight, bias, y, pixels, channels, whether ReLU follows."""
    grid, threads = channels_last_grid(*shape)
    nbytes = 2 * shape[0] * shape[1]
    memory = (
        MemoryRange(_pointer(0), nbytes, "x"), MemoryRange(_pointer(6), nbytes, "y"),
        *(MemoryRange(_pointer(i), 4 * shape[1], "by channel") for i in (2, 3, 4, 5)),
    )  # fmt: skip
    pointers = [_pointers(0), bytes(8), *(_pointers(i) for i in (2, 3, 4, 5, 6))]
    return Launch(kernel, grid, threads, 0, (*pointers, *(struct.pack("<i", n) for n in shape), b"\0"), memory)


def _backward(kernel: Kernel, shape: Channels) -> Launch:
    """dy, x, mean, invstd, weight, sum(dy), sum(dy * (x - mean)), dx, 1 / pixels, pixels, channels."""
    grid, threads = channels_last_grid(*shape)
    nbytes = 2 * shape[0] * shape[1]
    memory = (
        *(MemoryRange(_pointer(i), nbytes, "tensor") for i in (0, 1, 7)),
        *(MemoryRange(_pointer(i), 4 * shape[1], "by channel") for i in (2, 3, 4, 5, 6)),
    )
    numbers = (struct.pack("<f", 1 / shape[0]), *(struct.pack("<i", n) for n in shape))
    return Launch(kernel, grid, threads, 0, (*(_pointers(i) for i in range(8)), *numbers), memory)


@dataclass(frozen=True)
class Peer:
    """A kernel of PyTorch whose time was measured.

    Attributes:
        name: for people and the command line.
        words: what the kernel's mangled name contains.
        shapes: of its launches.
        launch: returns the launch for a shape.
        measured: seconds of all of them together, in one training step.
    """

    name: str
    words: tuple[str, ...]
    shapes: Callable[[], list[Channels]]
    launch: Callable[[Kernel, Channels], Launch]
    measured: float


_VECTOR = "vectorized_elementwise_kernelILi8"

PEERS = (
    Peer("add", (_VECTOR, "CUDAFunctor_addIN3c108BFloat16"), added, _add, 5471e-6),
    Peer("relu", (_VECTOR, "launch_clamp_scalar", "BFloat16"), activated, _clamp, 3187e-6),
    Peer("relu-backward", (_VECTOR, "threshold_kernel", "BinaryFunctorIN3c108BFloat16"), lambda: activated()[1:],
         _threshold, 4709e-6),
    Peer("batch-norm", ("batch_norm_transform_input_channels_last_kernelIN3c108BFloat16EffLi4",), normed, _transform,
         5375e-6),
    Peer("batch-norm-backward", ("batch_norm_backward_elemt_channels_last_kernelILi4EN3c108BFloat16EffE", "S7_ii"),
         normed, _backward, 7021e-6),
)  # fmt: skip


def kernels(library: Path, peers: tuple[Peer, ...]) -> dict[str, Kernel]:
    """Return the kernel of each peer by its name, from a library's binary code for sm_90.

    Raises:
        UserError: the library has no such kernel, or several.
    """
    found: dict[str, Kernel] = {}
    with tempfile.TemporaryDirectory() as folder:
        listing.cuobjdump("-xelf", "all", "-arch", "sm_90", library.resolve(), folder=Path(folder))
        for path in sorted(Path(folder).glob("*.cubin")):
            found.update(_of_cubin(path.read_bytes(), peers))
    if missing := [one.name for one in peers if one.name not in found]:
        raise UserError(
            "the kernels of PyTorch 2.11 for sm_90", f"no {', '.join(missing)} in {library}", "check --library"
        )
    return found


def _of_cubin(binary: bytes, peers: tuple[Peer, ...]) -> Iterator[tuple[str, Kernel]]:
    from resnet_fast.simulation.cubin import CubinFile

    wanted = [one for one in peers if all(word.encode() in binary for word in one.words)]
    names = CubinFile(binary).kernels if wanted else []
    for one in wanted:
        fitting = [name for name in names if all(word in name for word in one.words)]
        if len(fitting) > 1:
            raise UserError(f"one kernel with {' and '.join(one.words)}", str(len(fitting)), "name it by more words")
        if fitting:
            yield one.name, read_kernel(binary, fitting[0])


def simulated(peer: Peer, kernel: Kernel, values: Constants, clock: float) -> tuple[float, Counter[str]]:
    """Return the seconds of a peer's launches together, and what bounds how many of them."""
    seconds, bounds = 0.0, Counter[str]()
    for shape, times in Counter(peer.shapes()).items():
        one = simulate_launch(peer.launch(kernel, shape), values, clock)
        seconds += times * one.seconds
        bounds[one.bound] += times
    return seconds, bounds


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--library", type=Path, required=True, help="libtorch_cuda.so of PyTorch 2.11.0+cu130")
    parser.add_argument("--clock", type=float, default=CLOCK, help="in Hz")
    parser.add_argument("kernels", nargs="*", choices=[[], *(one.name for one in PEERS)], metavar="KERNEL")
    given = parser.parse_args(arguments)
    peers = tuple(one for one in PEERS if not given.kernels or one.name in given.kernels)
    code, values, rows = kernels(given.library, peers), constants("h100"), []
    for peer in peers:
        print(f"simulating {peer.name}", file=sys.stderr)
        seconds, bounds = simulated(peer, code[peer.name], values, given.clock)
        error = seconds / peer.measured - 1
        bound = ", ".join(f"{name} {times}" for name, times in bounds.most_common())
        rows.append(
            [
                peer.name,
                len(peer.shapes()),
                f"{seconds * 1e6:.0f}",
                f"{peer.measured * 1e6:.0f}",
                f"{error:+.1%}",
                bound,
            ]
        )
    print(markdown.table(["kernel", "launches", "simulated, us", "measured, us", "error", "bound"], rows))


if __name__ == "__main__":
    main()
