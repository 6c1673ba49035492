"""Every shipped config of every kernel on ragged shapes, against fp64 and eager's own error, in three dtypes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from resnet_fast import devices, numerics
from resnet_fast.backends.triton.problem import problem
from resnet_fast.spec import Epilogue, LaunchSpec
from resnet_fast.tuning import configs
from tests.support.grids import covering
from tests.support.launch_cases import ADD, conv, stem

pytestmark = pytest.mark.interpret

DTYPES = ("float16", "bfloat16", "float32")


def _families(dtype: str) -> dict[str, list[LaunchSpec]]:
    """Return launches per kernel that no tile divides: 126 pixels, odd channel counts, every epilogue."""
    plain = Epilogue()
    c1 = conv(72, 40, 1, epilogue=ADD, dtype=dtype)
    wide = conv(64, 200, 1, dtype=dtype)
    project = conv(24, 40, 1, n=2, h=18, w=14, stride=2, epilogue=plain, dtype=dtype)
    c3 = conv(40, 72, 3, epilogue=ADD, dtype=dtype)
    strided = conv(32, 40, 3, h=18, w=14, stride=2, dilation=2, padding=2, dtype=dtype)
    # in float32 a tail needs TF32; the interpreter multiplies in fp32 all the same
    tf32 = dtype == "float32"
    mid = conv(40, 40, 3, dtype=dtype).with_(tf32=tf32)
    out = conv(40, 88, 1, epilogue=ADD, dtype=dtype).with_(tf32=tf32)
    out_project = conv(24, 88, 1, h=18, w=14, stride=2, epilogue=plain, dtype=dtype)
    return {
        "conv_bn_act_1x1": [
            LaunchSpec("conv_bn_act_1x1", (c1,)),
            LaunchSpec("conv_bn_act_1x1", (wide,)),
            LaunchSpec("conv_bn_act_1x1", (c1,), project),
            LaunchSpec("conv_bn_act_1x1", (conv(40, 48, 1, stride=2, epilogue=plain, dtype=dtype),)),
        ],
        "conv_bn_act_3x3": [
            LaunchSpec("conv_bn_act_3x3", (c3,)),
            LaunchSpec("conv_bn_act_3x3", (strided,)),
            LaunchSpec("conv_bn_act_3x3", (conv(40, 40, 3, epilogue=ADD, dtype=dtype),), project),
            LaunchSpec("conv_bn_act_3x3", (conv(64, 96, 3, groups=2, dtype=dtype),)),
        ],
        "conv_bn_act": [
            LaunchSpec("conv_bn_act", (conv(5, 72, 5, stride=2, epilogue=ADD, dtype=dtype),)),
            LaunchSpec("conv_bn_act", (conv(24, 40, 3, groups=4, dilation=2, dtype=dtype),)),
        ],
        "stem": [stem(72, dtype, h=13, w=11), stem(64, dtype, n=1, h=22, w=9)],
        "bottleneck": [
            LaunchSpec("bottleneck", (mid, out)),
            LaunchSpec(
                "bottleneck", (conv(40, 40, 3, h=18, w=14, stride=2, dtype=dtype).with_(tf32=tf32), out), out_project
            ),
        ],
    }


FAMILIES = {dtype: _families(dtype) for dtype in DTYPES}
# Every config on every launch and in every dtype, and every launch in every dtype. A tile breaks on a shape, or on how
# wide an element is; the launches of a kernel differ in shape alone.
GRID = covering(
    ((kernel, i), dtype, config)
    for dtype in DTYPES
    for kernel, launches in FAMILIES[dtype].items()
    for config in configs.SHIPPED[kernel]
    for i, launch in enumerate(launches)
    if not config.descriptors or configs._descriptors_apply(launch, config, devices.gpu("h100").gpu)
    if config.splits == 1 or launch.projection is None
)
CASES = [
    pytest.param(
        FAMILIES[dtype][kernel][i],
        configs.for_dtype(config, dtype),
        id=f"{kernel}-{dtype}-{i}-{config}".replace(" ", "-"),
    )
    for (kernel, i), dtype, config in GRID
]


@pytest.mark.parametrize("launch,config", CASES)
def test_shipped_config(launch: LaunchSpec, config: configs.Config, poisoned_outputs: None) -> None:
    problem(launch).check(config)


@pytest.mark.parametrize("apart", ["images", "base"])
def test_descriptors_are_for_dense_aligned_tensors_only(apart: str) -> None:
    """The pointer kernel runs every other image of a batch, and a tensor that begins between two 16-byte words."""
    p = problem(LaunchSpec("conv_bn_act_1x1", (conv(64, 48, 1),)))
    config = next(c for c in configs.SHIPPED["conv_bn_act_1x1"] if c.descriptors)
    n, c, h, w = p.x.shape
    shape, skip = ((2 * n, h, w, c), 0) if apart == "images" else ((n, h, w, c), 1)
    field = torch.full((skip + n * 2 * h * w * c,), float("nan"), dtype=p.x.dtype)
    view = field[skip : skip + 2 * n * h * w * c // (1 if apart == "images" else 2)].view(shape).permute(0, 3, 1, 2)
    view = view[::2] if apart == "images" else view
    assert torch.equal(replace(p, x=view.copy_(p.x)).run(config), p.run(config))


def test_every_shipped_config_has_a_case() -> None:
    assert {p.values[1] for p in CASES} == {
        configs.for_dtype(c, dtype) for dtype in DTYPES for shipped in configs.SHIPPED.values() for c in shipped
    }


def test_a_wrong_answer_is_found() -> None:
    """Check the check: one weight of a correct launch is off by a half."""
    p = problem(LaunchSpec("conv_bn_act_1x1", (conv(32, 16, 1),)))
    wrong = replace(p, weights=[p.weights[0].clone()])
    wrong.weights[0][3, 4] += 0.5
    config = configs.candidates(p.spec, devices.gpu("h100").gpu)[-1]
    p.check(config)
    got = wrong.run(config)
    with pytest.raises(AssertionError, match="over the budget"):
        numerics.assert_close(got, p.to(torch.float64).eager(), p.eager(), 32)
