"""``pytest benchmarks/test_bench_models.py --benchmark-only``: a whole net, one competitor at a time."""

from __future__ import annotations

import pytest

from resnet_fast.benchmarks.conftest import COMPETITORS, MODEL, Run


@pytest.mark.parametrize("provider", COMPETITORS)
def test_models(run: Run, provider: str) -> None:
    run("models", MODEL, provider)
