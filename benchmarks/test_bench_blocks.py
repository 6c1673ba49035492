"""``pytest benchmarks/test_bench_blocks.py --benchmark-only``: some residual blocks, one competitor at a time."""

from __future__ import annotations

import pytest

from resnet_fast.benchmarks.conftest import COMPETITORS, MODEL, Run

NAMES = ("layer1.0", "layer1.1", "layer3.0", "layer4.1")


@pytest.mark.parametrize("provider", COMPETITORS)
@pytest.mark.parametrize("name", NAMES)
def test_blocks(run: Run, name: str, provider: str) -> None:
    run("blocks", f"{MODEL}.{name}", provider)
