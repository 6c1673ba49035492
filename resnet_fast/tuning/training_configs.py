"""Define how the training launches of a convolution (forward, dgrad, wgrad) are divided into tiles.

A training launch is a :class:`~resnet_fast.spec.LaunchSpec` of kernel ``conv_fwd``, ``conv_dgrad`` or ``conv_wgrad``
with one convolution. ``prologue`` means that its input is raw: BatchNorm and ReLU are applied as it is read. Each of
the three may run on cuDNN instead, between passes of our BatchNorm kernels, if a table says that this is faster.
Torch-free.
"""

from __future__ import annotations

from dataclasses import replace

from ..devices import Gpu
from ..spec import ITEMSIZE, YES, ConvSpec, LaunchSpec, Spec, Verdict
from . import configs
from .configs import NARROW, Config, for_dtype, of_sizes
from .routes import MIN_CHANNELS, merged_groups

KERNELS = ("conv_fwd", "conv_dgrad", "conv_wgrad")


# (block_m, block_n, block_k, num_warps, num_stages) for 16-bit operands; for fp32 block_k is halved (``for_dtype``).
# conv_fwd: output pixels x Co x products. conv_dgrad: input pixels x Ci x products. conv_wgrad: Co x Ci x pixels.
SHIPPED: dict[str, tuple[Config, ...]] = {
    "conv_fwd": of_sizes(
        "conv_fwd",
        (128, 128, 64, 8, 3),
        (128, 64, 64, 4, 3),
        (64, 128, 64, 4, 3),
        (64, 64, 64, 4, 3),
        (64, 32, 32, 4, 3),
        (32, 16, 32, 4, 3),
    ),
    "conv_dgrad": of_sizes(
        "conv_dgrad",
        (128, 128, 64, 8, 3),
        (128, 64, 64, 4, 3),
        (64, 64, 64, 4, 3),
        (64, 32, 32, 4, 3),
        (32, 16, 32, 4, 3),
    ),
    "conv_wgrad": of_sizes(
        "conv_wgrad",
        (128, 128, 64, 8, 3),
        (64, 128, 64, 4, 3),
        (64, 64, 64, 4, 3),
        (32, 32, 64, 4, 3),
        (16, 16, 64, 4, 3),
    ),
}
"""Every training config that can ever be chosen, by kernel. Tests run each, static budgets compile each."""

WHOLE_TILE = 128 * 128
"""Outputs of a tile that is large enough to keep an H100's tensor cores busy in the main loop."""

FEW_VALUES = 16
"""Least values per channel for a packed prologue. With fewer, BatchNorm's gradient is almost only the difference of two
large terms (with two values exactly 0). A packed prologue rounds before the difference and loses it; stock PyTorch
rounds after it."""

CUDNN = Config("cudnn")


def is_training(launch: LaunchSpec) -> bool:
    """Return whether ``launch`` belongs to a training step."""
    return launch.kernel in KERNELS


def training_launch(kernel: str, conv: ConvSpec, prologue: bool) -> LaunchSpec:
    """Return one of the three launches of a convolution."""
    return LaunchSpec(kernel, (conv,), prologue=prologue)


def training_launches(spec: Spec) -> tuple[LaunchSpec, ...]:
    """Return all launches of a problem's training step, in the order of its convolutions.

    Without batch statistics they are those of the backward pass; the forward pass's are launches of inference.
    """
    inner, convs = len(spec.main), enumerate(spec.convs)
    if spec.batch_stats:
        return tuple(training_launch(kernel, conv, 0 < i < inner) for i, conv in convs for kernel in KERNELS)
    return tuple(launch for i, conv in convs for launch in folded_launches(conv, 0 < i < inner))


def folded_launches(conv: ConvSpec, masked: bool) -> tuple[LaunchSpec, LaunchSpec]:
    """Return dgrad and wgrad of a convolution with a folded norm; ``masked``: a ReLU is before it, in the same call."""
    return (
        LaunchSpec("conv_dgrad", (conv,), prologue=masked, folded=True),
        LaunchSpec("conv_wgrad", (conv,), folded=True),
    )


def gemm(launch: LaunchSpec) -> tuple[int, int, int, int]:
    """Return a launch as matrix products: (rows, columns, products, number of such products).

    There is one per group, and for a wgrad one per tap. A dgrad with strides spreads the same products over more input
    pixels.
    """
    c, groups = launch.last, merged_groups(launch.last)
    ci, co, taps = c.ci // groups, c.co // groups, c.r * c.s
    if launch.kernel == "conv_fwd":
        return c.gemm_m, co, ci * taps, groups
    if launch.kernel == "conv_dgrad":
        pixels = c.n * c.h * c.w
        return pixels, ci, max(1, co * taps * c.gemm_m // pixels), groups
    return (co, ci, c.gemm_m, groups * taps) if ci >= MIN_CHANNELS else (co, ci * taps, c.gemm_m, groups)


def min_bytes(launch: LaunchSpec) -> int:
    """Return the bytes that a launch must move: each operand that some output needs once, and its output.

    The gradient of a raw output is read as g and, if the norm uses the batch's statistics, y. A dgrad with a prologue
    reads the raw input too, for the mask and the sums. Added tensors are not included.
    """
    c = launch.last
    size, filters = ITEMSIZE[c.dtype], c.co * c.gemm_k
    y, x = c.n * c.ho * c.wo * c.co, c.n * c.h * c.w * c.ci
    if launch.kernel == "conv_fwd":
        return (c.touched() + filters + y) * size
    dy = y * (1 + c.batch_stats)
    if launch.kernel == "conv_dgrad":
        return (dy + filters + x * (1 + launch.prologue)) * size
    return (dy + c.touched()) * size + filters * 4


def is_memory_bound(launch: LaunchSpec) -> bool:
    """Return whether memory bounds the launch on an H100 by the roofline, whatever its main loop costs.

    A 3x3 of 64 channels is just bound by memory: it has at most 288 operations per byte (192 with g and y to read), and
    the ridge is at 295. A 3x3 of more channels, and a 1x1 with at least 256 channels on both sides, are not.
    """
    c, groups = launch.last, merged_groups(launch.last)
    return min(c.ci, c.co) // groups < (256 if c.r * c.s == 1 else 128)


def _fits_shared(launch: LaunchSpec, config: Config, gpu: Gpu) -> Verdict:
    operands = {"conv_fwd": (1, 1), "conv_dgrad": (2, 1), "conv_wgrad": (2, 1)}[launch.kernel]
    rows = operands[0] * config.block_m + operands[1] * config.block_n
    need = config.num_stages * rows * config.block_k * ITEMSIZE[launch.dtype]
    if need <= gpu.shared_per_block:
        return YES
    return Verdict.no(f"at most {gpu.shared_per_block} bytes of shared memory", str(need), "use fewer stages")


def _fits_registers(launch: LaunchSpec, config: Config, gpu: Gpu) -> Verdict:
    need = config.block_m * config.block_n // (32 * config.num_warps)
    limit = 64 if configs.on_tensor_cores(launch) else 16 if launch.kernel == "conv_wgrad" else 32
    if need <= limit:
        return YES
    return Verdict.no(f"at most {limit} sums per thread", str(need), "use more warps or less tile")


def _fits_gather(launch: LaunchSpec, config: Config, gpu: Gpu) -> Verdict:
    if launch.kernel == "conv_dgrad" or launch.last.ci // merged_groups(launch.last) >= MIN_CHANNELS:
        return YES
    side, limit = (config.block_m, 32) if launch.kernel == "conv_fwd" else (config.block_n, 16)
    need = side * config.block_k // (32 * config.num_warps)
    if need <= limit:
        return YES
    return Verdict.no(f"at most {limit} addresses per thread and step", str(need), "use more warps or less tile")


def _not_larger_than_needed(launch: LaunchSpec, config: Config, gpu: Gpu) -> Verdict:
    rows, columns, products, _ = gemm(launch)
    sides = {"block_n": (config.block_n, columns), "block_k": (config.block_k, products)}
    if launch.kernel == "conv_wgrad":
        sides = {"block_m": (config.block_m, rows), "block_n": (config.block_n, columns)}
    for name, (block, size) in sides.items():
        if block > max(NARROW, 2 * size - 1):
            return Verdict.no(f"{name} below twice {size}", str(block), "use a smaller tile")
    return YES


def packs(launch: LaunchSpec) -> Verdict:
    """Return whether a launch may take a packed prologue."""
    c = launch.last
    if launch.folded:
        return Verdict.no("a norm to apply in a packed prologue", "one that is folded into the weight", "use none")
    if ITEMSIZE[launch.dtype] != 2:
        return Verdict.no("16-bit tensors for a packed prologue", launch.dtype, "use an exact one")
    values = c.n * min(c.h * c.w, c.ho * c.wo)
    if values < FEW_VALUES:
        return Verdict.no(f"{FEW_VALUES} values per channel for a packed prologue", str(values), "use an exact one")
    return YES


def _packed_where_it_may(launch: LaunchSpec, config: Config, gpu: Gpu) -> Verdict:
    return packs(launch) if config.packed else YES


LIMITS = (_fits_shared, _fits_registers, _fits_gather, _not_larger_than_needed, _packed_where_it_may)


def _is_whole(config: Config) -> bool:
    return config.block_m * config.block_n >= WHOLE_TILE


def _needs_whole_tiles(launch: LaunchSpec, gpu: Gpu) -> bool:
    """Return whether products are the limit and fill the GPU, so that tiles below 128 x 128 are too small.

    A smaller tile applies the prologue to more elements per product, so that its main loop issues instructions for
    longer than the tensor cores take (docs/tables/training-budgets.md).
    """
    if is_memory_bound(launch) or not configs.on_tensor_cores(launch):
        return False
    rows, columns, products, count = gemm(launch)
    work = rows * columns * count // WHOLE_TILE * (products // 256 if launch.kernel == "conv_wgrad" else 1)
    return work >= gpu.sms


def verdict(launch: LaunchSpec, config: Config, gpu: Gpu) -> Verdict:
    """Return whether ``config`` may run a launch on ``gpu``; the first rule that refuses gives the reason."""
    return configs.verdict(launch, config, gpu, LIMITS)


def admitted(launch: LaunchSpec, gpu: Gpu, packed: bool) -> tuple[Config, ...]:
    """Return the shipped configs that the rules admit.

    Args:
        launch: a launch of a training step.
        gpu: the GPU to run on.
        packed: whether a prologue in 16-bit pairs is wanted; it is used if the launch may take one.
    """
    wanted = packed and bool(packs(launch))
    sized = dict.fromkeys(replace(for_dtype(c, launch.dtype), packed=wanted) for c in SHIPPED[launch.kernel])
    return tuple(c for c in sized if verdict(launch, c, gpu))


def candidates(
    launch: LaunchSpec, gpu: Gpu, packed: bool, left_out: frozenset[Config] = frozenset()
) -> tuple[Config, ...]:
    """Return the admitted configs that are large enough for the launch, where a large one is left.

    Args:
        launch: a launch of a training step.
        gpu: the GPU to run on.
        packed: as of :func:`admitted`.
        left_out: configs that may not run. If all large ones are, smaller ones are returned.
    """
    found = tuple(c for c in admitted(launch, gpu, packed) if c not in left_out)
    whole = tuple(filter(_is_whole, found))
    return whole if whole and _needs_whole_tiles(launch, gpu) else found


def measurable(launch: LaunchSpec, gpu: Gpu, packed: bool) -> tuple[Config, ...]:
    """Return every config that may become the fastest: the candidates, with and without what needs a proof."""
    unproved = frozenset(c for c in admitted(launch, gpu, packed) if configs.needs_proof(launch, c))
    both = (*candidates(launch, gpu, packed), *candidates(launch, gpu, packed, unproved))
    return tuple(dict.fromkeys(both))
