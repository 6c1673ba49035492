"""List the launches that the commands run: ragged ones that no tile divides, and those of real nets; and the nets.

Ragged launches are small, with channels off the powers of two, unaligned rows, every epilogue, stride, dilation and
groups; together they admit every shipped config. Real launches are those of every route of a net's blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from resnet_fast.devices import Gpu
from resnet_fast.spec import YES, BlockSpec, ConvSpec, Epilogue, LaunchSpec, Verdict
from resnet_fast.tuning import configs, routes, shapes, training_configs
from resnet_fast.tuning.configs import Config

PRECISIONS = ("bfloat16", "float16", "tf32", "float32")
"""In order of importance; ``tf32``: float32 tensors whose products may be rounded to TF32."""

NONE, RELU, ADD = Epilogue(), Epilogue(relu=True), Epilogue(relu=True, add=True)


@contextmanager
def cudnn_tf32(allowed: bool) -> Iterator[None]:
    """Let cuDNN's convolutions of float32 use TF32, or forbid it, and put the switch back at the end."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def in_precision(launch: LaunchSpec, precision: str) -> LaunchSpec:
    """Return the launch on tensors of another dtype."""
    tf32 = precision == "tf32"
    changes: dict[str, Any] = {"dtype": "float32" if tf32 else precision, "tf32": tf32}
    projection = launch.projection and launch.projection.with_(**changes)
    return replace(launch, convs=tuple(c.with_(**changes) for c in launch.convs), projection=projection)


def conv(
    ci: int, co: int, k: int, *, n: int = 2, h: int = 9, w: int = 7, stride: int = 1, dilation: int = 1,
    groups: int = 1, epilogue: Epilogue = RELU,
) -> ConvSpec:  # fmt: skip
    """Return a square convolution, padded so that stride 1 keeps the image's size."""
    stride_, padding, dilation_ = ((v, v) for v in (stride, dilation * (k // 2), dilation))
    return ConvSpec(n, h, w, ci, co, k, k, stride_, padding, dilation_, groups, "bfloat16", "nhwc", epilogue)


def _stem(co: int, **size: int) -> LaunchSpec:
    return LaunchSpec("stem", (conv(3, co, 7, stride=2, epilogue=Epilogue(relu=True, pool=(3, 2, 1)), **size),))


def ragged(precision: str = "bfloat16") -> dict[str, tuple[LaunchSpec, ...]]:
    """Return launches by kernel: 126 output pixels (no tile divides them), channels off the powers of two."""

    def one(kernel: str, *convs: ConvSpec, projection: ConvSpec | None = None) -> LaunchSpec:
        return in_precision(LaunchSpec(kernel, convs, projection), precision)

    project = conv(24, 136, 1, h=18, w=14, stride=2, epilogue=NONE)
    mid, last = conv(40, 40, 3), conv(40, 88, 1, epilogue=ADD)
    into = conv(24, 88, 1, h=18, w=14, stride=2, epilogue=NONE)
    return {
        "conv_bn_act_1x1": (
            one("conv_bn_act_1x1", conv(72, 136, 1, epilogue=ADD)),
            one("conv_bn_act_1x1", conv(75, 131, 1, epilogue=ADD)),
            one("conv_bn_act_1x1", conv(64, 200, 1)),
            one("conv_bn_act_1x1", conv(2040, 136, 1, epilogue=ADD)),  # K steps for eight splits
            one("conv_bn_act_1x1", conv(72, 136, 1, epilogue=ADD), projection=project),
            one("conv_bn_act_1x1", conv(40, 48, 1, stride=2, epilogue=NONE)),
        ),
        "conv_bn_act_3x3": (
            one("conv_bn_act_3x3", conv(72, 136, 3, epilogue=ADD)),
            one("conv_bn_act_3x3", conv(75, 131, 3, h=18, w=14, stride=2, dilation=2)),
            one("conv_bn_act_3x3", conv(40, 136, 3, epilogue=ADD), projection=project),
            one("conv_bn_act_3x3", conv(80, 96, 3, groups=2)),
            one("conv_bn_act_3x3", conv(64, 64, 3, groups=16, epilogue=NONE)),
        ),
        "conv_bn_act": (
            one("conv_bn_act", conv(5, 72, 5, stride=2, epilogue=ADD)),
            one("conv_bn_act", conv(24, 40, 3, groups=4, dilation=2)),
        ),
        "stem": (in_precision(_stem(72, h=21, w=27), precision), in_precision(_stem(64, n=1, h=64, w=30), precision)),
        "bottleneck": (
            one("bottleneck", mid, last),
            one("bottleneck", conv(40, 40, 3, h=18, w=14, stride=2), last, projection=into),
        ),
    }


def ragged_training(precision: str = "bfloat16") -> tuple[LaunchSpec, ...]:
    """Return every direction of convolutions that no tile divides, with a raw input and with a finished one.

    Then dgrad and wgrad with a folded norm.
    """
    convs = (
        conv(72, 136, 1),
        conv(40, 48, 1, stride=2),
        conv(75, 131, 3, h=18, w=14, stride=2, dilation=2),
        conv(136, 136, 3),
        conv(80, 96, 3, groups=2),
        conv(64, 64, 3, groups=16),
        conv(5, 72, 5, stride=2),
        conv(16, 24, 3),
    )
    found = [
        LaunchSpec(kernel, (c.with_(batch_stats=True, grad=True),), prologue=prologue)
        for kernel in training_configs.KERNELS
        for c in convs
        for prologue in (True, False)
    ]
    folded = (training_configs.folded_launches(c.with_(grad=True), masked) for c in convs for masked in (True, False))
    found += dict.fromkeys(launch for pair in folded for launch in pair)
    return tuple(in_precision(launch, precision) for launch in found)


def judged(launch: LaunchSpec, gpu: Gpu) -> tuple[tuple[Config, Verdict], ...]:
    """Return the shipped configs of a launch with the verdict of the rules on each.

    Those of a training launch, packed and exact, are only the ones that may be chosen.
    """
    if not training_configs.is_training(launch):
        return configs.judged(launch, gpu)
    both = dict.fromkeys(c for packed in (True, False) for c in training_configs.candidates(launch, gpu, packed))
    return tuple((config, YES) for config in both)


def real_training(batch: int = 2) -> tuple[LaunchSpec, ...]:
    """Return every launch of a training step of ResNet-50 once, with batch statistics and backward with folded norms.

    The image needs no gradient.
    """
    found: list[LaunchSpec] = []
    for batch_stats in (True, False):
        stem, *blocks = (spec.with_(batch_stats=batch_stats) for spec in specs("resnet50", batch, train=True).values())
        found += [launch for launch in training_configs.training_launches(stem) if launch.kernel != "conv_dgrad"]
        found += [launch for block in blocks for launch in training_configs.training_launches(block)]
    return tuple(dict.fromkeys(found))


def specs(
    net: str, batch: int, dtype: str = "bfloat16", image: int | None = None, train: bool = False
) -> dict[str, ConvSpec | BlockSpec]:
    """Return the specs of an accelerated net's stem and blocks, by name."""
    name, stem = next(iter(shapes.problems(net, batch, image, dtype, batch_stats=train, grad=train).items()))
    return {name: stem, **shapes.blocks(net, batch, image, dtype, batch_stats=train, grad=train)}


def launches(net: str, batch: int, dtype: str = "bfloat16", image: int | None = None) -> tuple[LaunchSpec, ...]:
    """Return every launch of every route of ``net`` once."""
    found = [r.launches for spec in specs(net, batch, dtype, image).values() for r in routes.routes(spec)]
    return tuple(dict.fromkeys(launch for group in found for launch in group))


def real(precision: str = "bfloat16", batch: int = 2) -> tuple[LaunchSpec, ...]:
    """Return launches of ResNet-50, and those that ResNet-18 and ResNeXt-50 add: projections into a 3x3, and groups.

    In bfloat16 all of them; in the others the first and the last per kernel and shape of filter, stride and epilogue.
    """
    found = list(launches("resnet50", batch))
    found += [x for x in launches("resnet18", batch) if x.kernel == "conv_bn_act_3x3" and (x.projection or x.residual)]
    found += [x for x in launches("resnext50_32x4d", batch) if x.last.groups > 1]
    if precision != "bfloat16":
        ends: dict[tuple[Any, ...], list[LaunchSpec]] = {}
        for x in found:
            ends.setdefault((x.kernel, x.projection is not None, x.residual, x.last.groups > 1), []).append(x)
        found = [x for group in ends.values() for x in (group[0], group[-1])]
    return tuple(dict.fromkeys(in_precision(x, precision) for x in found))


def calibrated(name: str, batch: int, image: int, device: str, dtype: str) -> tuple[nn.Module, torch.Tensor]:
    """Build a seeded stock net in eval mode, NHWC, with calibrated BatchNorms, and a batch (N, 3, image, image)."""
    from resnet_fast.io import weights
    from resnet_fast.models import registry

    model = weights.seeded(lambda: registry.build(name)).to(device)
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(max(4, batch), 3, image, image, generator=generator, device=device)
    weights.calibrate(model, x)
    kind = getattr(torch, dtype)
    x = x[:batch].to(kind).contiguous(memory_format=torch.channels_last)
    return model.eval().to(kind).to(memory_format=torch.channels_last), x
