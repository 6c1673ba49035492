"""Time cases of the suites as pytest-benchmark entries: ``pytest benchmarks --benchmark-only``.

These figures follow one provider over time. To compare providers use ``resnet-fast bench``, which interleaves them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from resnet_fast.benchmarks import compare, harness, providers, suites
from resnet_fast.io import images

MODEL = "resnet50"
CASES = {
    "models": ("",),
    "blocks": (".layer1.0", ".layer1.1", ".layer3.0", ".layer4.1"),
    "ops": tuple(f".{conv}" for conv in (
        "layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv2", "layer3.0.conv3", "layer4.0.downsample.0"
    )),
}  # fmt: skip
PLAN = harness.TimingPlan()


@pytest.fixture(scope="session")
def cases_of() -> Callable[[str], dict[str, suites.SuiteCase]]:
    """``cases_of(suite)``: the cases of ``MODEL`` at batch 1 on a photograph, by name."""
    photos = images.load()
    model = compare.network(MODEL, photos, None, 224, 0)
    x = images.batch(photos, 1)
    return lambda suite: {case.name: case for case in suites.cases(suite, MODEL, model, x)}


@pytest.mark.parametrize("provider", ["eager-nhwc", providers.OURS])
@pytest.mark.parametrize(("suite", "name"), [(suite, MODEL + name) for suite, names in CASES.items() for name in names])
def test_case(
    suite: str, name: str, provider: str, cases_of: Callable[[str], dict[str, suites.SuiteCase]], benchmark: Any
) -> None:
    case = cases_of(suite)[name]
    (competitor,) = providers.select((provider,))
    verdict = competitor.supports(case.module, torch.float32, 1, "cpu")
    if not verdict:
        pytest.skip(verdict.reason)
    prepared = competitor.prepare(case.module, case.x)
    benchmark.extra_info.update(precision=prepared.precision, note=prepared.note)
    out = benchmark.pedantic(prepared.call, rounds=PLAN.rounds, iterations=1, warmup_rounds=PLAN.warmup)
    assert torch.isfinite(out).all()
