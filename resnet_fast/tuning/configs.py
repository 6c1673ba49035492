"""Define how launches are divided into tiles: the shipped configs of each kernel and the rules that admit them.

A rule is a function from (launch, config, GPU) to a :class:`~resnet_fast.spec.Verdict`. The heuristic, the tuner and
the tests call the same rules. Sizes are in elements, memory in bytes. Torch-free.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ..devices import Gpu
from ..spec import ITEMSIZE, YES, LaunchSpec, Verdict
from .routes import merged_groups, tile_side

SPACE = 2
"""Version of the config space, written into every tuning table. Raise it when a kernel or a rule changes."""

NARROW = 32
"""A tile side or K step of this length is always admitted. Every kernel has such a config, so none is without one."""

WARP_GROUP_ARCHS = (90, 100, 103, 110)
"""Architectures for which Triton multiplies with a warp group's instructions (wgmma, tcgen05). Operands stay in shared
memory there. Others load them into registers: 128 sums per thread then spill 32 to 56 bytes on sm_120 (compiled)."""

STOCK = ("cudnn", "cudnn_fused")
"""Candidates that are PyTorch's own: convolution and separate pointwise kernels; cuDNN's conv-bias-(add)-ReLU."""


@dataclass(frozen=True)
class Config:
    """One way to run a launch.

    Attributes:
        kernel: a kernel of ours, or one of :data:`STOCK`, which has no tile sizes.
        block_m, block_n: outputs per program.
        block_k: products per step.
        num_warps: warps per program.
        num_stages: steps in flight.
        group_m: rows of tiles that share the L2 cache.
        descriptors: whether the bulk copy engine loads the operands.
        rows: pooled rows per program of the stem.
        packed: whether a training prologue works in 16-bit pairs, otherwise in fp32.
        splits: programs that share the K steps of a tile.
    """

    kernel: str
    block_m: int = 0
    block_n: int = 0
    block_k: int = 0
    num_warps: int = 4
    num_stages: int = 3
    group_m: int = 8
    descriptors: bool = False
    rows: int = 1
    packed: bool = False
    splits: int = 1

    @property
    def stock(self) -> bool:
        """Whether the config is one of PyTorch's own kernels."""
        return self.kernel in STOCK

    def __str__(self) -> str:
        if self.stock:
            return self.kernel
        text = f"{self.block_m}x{self.block_n}x{self.block_k} w{self.num_warps} s{self.num_stages}"
        text += " packed" if self.packed else ""
        text += " descriptors" if self.descriptors else ""
        text += f" rows{self.rows}" if self.rows != 1 else ""
        return text + (f" splits{self.splits}" if self.splits != 1 else "")


def of_sizes(kernel: str, *sizes: tuple[int, ...], **more: int | bool) -> tuple[Config, ...]:
    """Return a config of ``kernel`` for each of ``sizes`` (the fields from ``block_m`` to ``num_stages``)."""
    return tuple(Config(kernel, *size, **more) for size in sizes)  # type: ignore[arg-type]


# (block_m, block_n, block_k, num_warps, num_stages) for 16-bit operands; for fp32 block_k is halved (``for_dtype``).
# 128x128 and 128x256 tiles feed a warp group's 64xNx16 tensor-core instruction for large problems, 64 pixels and fewer
# give a batch of one enough programs, narrow tiles serve narrow layers (16 to 64 channels).
_1X1 = (
    (128, 256, 64, 8, 3),
    (128, 128, 64, 8, 3),
    (128, 128, 64, 4, 3),
    (128, 64, 64, 4, 4),
    (64, 256, 64, 8, 3),
    (64, 128, 64, 4, 4),
    (64, 64, 64, 4, 4),
    (64, 32, 32, 4, 4),
    (64, 16, 32, 4, 4),
    (32, 64, 128, 4, 3),
)
_DESCRIBED_1X1 = ((128, 256, 64, 8, 3), (128, 128, 64, 8, 4), (128, 64, 64, 4, 4), (64, 128, 64, 4, 4))
_SPLITS = (2, 4, 8)
_SPLIT_1X1, _SPLIT_3X3 = (32, 64, 128, 4, 3), (32, 64, 64, 4, 4)  # the tiles of a batch of one
_3X3 = (
    (128, 256, 64, 8, 3),
    (128, 128, 64, 8, 3),
    (128, 128, 64, 4, 3),
    (128, 64, 64, 4, 4),
    (64, 128, 64, 4, 3),
    (64, 64, 64, 4, 4),
    (64, 32, 32, 4, 4),
    (64, 16, 16, 4, 4),
    (32, 64, 64, 4, 4),
)
_GENERAL = ((128, 64, 32, 4, 3), (64, 64, 32, 4, 3), (64, 32, 32, 4, 3), (64, 16, 32, 4, 3))
_STEM = ((64, 64, 32, 4, 1), (64, 32, 32, 4, 1))
_TAIL = (
    (128, 128, 64, 8, 3),
    (128, 64, 64, 8, 3),
    (64, 128, 64, 8, 3),
    (64, 64, 64, 4, 3),
    (64, 32, 32, 4, 3),
    (32, 64, 64, 4, 3),
)

SHIPPED: dict[str, tuple[Config, ...]] = {
    "conv_bn_act_1x1": (
        *of_sizes("conv_bn_act_1x1", *_1X1),
        *of_sizes("conv_bn_act_1x1", *_DESCRIBED_1X1, descriptors=True),
        *(config for splits in _SPLITS for config in of_sizes("conv_bn_act_1x1", _SPLIT_1X1, splits=splits)),
    ),
    "conv_bn_act_3x3": (
        *of_sizes("conv_bn_act_3x3", *_3X3),
        *(config for splits in _SPLITS for config in of_sizes("conv_bn_act_3x3", _SPLIT_3X3, splits=splits)),
    ),
    "conv_bn_act": of_sizes("conv_bn_act", *_GENERAL),
    "stem": tuple(config for rows in (4, 14) for config in of_sizes("stem", *_STEM, rows=rows)),
    "bottleneck": of_sizes("bottleneck", *_TAIL),
}
"""Every config that can ever be chosen, by kernel. Tests run each, static budgets compile each."""


def for_dtype(config: Config, dtype: str) -> Config:
    """Return ``config`` with a K step of as many bytes in ``dtype`` as the shipped step has in 16 bit."""
    if ITEMSIZE[dtype] <= 2 or config.stock:
        return config
    return replace(config, block_k=max(16, config.block_k * 2 // ITEMSIZE[dtype]))


def chain_width(launch: LaunchSpec) -> int:
    """Return the channels of the tile that a chain keeps on chip, rounded up to a power of two; 0 without a chain."""
    return 0 if len(launch.convs) == 1 else tile_side(launch.first.co)


def shared_bytes(launch: LaunchSpec, config: Config) -> int:
    """Return the bytes of shared memory for the pipelined operand tiles and for a chain's tile between two products."""
    size, width = ITEMSIZE[launch.dtype], chain_width(launch)
    step = (config.block_m + (width or config.block_n)) * config.block_k
    if width:
        step = max(step, config.block_n * width)  # conv3's weight tile is pipelined in the second loop
        if launch.projection is not None:
            step = max(
                step, config.block_n * width // config.num_stages + (config.block_m + config.block_n) * config.block_k
            )
    scratch = 4096  # barriers and changes of layout, as seen in compiled chains
    return (config.num_stages * step + config.block_m * width) * size + scratch * (width > 0)


def on_tensor_cores(launch: LaunchSpec) -> bool:
    """Return whether the tensor cores compute the products; those of fp32 only if operands may be rounded to TF32."""
    return launch.dtype != "float32" or launch.last.tf32


def accumulators(launch: LaunchSpec, config: Config) -> int:
    """Return the fp32 registers per thread that hold the tiles being summed."""
    tiles = config.block_n * (3 if launch.kernel == "stem" else 1)  # a row's sum, its maximum, the carried maximum
    return config.block_m * max(tiles, chain_width(launch)) // (32 * config.num_warps)


def _fits_shared(launch: LaunchSpec, config: Config, gpu: Gpu) -> Verdict:
    need = shared_bytes(launch, config)
    if need <= gpu.shared_per_block:
        return YES
    return Verdict.no(f"at most {gpu.shared_per_block} bytes of shared memory", str(need), "use fewer stages")


def _fits_registers(launch: LaunchSpec, config: Config, gpu: Gpu) -> Verdict:
    """Refuse what would spill. 128 sums per thread only fit where a warp group's products are one instruction.

    With a residual they spill on every architecture. Without tensor cores (fp32 that is not rounded to TF32) the
    operands are in registers too. The limits were counted in the code of Triton 3.6 and 3.8
    (docs/tables/static-budgets.md).
    """
    need, limit = accumulators(launch, config), 64
    if not on_tensor_cores(launch):
        limit = 8 if launch.projection is not None else 32
    elif launch.kernel == "stem":
        limit = 96 if gpu.arch in WARP_GROUP_ARCHS else 48
    elif gpu.arch in WARP_GROUP_ARCHS and not launch.residual:
        limit = 128
    if need <= limit:
        return YES
    return Verdict.no(f"at most {limit} sums per thread", str(need), "use more warps or less tile")


def _chain_on_tensor_cores(launch: LaunchSpec, config: Config, gpu: Gpu) -> Verdict:
    """Refuse a chain of two products in fp32 registers: its tile has no room there, and 2 to 6 KB per thread spill."""
    if not chain_width(launch) or on_tensor_cores(launch):
        return YES
    todo = "set torch.backends.cudnn.conv.fp32_precision to 'tf32', or run it apart"
    return Verdict.no("16-bit tensors or TF32 for a fused tail", "float32", todo)


def _not_wider_than_needed(launch: LaunchSpec, config: Config, gpu: Gpu) -> Verdict:
    """Refuse a tile that is more than half masked off; a narrower one is among the candidates."""
    groups = merged_groups(launch.last)
    size = launch.last.co // groups
    if config.block_n > max(NARROW, 2 * size - 1):
        return Verdict.no(f"block_n below twice the {size} output channels", str(config.block_n), "use a narrower tile")
    return YES


def _step_not_longer_than_needed(launch: LaunchSpec, config: Config, gpu: Gpu) -> Verdict:
    conv = launch.first
    size = conv.ci // merged_groups(conv)
    if launch.kernel in ("conv_bn_act", "stem"):
        size *= conv.r * conv.s
    if config.block_k > max(NARROW, 2 * size - 1):
        return Verdict.no(f"block_k below twice the {size} products", str(config.block_k), "use a shorter step")
    return YES


def _descriptors_apply(launch: LaunchSpec, config: Config, gpu: Gpu) -> Verdict:
    if not config.descriptors:
        return YES
    conv = launch.last
    if gpu.arch < 90:
        return Verdict.no("sm_90 or later for tensor descriptors", f"sm_{gpu.arch}", "use pointer loads")
    if conv.ci * ITEMSIZE[conv.dtype] % 16:
        return Verdict.no("channel runs of a multiple of 16 bytes", f"{conv.ci} {conv.dtype}", "use pointer loads")
    if conv.stride != (1, 1) or launch.projection is not None:
        return Verdict.no("stride 1 and no projection for tensor descriptors", str(launch), "use pointer loads")
    return YES


SPLIT_STEPS = 2
"""Least K steps of a split: with fewer, adding the sums costs more than the steps."""


def k_steps(launch: LaunchSpec, config: Config) -> int:
    """Return the K steps of a tile of a 1x1 or 3x3 convolution without its projection."""
    conv = launch.last
    return conv.r * conv.s * -(-(conv.ci // merged_groups(conv)) // config.block_k)


def tiles(launch: LaunchSpec, config: Config) -> int:
    """Return the tiles of the output of a launch with one convolution."""
    conv, groups = launch.last, merged_groups(launch.last)
    return -(-conv.gemm_m // config.block_m) * -(-(conv.co // groups) // config.block_n) * groups


def _splits_apply(launch: LaunchSpec, config: Config, gpu: Gpu) -> Verdict:
    """Refuse to split the K steps where the tiles alone fill half of the GPU, or a split would be too short."""
    if config.splits == 1:
        return YES
    if launch.last.invariant:
        return Verdict.no("a launch of any batch for split-K", "one whose config must not follow it", "do not split")
    if not on_tensor_cores(launch):
        return Verdict.no("16-bit tensors or TF32 for split-K", launch.dtype, "do not split")
    if launch.projection is not None:
        return Verdict.no("no projection for split-K", str(launch), "run it apart")
    count, steps = tiles(launch, config), k_steps(launch, config)
    if 2 * count >= gpu.sms:
        return Verdict.no(f"fewer tiles than half of the {gpu.sms} multiprocessors", str(count), "do not split")
    if steps < SPLIT_STEPS * config.splits:
        return Verdict.no(f"{SPLIT_STEPS} K steps per split", f"{steps} in {config.splits}", "use fewer splits")
    return YES


Rule = Callable[[LaunchSpec, Config, Gpu], Verdict]

RULES: tuple[Rule, ...] = (
    _fits_shared,
    _fits_registers,
    _chain_on_tensor_cores,
    _not_wider_than_needed,
    _step_not_longer_than_needed,
    _descriptors_apply,
    _splits_apply,
)


def verdict(launch: LaunchSpec, config: Config, gpu: Gpu, rules: tuple[Rule, ...] = RULES) -> Verdict:
    """Return whether ``config`` may run ``launch`` on ``gpu``; the first of ``rules`` that refuses gives the reason."""
    for rule in rules:
        answer = rule(launch, config, gpu)
        if not answer:
            return answer
    return YES


def needs_proof(launch: LaunchSpec, config: Config) -> bool:
    """Return whether a config may run only with a proof: its output was compared with stock PyTorch's on this GPU.

    Convolutions with eight warps and filters larger than 1x1 have been miscompiled (pytorch#173068, #177823, #183989),
    by ptxas, which no run of PTX shows (docs/notes/eight-warps.md).
    The programs of a split-K launch hand their sums over in memory, whose order only a GPU shows. The rule is the same
    for inference and training. PyTorch's fused kernels need one because cuDNN documents no ReLU that keeps NaN.
    proofs.py keeps the verdicts.
    """
    if config.stock:
        return config.kernel == "cudnn_fused"
    return config.splits > 1 or (config.num_warps == 8 and any(c.r * c.s > 1 for c in launch.convs))


def candidates(launch: LaunchSpec, gpu: Gpu) -> tuple[Config, ...]:
    """Return the shipped configs that the rules admit.

    A single convolution always has one, because the narrowest tile fits everything. A chain may be too wide for every
    config, and a stem in fp32 without TF32 has none; both have another route.
    """
    return tuple(c for c, answer in judged(launch, gpu) if answer)


def judged(launch: LaunchSpec, gpu: Gpu) -> tuple[tuple[Config, Verdict], ...]:
    """Return every shipped config of the launch's kernel with the verdict on it."""
    sized = dict.fromkeys(for_dtype(c, launch.dtype) for c in SHIPPED[launch.kernel])
    return tuple((c, verdict(launch, c, gpu)) for c in sized)


def stock_candidates(launch: LaunchSpec) -> tuple[Config, ...]:
    """Return PyTorch's own ways to run the launch, for a stem including its max-pool.

    A chain or a fused projection has none: its parts are launches of other routes. An ``invariant`` launch has none
    either, because cuDNN chooses its algorithm by the batch.
    """
    if len(launch.convs) > 1 or launch.projection is not None or launch.last.invariant:
        return ()
    epilogue = launch.last.epilogue
    return (Config("cudnn"), Config("cudnn_fused")) if epilogue.relu else (Config("cudnn"),)
