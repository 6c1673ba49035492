"""bottleneck on the reference: stock PyTorch bit for bit, with each kind of shortcut."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.op_cases import assert_equals_eager, make

OP = "bottleneck"
SAME = {"ci": 16, "co": 8}
CASES: dict[str, dict[str, Any]] = {
    "identity": SAME,
    "identity_nhwc": {**SAME, "layout": "nhwc"},
    "projection": {"stride": 2, "ci": 6},
    "projection_bias": {"stride": 2, "bias": True, "layout": "nhwc"},
    "given": {"stride": 2, "residual": True},
    "dilation": {"dilation": 2, "projection": True},
    "no_affine": {**SAME, "affine": False},
    "no_norm": {**SAME, "present": False, "bias": True},
    "groups": {**SAME, "groups": 4},
    "depthwise_stride2": {"groups": 8, "stride": 2},
}


@pytest.mark.parametrize("name", CASES)
def test_eval_statistics_equal_eager(name: str) -> None:
    assert_equals_eager(make(OP, **CASES[name]))


@pytest.mark.parametrize("name", [n for n in CASES if n != "no_norm"])
def test_batch_statistics_equal_eager(name: str) -> None:
    assert_equals_eager(make(OP, batch_stats=True, **CASES[name]))


def test_a_frozen_norm_among_training_ones_keeps_its_statistics() -> None:
    p = make(OP, batch_stats=True, **SAME)
    frozen = p.norms[1]._replace(batch_stats=False)
    norms = (p.norms[0], frozen, *p.norms[2:])
    assert_equals_eager(type(p)(p.op, p.x, p.convs, norms))


@pytest.mark.parametrize("backend", ["reference", "onednn"])
@pytest.mark.parametrize("name", ["identity", "identity_nhwc", "given"])
def test_neither_input_nor_shortcut_is_overwritten(name: str, backend: str) -> None:
    p = make(OP, **CASES[name])
    before = {k: t.clone() for k, t in p.tensors().items()}
    p.run(backend)
    assert all(torch.equal(t, before[k]) for k, t in p.tensors().items())
