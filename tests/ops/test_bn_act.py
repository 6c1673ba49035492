"""bn_act on the reference: stock PyTorch bit for bit, and x stays the caller's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.op_cases import assert_equals_eager, make

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "no_relu": {"relu": False},
    "residual": {"residual": True},
    "residual_no_relu": {"residual": True, "relu": False},
    "no_affine": {"affine": False},
    "nhwc": {"layout": "nhwc", "residual": True},
    "one_pixel": {"h": 1, "w": 1},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("batch_stats", [False, True])
def test_equals_eager(name: str, batch_stats: bool) -> None:
    assert_equals_eager(make("bn_act", batch_stats=batch_stats, **CASES[name]))


@pytest.mark.parametrize("residual", [False, True])
def test_an_absent_norm_equals_eager(residual: bool) -> None:
    assert_equals_eager(make("bn_act", present=False, residual=residual))


@pytest.mark.parametrize("backend", ["reference", "onednn"])
@pytest.mark.parametrize("relu", [False, True])
def test_an_absent_norm_returns_a_new_tensor(backend: str, relu: bool) -> None:
    p = make("bn_act", present=False, relu=relu)
    before = p.x.clone()
    y = p.run(backend)
    y.fill_(7)
    assert torch.equal(p.x, before)
