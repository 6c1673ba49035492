"""Tensors of more than 2^31 elements: row offsets are 64-bit, by construction and on real memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl

from resnet_fast import devices, numerics
from resnet_fast.backends.triton.problem import problem
from resnet_fast.backends.triton.tiles import pixel_of_row, row_offset
from resnet_fast.spec import LaunchSpec
from resnet_fast.tuning import heuristic
from tests.support.launch_cases import RELU, conv, stem

pytestmark = pytest.mark.interpret


@triton.jit
def _offsets_kernel(out_ptr, first, Ho, Wo, stride, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    m = first + i
    n, ho, wo = pixel_of_row(m, Ho, Wo)
    tl.store(out_ptr + 4 * i, row_offset(m, stride))
    tl.store(out_ptr + 4 * i + 1, n.to(tl.int64))
    tl.store(out_ptr + 4 * i + 2, ho.to(tl.int64))
    tl.store(out_ptr + 4 * i + 3, wo.to(tl.int64))


@pytest.mark.parametrize("first", [0, 2**24 - 8, 2**31 - 20])
@pytest.mark.parametrize("stride", [1, 2048, 100_003])
def test_offsets_of_rows_are_exact(first: int, stride: int) -> None:
    """Batch 4,096 at 112x112 has 51 million rows, of 64 channels each."""
    out = torch.empty(16, 4, dtype=torch.int64)
    _offsets_kernel[(1,)](out, first, 112, 97, stride, BLOCK=16)
    for i, (offset, n, ho, wo) in enumerate(out.tolist()):
        m = first + i
        assert (offset, n, ho, wo) == (m * stride, m // (112 * 97), m // 97 % 112, m % 97)


@pytest.mark.slow
@pytest.mark.parametrize(
    "launch",
    [
        LaunchSpec("conv_bn_act_1x1", (conv(16, 16, 1, h=5, w=4),)),
        LaunchSpec("conv_bn_act_3x3", (conv(16, 16, 3, h=5, w=4),)),
        LaunchSpec("conv_bn_act", (conv(3, 16, 5, h=5, w=4),)),
        stem(16, h=8, w=8),
        LaunchSpec("bottleneck", (conv(16, 16, 3, h=5, w=4), conv(16, 32, 1, h=5, w=4, epilogue=RELU))),
    ],
    ids=lambda launch: launch.kernel,
)
def test_images_that_lie_2_to_the_31_elements_apart(launch: LaunchSpec) -> None:
    p = problem(launch)
    c = launch.first
    step = 2**31 + 64
    field = torch.empty(step + c.h * c.w * c.ci, dtype=torch.float16)  # 4 GiB of addresses, of which little is touched
    apart = field.as_strided(p.x.shape, (step, 1, c.w * c.ci, c.ci))
    apart.copy_(p.x)
    config = heuristic.select(launch, devices.gpu("h100"))
    assert config is not None
    double = p.to(torch.float64)
    numerics.assert_close(replace(p, x=apart).run(config[0]), double.eager(), p.eager(), c.gemm_k)


def test_more_rows_than_32_bits_are_refused() -> None:
    from resnet_fast.backends import triton as backend

    spec = conv(16, 16, 1, n=2**17, h=128, w=128)
    verdict = backend._supports(spec)
    assert not verdict and "fewer than 2^31" in verdict.reason
