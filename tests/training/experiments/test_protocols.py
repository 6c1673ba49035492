"""What each experiment trains: nets that exist, by the paper's numbers in the full protocol, shared where it can be."""

from __future__ import annotations

import pytest

from resnet_fast.errors import UserError
from resnet_fast.models import registry
from resnet_fast.training.experiments.protocols import EXPERIMENTS, Case, experiment

CASES = {case.key: case for e in EXPERIMENTS for case in e.cases}


@pytest.mark.parametrize("key", CASES)
def test_recipe_of_every_case_in_both_protocols(key: str) -> None:
    case = CASES[key]
    assert case.net in registry.names()
    for protocol in ("reduced", "full"):
        recipe = case.recipe(protocol, "somewhere", 3, {})
        assert (recipe.model, recipe.shortcut, recipe.seed) == (case.net, case.shortcut, 3)


def test_full_protocol_has_the_papers_numbers() -> None:
    cifar = CASES["cifar_resnet56"].recipe("full", None, 0, {})
    assert (cifar.data, cifar.size, cifar.batch, cifar.steps, cifar.milestones) == (
        "cifar10", 32, 128, 64000, (32000.0, 48000.0),
    )  # fmt: skip
    assert cifar.warmup == 0
    assert CASES["cifar_resnet110"].recipe("full", None, 0, {}).warmup == 400
    imagenet = CASES["resnet50-B"].recipe("full", "somewhere", 0, {})
    assert (imagenet.data, imagenet.size, imagenet.batch, imagenet.stride_in_1x1) == ("folder", 224, 256, True)
    assert not CASES["resnet34-A"].recipe("full", "somewhere", 0, {}).stride_in_1x1


def test_nets_are_shared_between_experiments() -> None:
    degradation, depth = experiment("degradation"), experiment("depth")
    assert {c.key for c in degradation.cases} & {c.key for c in depth.cases} == {"cifar_resnet20", "cifar_resnet56"}


def test_changes_apply_on_top() -> None:
    assert CASES["cifar_plain20"].recipe("reduced", None, 0, {"epochs": 2, "lr": 0.01}).epochs == 2


def test_unknown_experiment_lists_them() -> None:
    with pytest.raises(UserError, match="degradation, depth, bottleneck, shortcuts, responses, flops, or all"):
        experiment("width")


def test_one_key_per_net_and_shortcut() -> None:
    assert Case("x", "resnet34", "A").key != Case("x", "resnet34", "B").key
