"""Blocks and a net on kernels as compiled for sm_80 and sm_90, through dispatch, plans and native submission.

`pytest --compiled-for` runs every test of the interpreter in this way; these are the ones of `make test`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from resnet_fast import native, numerics
from resnet_fast.backends.triton import submission
from resnet_fast.backends.triton.training import chain
from resnet_fast.tools.ptx_machine import ptx_machine
from tests.support import op_cases, train_cases
from tests.support.train_cases import case

pytestmark = pytest.mark.skipif(not native.ptx_status(), reason=native.ptx_status().reason)


def inference(op: str, dtype: torch.dtype, **options: Any) -> op_cases.Problem:
    """Return a ragged problem of inference: no size is a multiple of a tile's."""
    p = op_cases.make(op, **{"n": 2, "h": 5, "w": 3, "ci": 16, "co": 8, **options})
    return p.map(lambda name, t: op_cases.lay_out(t, "nhwc") if name in ("x", "residual") else t).to(dtype)


@pytest.mark.parametrize(
    ("arch", "dtype"),
    [
        (80, torch.bfloat16),
        (90, torch.float16),
        pytest.param(89, torch.float16, marks=pytest.mark.slow),
        pytest.param(120, torch.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_a_convolution_is_within_the_budget(arch: int, dtype: torch.dtype) -> None:
    p = inference("conv_bn_act", dtype)
    with ptx_machine(arch) as machine:
        op_cases.assert_within_budget(p, "triton")
    counted = machine.launches[-1].report.counters["events"]
    assert counted.get("mma") or counted.get("wgmma")


@pytest.mark.parametrize("arch", [80, 90])
def test_tf32_rounds_the_operands_and_nothing_else(arch: int) -> None:
    p = inference("conv_bn_act", torch.float32)
    with ptx_machine(arch, tf32=True) as machine, torch.no_grad():
        y = p.run("triton")
    error = numerics.compare(y, p.to(torch.float64).eager()).rel
    assert 2**-14 < error < 2**-10, "half a unit of 11 bits is 2^-11"
    assert any(".tf32." in name for name in machine.launches[-1].report.counters["opcodes"])


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("op", ["basic_block", "bottleneck"])
def test_a_training_step_of_a_block_is_within_the_budget(op: str, dtype: torch.dtype, arch: int) -> None:
    p = case(op, dtype)
    with ptx_machine(arch, seed=1):
        first = train_cases.step(p, train_cases.fused)
        assert {way for plan in chain._plans.values() for way in plan.passes.ways} == {submission.NATIVELY}
    train_cases.check(p, first)
    with ptx_machine(arch, seed=2):
        train_cases.same(first, train_cases.step(p, train_cases.fused))


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
def test_frozen_norms_of_a_block_with_a_projection_are_folded(arch: int) -> None:
    """Two norms end in one constant: a path of the fold's kernel that once compiled for no GPU."""
    p = case("bottleneck", torch.bfloat16, co=12, projection=True, batch_stats=False)
    with ptx_machine(arch):
        step = train_cases.step(p, train_cases.fused)
    train_cases.check(p, step)
