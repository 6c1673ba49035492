"""``pytest benchmarks/test_bench_ops.py --benchmark-only``: some convolutions, one competitor at a time."""

from __future__ import annotations

import pytest

from resnet_fast.benchmarks.conftest import COMPETITORS, MODEL, Run

NAMES = ("layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv2", "layer3.0.conv3", "layer4.0.downsample.0")


@pytest.mark.parametrize("provider", COMPETITORS)
@pytest.mark.parametrize("name", NAMES)
def test_ops(run: Run, name: str, provider: str) -> None:
    run("ops", f"{MODEL}.{name}", provider)
