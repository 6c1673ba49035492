"""Launches for the tests of kernels alone: small, of every shape that a kernel takes."""

from __future__ import annotations

from resnet_fast.spec import ConvSpec, Epilogue, LaunchSpec

RELU, ADD = Epilogue(relu=True), Epilogue(relu=True, add=True)


def conv(
    ci: int, co: int, k: int, *, n: int = 2, h: int = 9, w: int = 7, stride: int = 1, dilation: int = 1,
    groups: int = 1, padding: int | None = None, epilogue: Epilogue = RELU, dtype: str = "float16",
) -> ConvSpec:  # fmt: skip
    """A square convolution that keeps the image's size, unless told otherwise."""
    pad = dilation * (k // 2) if padding is None else padding
    pairs = [(v, v) for v in (stride, pad, dilation)]
    return ConvSpec(n, h, w, ci, co, k, k, *pairs, groups, dtype, "nhwc", epilogue)


def stem(co: int = 64, dtype: str = "float16", **size: int) -> LaunchSpec:
    """The ImageNet stem on a small image."""
    spec = conv(3, co, 7, stride=2, epilogue=Epilogue(relu=True, pool=(3, 2, 1)), dtype=dtype, **size)
    return LaunchSpec("stem", (spec,))
