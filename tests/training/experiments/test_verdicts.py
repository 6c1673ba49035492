"""A verdict follows from the figures, and not from less than the noise of counting."""

from __future__ import annotations

from pathlib import Path

import pytest

from resnet_fast.training.experiments import verdicts
from resnet_fast.training.experiments.protocols import experiment
from resnet_fast.training.experiments.responses import Responses
from resnet_fast.training.experiments.runs import Run


def runs(name: str, **errors: float) -> dict[str, Run]:
    """Finished runs of an experiment with these training errors (a tenth where none is given)."""
    found = {}
    for case in experiment(name).cases:
        error = errors.get(case.label.replace("-", "_"), 0.1)
        last = {
            "step": 780,
            "epoch": 10.0,
            "train_error": error,
            "val_error": error,
            "val_images": 10000,
            "seconds": 6.0,
        }
        recipe = case.recipe("reduced", None, 0, {})
        trains = [{"loss": 2.3, "error": 0.9, "step": 10}, {"loss": 1.2, "error": 0.4, "step": 80}]
        found[case.label] = Run(case, Path(), recipe, [last], {"train_images": 10000}, trains)
    return found


def shown(found: list[verdicts.Finding]) -> list[bool]:
    return [v.shown for v in found]


def test_degradation_is_shown_by_the_papers_order() -> None:
    found = verdicts.degradation(
        runs("degradation", plain_56=0.2, plain_34=0.15, resnet_20=0.09, resnet_56=0.08, resnet_34=0.09)
    )
    assert shown(found) == [True] * 6
    assert "+10.00 points" in found[0].because


@pytest.mark.parametrize("plain_56", [0.05, 0.1, 0.1 + 0.004])  # lower, equal, higher by less than 2 sigma of 10,000
def test_degradation_is_not_shown_within_noise(plain_56: float) -> None:
    assert not verdicts.degradation(runs("degradation", plain_56=plain_56))[0].shown


def test_residual_net_that_degrades_is_said_to() -> None:
    found = verdicts.degradation(runs("degradation", resnet_56=0.3, plain_56=0.4))
    assert shown(found)[2] is False


def test_noise_is_two_standard_errors() -> None:
    assert verdicts.noise(0.5, 0.5, 100, 100) == pytest.approx(2 * (0.25 / 100 * 2) ** 0.5)


def test_1202_layers_have_to_be_better_than_the_papers_sign_of_convergence() -> None:
    found = runs("depth")
    assert verdicts.depth(found)[-1].shown
    found["resnet-1202"].trains[-1]["error"] = 0.85
    assert not verdicts.depth(found)[-1].shown


def test_shortcuts_apart_are_said_to_be() -> None:
    assert verdicts.shortcuts(runs("shortcuts"))[0].shown
    assert not verdicts.shortcuts(runs("shortcuts", resnet_20=0.2))[0].shown


def test_bottleneck_has_to_be_better() -> None:
    assert verdicts.bottleneck(runs("bottleneck", resnet_50=0.08))[0].shown
    assert not verdicts.bottleneck(runs("bottleneck", resnet_50=0.12))[0].shown


def test_responses_compare_means_over_layers() -> None:
    def of(*std: float) -> Responses:
        return Responses(tuple("abc"[: len(std)]), std)

    measured = {
        "plain-20": of(1.0, 3.0),
        "plain-56": of(2.0),
        "resnet-20": of(1.0, 1.4),
        "resnet-56": of(1.0),
        "resnet-110": of(1.1),
    }
    assert shown(verdicts.responses(measured)) == [True, True, True, False]
