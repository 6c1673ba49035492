"""The check that a GPU passes before it trains: right kernels pass it, and results of other numbers do not."""

from __future__ import annotations

import pytest
import torch

from resnet_fast.backends.triton.training import hand_over

pytestmark = pytest.mark.interpret

CPU = torch.device("cpu")
TILES, PIXELS = 300, 100  # more than one chunk, more than one program


@pytest.fixture(autouse=True)
def few_filters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hand_over, "OUT", 40)


def test_the_kernels_pass() -> None:
    hand_over.check(CPU, TILES, runs=2, pixels=PIXELS)


@pytest.mark.parametrize("part", ["mean", "gradient of beta", "end of a block", "gradient of beta at a block's end"])
def test_results_of_an_earlier_run_do_not(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the last program had read what an earlier launch left in memory."""
    module, name, at = {
        "mean": (hand_over.batch_norm, "finalize", 0),
        "gradient of beta at a block's end": (hand_over.block_end, "block_end_backward", 0),
        "end of a block": (hand_over.block_end, "block_end", 1),
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
        hand_over.check(CPU, TILES, runs=2, pixels=PIXELS)
