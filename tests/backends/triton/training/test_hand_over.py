"""The check that a GPU passes before it trains: right kernels pass it, and results of other numbers do not."""

from __future__ import annotations

import pytest
import torch

from resnet_fast.backends.triton.training import hand_over

pytestmark = pytest.mark.interpret

CPU = torch.device("cpu")
TILES = 300  # more than one chunk


def test_the_kernels_pass() -> None:
    hand_over.check(CPU, TILES, runs=2)


@pytest.mark.parametrize("part", ["mean", "gradient of beta"])
def test_results_of_an_earlier_run_do_not(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the last program had read what an earlier launch left in memory."""
    module, name, at = {
        "mean": (hand_over.batch_norm, "finalize", 0),
        "gradient of beta": (hand_over.norm_gradient, "coefficients", 1),
    }[part]
    plain, first = getattr(module, name), []

    def stale(*arguments, **more):
        first.append(arguments[at])
        given = list(arguments)
        given[at] = first[0]
        return plain(*given, **more)

    monkeypatch.setattr(module, name, stale)
    with pytest.raises(AssertionError, match=f"expected the {part} of run 1"):
        hand_over.check(CPU, TILES, runs=2)
