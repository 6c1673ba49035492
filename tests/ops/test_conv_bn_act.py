"""conv_bn_act on the reference: stock PyTorch bit for bit, forward, backward and running statistics."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.op_cases import assert_equals_eager, make

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "1x1": {"k": 1},
    "5x5_even_pad": {"k": 5, "padding": 1},
    "stride2": {"stride": 2},
    "stride3_dilation2": {"stride": 3, "dilation": 2},
    "groups": {"groups": 4},
    "depthwise": {"groups": 8},
    "bias": {"bias": True},
    "no_affine": {"affine": False},
    "no_norm_bias": {"present": False, "bias": True},
    "affine_only": {"tracked": False},
    "residual": {"residual": True},
    "residual_no_relu": {"residual": True, "relu": False},
    "no_relu": {"relu": False},
    "nhwc": {"layout": "nhwc", "residual": True},
    "nhwc_weight": {"weight_layout": "nhwc"},
    "one_pixel": {"h": 1, "w": 1, "n": 3},
}


@pytest.mark.parametrize("name", CASES)
def test_eval_statistics_equal_eager(name: str) -> None:
    assert_equals_eager(make("conv_bn_act", **CASES[name]))


@pytest.mark.parametrize("name", [n for n in CASES if n not in ("no_norm_bias", "affine_only")])
@pytest.mark.parametrize("tracked", [True, False])
def test_batch_statistics_equal_eager(name: str, tracked: bool) -> None:
    assert_equals_eager(make("conv_bn_act", **{**CASES[name], "batch_stats": True, "tracked": tracked}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("batch_stats", [False, True])
def test_other_dtypes_equal_eager(dtype: torch.dtype, batch_stats: bool) -> None:
    assert_equals_eager(make("conv_bn_act", dtype=dtype, residual=True, batch_stats=batch_stats))


def test_float32_statistics_under_16_bit_equal_eager() -> None:
    assert_equals_eager(make("conv_bn_act", dtype=torch.bfloat16, norm_dtype=torch.float32, batch_stats=True))


def test_float32_weight_under_16_bit_is_rounded_once() -> None:
    p = make("conv_bn_act", dtype=torch.bfloat16, norm_dtype=torch.float32)
    wide = p.map(lambda k, t: t + torch.rand_like(t, dtype=torch.float32) * 1e-3 if k == "weight0" else t)
    assert wide.convs[0].weight.dtype == torch.float32
    rounded = wide.map(lambda k, t: t.bfloat16() if k == "weight0" else t)
    assert torch.equal(wide.run("reference"), rounded.eager())


def test_the_residual_is_not_overwritten() -> None:
    p = make("conv_bn_act", residual=True)
    before = p.residual.clone()
    p.run("reference")
    assert torch.equal(p.residual, before)
