"""What the pytest-benchmark entries share: ``pytest benchmarks --benchmark-only`` times ops, blocks and models.

These figures follow one competitor over time; to compare competitors use ``resnet-fast bench``, which interleaves them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from resnet_fast.benchmarks import compare, providers, suites
from resnet_fast.io import images

MODEL = "resnet50"
COMPETITORS = ("eager-nhwc", providers.OURS)

Run = Callable[[str, str, str], None]


@pytest.fixture(scope="session")
def every_case() -> Callable[[str], dict[str, suites.Case]]:
    """``every_case(suite)``: the cases of ``MODEL`` at batch 1 on a photograph, by name."""
    photos = images.load()
    model = compare.network(MODEL, photos, None, 224, 0)
    x = images.batch(photos, 1)
    return lambda suite: {case.name: case for case in suites.cases(suite, MODEL, model, x)}


@pytest.fixture
def run(every_case: Callable[[str], dict[str, suites.Case]], benchmark: Any) -> Run:
    """``run(suite, case, provider)`` times one competitor on one case."""

    def timed(suite: str, name: str, provider: str) -> None:
        case = every_case(suite)[name]
        (competitor,) = providers.select((provider,))
        verdict = competitor.supports(case.module, torch.float32, 1, "cpu")
        if not verdict:
            pytest.skip(verdict.reason)
        prepared = competitor.prepare(case.module, case.x)
        benchmark.extra_info.update(precision=prepared.precision, note=prepared.note)
        out = benchmark.pedantic(prepared.call, rounds=10, iterations=1, warmup_rounds=2)
        assert torch.isfinite(out).all()

    return timed
