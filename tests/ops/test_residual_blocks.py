"""basic_block and bottleneck on the reference: stock PyTorch bit for bit, with each kind of shortcut."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.op_cases import assert_equals_eager, make

SAME: dict[str, dict[str, Any]] = {"basic_block": {"ci": 8, "co": 8}, "bottleneck": {"ci": 16, "co": 8}}
"""Channels of a block without a projection."""

CASES: dict[tuple[str, str], dict[str, Any]] = {
    (op, name): case
    for op, same in SAME.items()
    for name, case in {
        "identity": same,
        "identity_nhwc": {**same, "layout": "nhwc"},
        "projection": {"stride": 2, "ci": 6},
        "projection_bias": {"stride": 2, "bias": True, "layout": "nhwc"},
        "given": {"stride": 2, "residual": True},
        "dilation": {"dilation": 2, "projection": True},
        "no_affine": {**same, "affine": False},
        "no_norm": {**same, "present": False, "bias": True},
    }.items()
} | {
    ("bottleneck", "groups"): {**SAME["bottleneck"], "groups": 4},
    ("bottleneck", "depthwise_stride2"): {"groups": 8, "stride": 2},
}


@pytest.mark.parametrize(("op", "name"), CASES)
def test_eval_statistics_equal_eager(op: str, name: str) -> None:
    assert_equals_eager(make(op, **CASES[op, name]))


@pytest.mark.parametrize(("op", "name"), [case for case in CASES if case[1] != "no_norm"])
def test_batch_statistics_equal_eager(op: str, name: str) -> None:
    assert_equals_eager(make(op, batch_stats=True, **CASES[op, name]))


@pytest.mark.parametrize("op", SAME)
def test_a_frozen_norm_among_training_ones_keeps_its_statistics(op: str) -> None:
    p = make(op, batch_stats=True, **SAME[op])
    frozen = p.norms[1]._replace(batch_stats=False)
    norms = (p.norms[0], frozen, *p.norms[2:])
    assert_equals_eager(type(p)(p.op, p.x, p.convs, norms))


@pytest.mark.parametrize("backend", ["reference", "onednn"])
@pytest.mark.parametrize("op", SAME)
@pytest.mark.parametrize("name", ["identity", "identity_nhwc", "given"])
def test_neither_input_nor_shortcut_is_overwritten(op: str, name: str, backend: str) -> None:
    p = make(op, **CASES[op, name])
    before = {k: t.clone() for k, t in p.tensors().items()}
    p.run(backend)
    assert all(torch.equal(t, before[k]) for k, t in p.tensors().items())
