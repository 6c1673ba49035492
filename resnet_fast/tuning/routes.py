"""List the ways to run a problem as kernel launches: which convolutions share a launch, by fusion plan.

    bottleneck   conv   1x1 | 3x3 | 1x1 + add             one kernel per convolution; a projection is one more
                 proj   1x1 | 3x3 | 1x1 + projection      the projection accumulates into conv3's tile
                 tail   1x1 | 3x3 -> 1x1 + add or projection      conv2's output stays on chip
    basic_block  conv   3x3 | 3x3 + add;   proj   3x3 | 3x3 + projection
    stem         conv   7x7 (pooling by PyTorch);   stem   7x7 -> max-pool in one kernel

A route is a tuple of :class:`~resnet_fast.spec.LaunchSpec`. The tuner measures launches and adds them up, the roofline
and the traffic tests count their bytes, and the backend runs the route of the launch plan. Torch-free.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..spec import ConvSpec, LaunchSpec, Spec

MIN_CHANNELS = 16
"""Channels that fill a tensor-core tile: ``tl.dot`` takes no shorter side."""

TAIL_CHANNELS = 256
"""Widest conv2 for which the output tile stays on chip: 64 pixels x 256 channels x 4 bytes are 64 KiB of registers."""

FUSED_POOL = (3, 2, 1)
"""Kernel, stride and padding of the max-pool that the stem kernel includes; any other runs after its convolution."""

STEM_STEP = 64
"""Longest filter row of the stem kernel: filter width times input channels, as a power of two."""


PLANNED_PIXELS, PLANNED_IMAGES = 16384, (8, 48)
"""Output pixels for which an ``invariant`` problem is planned, and the least and most images that may have them. Its
configs must not follow the batch, but may follow the size of an image."""


@dataclass(frozen=True)
class LaunchRoute:
    """One way to run a problem. ``fusion`` is conv, proj, tail or stem, a row of the table above."""

    fusion: str
    launches: tuple[LaunchSpec, ...]

    def min_bytes(self) -> int:
        """Return the least bytes that the launches read and write."""
        return sum(launch.min_bytes() for launch in self.launches)


def merged_groups(conv: ConvSpec) -> int:
    """Return the groups that remain after merging neighbours until each has MIN_CHANNELS in and out.

    The filter of a merged group is block-diagonal, with zeros between its members. The tensor cores multiply these
    zeros, but a convolution of 4 channels per group stays one kernel that reads its input once. An infinity or NaN in x
    spreads to the other members of its merged group (0 * inf is NaN).
    """
    groups = conv.groups
    for merge in range(1, groups + 1):
        if groups % merge == 0 and min(conv.ci, conv.co) // groups * merge >= MIN_CHANNELS:
            return groups // merge
    return 1


def tile_side(size: int) -> int:
    """Return the shortest tile side that holds ``size``: a power of two of at least MIN_CHANNELS."""
    return max(MIN_CHANNELS, 1 << (size - 1).bit_length())


def stem_step(conv: ConvSpec) -> int:
    """Return the stem's K step: the products of one filter row, rounded up to a power of two."""
    return tile_side(conv.s * conv.ci)


def kernel_for(conv: ConvSpec) -> str:
    """Return the name of the kernel that runs one convolution by itself."""
    if conv.epilogue.pool:
        return "stem"
    plain = conv.groups == 1 and conv.padding == (0, 0)
    if (conv.r, conv.s) == (1, 1) and plain:
        return "conv_bn_act_1x1"
    if (conv.r, conv.s) == (3, 3) and conv.ci // merged_groups(conv) >= MIN_CHANNELS:
        return "conv_bn_act_3x3"
    return "conv_bn_act"


def planned(spec: Spec) -> Spec:
    """Return the problem that ``spec`` is planned as: itself, or for an ``invariant`` one that of a fixed batch.

    The batch has about PLANNED_PIXELS output pixels: a layer of small images is planned for more of them.
    """
    if not spec.invariant:
        return spec
    last, (least, most) = spec.main[-1], PLANNED_IMAGES
    return spec.with_(n=min(most, max(least, -(-PLANNED_PIXELS // (last.ho * last.wo)))))


def launch(conv: ConvSpec) -> LaunchSpec:
    """Return one convolution as a launch of its own."""
    return LaunchSpec(kernel_for(conv), (conv,))


def routes(spec: Spec) -> tuple[LaunchRoute, ...]:
    """Return every route of a problem, ``conv`` first.

    Whether a kernel can run a launch is decided by the rules in configs.py.
    """
    if spec.pool is not None:
        (stem,) = spec.main
        unpooled = stem.with_(epilogue=replace(stem.epilogue, pool=None))
        apart = LaunchRoute("conv", (launch(unpooled),))
        fits = spec.pool == FUSED_POOL and stem.groups == 1 and stem_step(stem) <= STEM_STEP
        return (apart, LaunchRoute("stem", (launch(stem),))) if fits else (apart,)
    *inner, last = (launch(c) for c in spec.main)
    projection = spec.projection
    first: tuple[LaunchSpec, ...] = () if projection is None else (launch(projection),)
    found = [LaunchRoute("conv", (*first, *inner, last))]
    merges = last.kernel in ("conv_bn_act_1x1", "conv_bn_act_3x3") and last.first.groups == 1
    if projection is not None and first[0].kernel == "conv_bn_act_1x1" and merges:
        found.append(LaunchRoute("proj", (*inner, replace(last, projection=projection))))
    if spec.op == "bottleneck" and last.kernel == "conv_bn_act_1x1" and inner[-1].kernel == "conv_bn_act_3x3":
        conv2 = inner[-1].first
        fits = conv2.groups == 1 and conv2.co <= TAIL_CHANNELS and last.first.stride == (1, 1)
        if fits and (projection is None or first[0].kernel == "conv_bn_act_1x1"):
            tail = LaunchSpec("bottleneck", (conv2, last.first), projection)
            found.append(LaunchRoute("tail", (*inner[:-1], tail)))
    return tuple(found)


def folded_routes(spec: Spec) -> tuple[LaunchRoute, ...]:
    """Return the routes of the forward pass of a training step whose norms are folded into the weights.

    They are those of inference that store every activation which the backward pass reads: ``conv``, without the stem's
    pooling, and ``proj``, because no gradient needs a projection's output.
    """
    bare = spec.with_(grad=False, layout="nhwc")
    return tuple(route for route in routes(bare) if route.fusion in ("conv", "proj"))
