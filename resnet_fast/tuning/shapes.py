"""Derive every convolution and block of every ResNet here, by name, from architecture tables, without torch.

``problems("resnet50")["r50.layer3.0.conv2"]`` is the :class:`~resnet_fast.spec.ConvSpec` that a fused inference of
ResNet-50 runs there. The tables hold what the papers' tables hold: block kind, blocks per stage, groups, width,
shortcut. He et al., "Deep residual learning for image recognition", Table 1 and section 4.2; Xie et al.,
"Aggregated residual transformations", Table 1; Zagoruyko and Komodakis, "Wide residual networks".
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from ..errors import UserError
from ..spec import ITEMSIZE, BlockSpec, ConvSpec, Epilogue

SHORTCUT_OPTIONS = ("A", "B", "C")
"""Section 3.3 of He et al.: zero-padded identity; projection where the size changes; projection everywhere."""

OPS = {"basic": "basic_block", "bottleneck": "bottleneck"}
"""The op that runs a whole block, by block kind; a plain block is two calls of ``conv_bn_act``."""

_RELU = Epilogue(relu=True)
_NORM = Epilogue()


@dataclass(frozen=True)
class Arch:
    """One architecture.

    Attributes:
        name: the public name, such as ``resnet50``.
        key: the short name in problem names, such as ``r50``.
        block: basic, bottleneck or plain.
        depths: blocks per stage.
        groups, width: of a bottleneck's 3x3, as torchvision's ``groups`` and ``width_per_group``.
        stem: the first layer: ``imagenet`` (7x7/2 and max-pool) or ``cifar`` (3x3).
        shortcut: one of :data:`SHORTCUT_OPTIONS`; None for a plain net.
    """

    name: str
    key: str
    block: str
    depths: tuple[int, ...]
    groups: int = 1
    width: int = 64
    stem: str = "imagenet"
    shortcut: str | None = "B"

    @property
    def planes(self) -> tuple[int, ...]:
        """Base channels of each stage, without a bottleneck's expansion."""
        return (64, 128, 256, 512) if self.stem == "imagenet" else (16, 32, 64)

    @property
    def expansion(self) -> int:
        """Output channels of a block over its base channels."""
        return 4 if self.block == "bottleneck" else 1

    @property
    def image(self) -> int:
        """Height and width that the paper trains on."""
        return 224 if self.stem == "imagenet" else 32


def _cifar(depth: int, plain: bool = False) -> Arch:
    n = (depth - 2) // 6  # section 4.2: 6n+2 weighted layers, three stages of n blocks
    if plain:
        return Arch(f"cifar_plain{depth}", f"cp{depth}", "plain", (n, n, n), stem="cifar", shortcut=None)
    return Arch(f"cifar_resnet{depth}", f"c{depth}", "basic", (n, n, n), stem="cifar", shortcut="A")


ARCHS: dict[str, Arch] = {
    arch.name: arch
    for arch in (
        Arch("resnet18", "r18", "basic", (2, 2, 2, 2)),
        Arch("resnet34", "r34", "basic", (3, 4, 6, 3)),
        Arch("resnet50", "r50", "bottleneck", (3, 4, 6, 3)),
        Arch("resnet101", "r101", "bottleneck", (3, 4, 23, 3)),
        Arch("resnet152", "r152", "bottleneck", (3, 8, 36, 3)),
        Arch("resnext50_32x4d", "x50_32x4d", "bottleneck", (3, 4, 6, 3), groups=32, width=4),
        Arch("resnext101_32x8d", "x101_32x8d", "bottleneck", (3, 4, 23, 3), groups=32, width=8),
        Arch("resnext101_64x4d", "x101_64x4d", "bottleneck", (3, 4, 23, 3), groups=64, width=4),
        Arch("wide_resnet50_2", "w50_2", "bottleneck", (3, 4, 6, 3), width=128),
        Arch("wide_resnet101_2", "w101_2", "bottleneck", (3, 4, 23, 3), width=128),
        Arch("plain18", "p18", "plain", (2, 2, 2, 2), shortcut=None),
        Arch("plain34", "p34", "plain", (3, 4, 6, 3), shortcut=None),
        *(_cifar(depth) for depth in (20, 32, 44, 56, 110, 1202)),
        *(_cifar(depth, plain=True) for depth in (20, 32, 44, 56, 110)),
    )
}


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UserError:
    """Return the error for a name that is not among ``known``; it lists the close matches, or all names."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=5, cutoff=0.5)
    todo = f"did you mean {' or '.join(close)}?" if close else f"choose one of {', '.join(known)}"
    return UserError(expected=f"the name of {'an' if kind[0] in 'aeiou' else 'a'} {kind}", got=repr(name), todo=todo)


def arch(name: str) -> Arch:
    """Return the table entry of ``name``.

    Raises:
        UserError: there is none; the message lists close matches.
    """
    if name not in ARCHS:
        raise unknown_name("ResNet", name, ARCHS)
    return ARCHS[name]


def check_variant(name: str, shortcut: str | None = None, stride_in_1x1: bool = False) -> None:
    """Check that ``name`` has the requested variant.

    Only residual nets have a shortcut to choose. Only ImageNet ResNets have a second place for the stride; in basic
    blocks both places are the same, so the option is accepted and changes nothing.

    Raises:
        UserError: the net has no such variant.
    """
    entry = ARCHS.get(name)
    if shortcut is not None:
        if shortcut not in SHORTCUT_OPTIONS:
            raise UserError("shortcut A, B or C", repr(shortcut), "see section 3.3 of the ResNet paper")
        if entry is None or entry.shortcut is None:
            raise UserError("a residual net to choose a shortcut for", name, "leave the shortcut out")
    if stride_in_1x1 and (entry is None or entry.shortcut is None or entry.stem != "imagenet"):
        raise UserError("an ImageNet ResNet to move the stride in", name, "leave stride_in_1x1 out")


@dataclass(frozen=True)
class _Variant:
    shortcut: str | None
    stride_in_1x1: bool
    conv: partial[ConvSpec]


def _block(
    a: Arch, o: _Variant, hw: tuple[int, int], ci: int, planes: int, stride: int, dilation: int
) -> tuple[dict[str, ConvSpec], str | None]:
    """Return the convolutions of one block by child name, and its kind of shortcut (None for a plain block)."""
    (h, w), co = hw, planes * a.expansion
    changes = stride != 1 or ci != co
    kind: str | None = "identity"
    if o.shortcut is None:
        kind = None
    elif o.shortcut == "C" or (changes and o.shortcut == "B"):
        kind = "projection"
    elif changes:
        kind = "given"
    end = Epilogue(relu=True, add=kind is not None)

    convs: dict[str, ConvSpec] = {}
    if a.block == "bottleneck":
        width = planes * a.width // 64 * a.groups
        in_1x1, in_3x3 = (stride, 1) if o.stride_in_1x1 else (1, stride)
        c1 = o.conv(h=h, w=w, ci=ci, co=width, r=1, s=1, stride=(in_1x1, in_1x1), epilogue=_RELU)
        c2 = o.conv(
            h=c1.ho,
            w=c1.wo,
            ci=width,
            co=width,
            r=3,
            s=3,
            stride=(in_3x3, in_3x3),
            padding=(dilation, dilation),
            dilation=(dilation, dilation),
            groups=a.groups,
            epilogue=_RELU,
        )
        c3 = o.conv(h=c2.ho, w=c2.wo, ci=width, co=co, r=1, s=1, epilogue=end)
        convs.update(conv1=c1, conv2=c2, conv3=c3)
    else:
        c1 = o.conv(h=h, w=w, ci=ci, co=co, r=3, s=3, stride=(stride, stride), padding=(1, 1), epilogue=_RELU)
        c2 = o.conv(h=c1.ho, w=c1.wo, ci=co, co=co, r=3, s=3, padding=(1, 1), epilogue=end)
        convs.update(conv1=c1, conv2=c2)
    if kind == "projection":
        convs["downsample.0"] = o.conv(h=h, w=w, ci=ci, co=co, r=1, s=1, stride=(stride, stride), epilogue=_NORM)
    return convs, kind


def _check_size(image: int | tuple[int, int], batch: int, dtype: str) -> tuple[int, int]:
    hw = (image, image) if isinstance(image, int) else tuple(image)
    if len(hw) != 2 or min(hw) < 1:
        raise UserError("an image of at least 1x1 pixels", repr(image), "give the side, or (height, width)")
    if batch < 0:
        raise UserError("a batch of 0 or more images", str(batch), "give the number of images")
    if dtype not in ITEMSIZE:
        raise unknown_name("dtype", dtype, ITEMSIZE)
    return hw


def _walk(
    name: str,
    batch: int,
    image: int | tuple[int, int] | None,
    dtype: str,
    shortcut: str | None,
    stride_in_1x1: bool,
    replace_stride_with_dilation: Sequence[bool] | None,
    layout: str,
    batch_stats: bool,
    grad: bool,
) -> tuple[dict[str, ConvSpec], dict[str, tuple[dict[str, ConvSpec], str | None]]]:
    """Return the stem, and the blocks with their kinds of shortcut, by full name in order of execution."""
    a = arch(name)
    check_variant(name, shortcut, stride_in_1x1)
    h, w = _check_size(a.image if image is None else image, batch, dtype)
    dilate = (False, *(replace_stride_with_dilation or (False,) * (len(a.depths) - 1)))
    if len(dilate) != len(a.depths):
        raise UserError(
            f"replace_stride_with_dilation with {len(a.depths) - 1} values", str(len(dilate) - 1), "one per later stage"
        )
    if any(dilate) and a.block != "bottleneck":
        raise UserError("bottleneck blocks to dilate", f"{a.block} blocks of {name}", "use resnet50 or deeper")

    conv = partial(ConvSpec, n=batch, dtype=dtype, layout=layout, batch_stats=batch_stats, grad=grad)
    o = _Variant(shortcut or a.shortcut, stride_in_1x1, conv)
    if a.stem == "imagenet":
        pooled = Epilogue(relu=True, pool=(3, 2, 1))
        stem = conv(h=h, w=w, ci=3, co=64, r=7, s=7, stride=(2, 2), padding=(3, 3), epilogue=pooled)
    else:
        stem = conv(h=h, w=w, ci=3, co=16, r=3, s=3, padding=(1, 1), epilogue=_RELU)

    (h, w), ci, dilation = stem.out_hw(), stem.co, 1
    found: dict[str, tuple[dict[str, ConvSpec], str | None]] = {}
    for stage, (planes, depth) in enumerate(zip(a.planes, a.depths, strict=True)):
        stride = 1 if stage == 0 else 2
        previous = dilation  # torchvision: the first block of a dilated stage keeps the dilation before it
        if dilate[stage]:
            dilation, stride = dilation * stride, 1
        for i in range(depth):
            first = i == 0
            convs, kind = _block(a, o, (h, w), ci, planes, stride if first else 1, previous if first else dilation)
            last = convs["conv3" if a.block == "bottleneck" else "conv2"]
            h, w, ci = last.ho, last.wo, last.co
            found[f"{a.key}.layer{stage + 1}.{i}"] = convs, kind
    return {f"{a.key}.conv1": stem}, found


def problems(
    name: str,
    batch: int = 1,
    image: int | tuple[int, int] | None = None,
    dtype: str = "float32",
    *,
    shortcut: str | None = None,
    stride_in_1x1: bool = False,
    replace_stride_with_dilation: Sequence[bool] | None = None,
    layout: str = "nhwc",
    batch_stats: bool = False,
    grad: bool = False,
) -> dict[str, ConvSpec]:
    """Return every convolution of a net in order of execution, with the epilogue that fused inference gives it.

    Args:
        name: one of :data:`ARCHS`.
        batch: number of images.
        image: side in pixels or (height, width); by default the paper's 224 or 32.
        dtype: of activations and weights, such as ``bfloat16``.
        shortcut: A, B or C; by default B (torchvision) for ImageNet nets and A (section 4.2) for CIFAR nets.
        stride_in_1x1: put a bottleneck's stride in the first 1x1 (the paper's v1), not in the 3x3 (torchvision).
        replace_stride_with_dilation: one value per stage after the first, as in torchvision.
        layout: ``nhwc`` or ``nchw``.
        batch_stats: whether BatchNorm uses the statistics of the batch.
        grad: whether gradients are computed.

    Returns:
        Specs by the architecture's key and torchvision's module name: ``r50.conv1``, ``r50.layer1.0.downsample.0``.

    Raises:
        UserError: no such net, size or variant.
    """
    stem, found = _walk(
        name, batch, image, dtype, shortcut, stride_in_1x1, replace_stride_with_dilation, layout, batch_stats, grad
    )
    return stem | {f"{block}.{child}": c for block, (convs, _) in found.items() for child, c in convs.items()}


def blocks(
    name: str,
    batch: int = 1,
    image: int | tuple[int, int] | None = None,
    dtype: str = "float32",
    *,
    shortcut: str | None = None,
    stride_in_1x1: bool = False,
    replace_stride_with_dilation: Sequence[bool] | None = None,
    layout: str = "nhwc",
    batch_stats: bool = False,
    grad: bool = False,
) -> dict[str, BlockSpec]:
    """Return every residual block of a net by name, such as ``r50.layer1.0``; a plain net has none.

    Arguments and errors are those of :func:`problems`.
    """
    _, found = _walk(
        name, batch, image, dtype, shortcut, stride_in_1x1, replace_stride_with_dilation, layout, batch_stats, grad
    )
    op = OPS.get(ARCHS[name].block, "")
    return {
        block: BlockSpec(op, tuple(convs.values()), kind) for block, (convs, kind) in found.items() if kind is not None
    }
