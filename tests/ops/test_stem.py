"""stem on the reference: stock PyTorch bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.op_cases import assert_equals_eager, make

CASES: dict[str, dict[str, Any]] = {
    "imagenet": {"ci": 3, "k": 7, "stride": 2, "h": 33, "w": 31},
    "bias_nhwc": {"ci": 3, "k": 7, "stride": 2, "h": 32, "w": 32, "bias": True, "layout": "nhwc"},
    "pool2": {"pool": (2, 2, 0)},
    "pool3_stride1": {"pool": (3, 1, 1), "affine": False},
    "no_pool": {"pool": (1, 1, 0)},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("batch_stats", [False, True])
def test_equals_eager(name: str, batch_stats: bool) -> None:
    assert_equals_eager(make("stem", batch_stats=batch_stats, **CASES[name]))


def test_padding_of_the_pool_is_not_zero_where_everything_is_negative() -> None:
    p = make("stem", ci=3, k=3, pool=(3, 2, 1))
    p = p.map(lambda k, t: torch.full_like(t, -5.0) if k == "beta0" else t)
    assert torch.equal(p.run("reference"), p.eager())
