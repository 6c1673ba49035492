"""resnet_fast/tools/trained.py: the net, the names and the preprocessing of a file of weights."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from resnet_fast.errors import UserError
from resnet_fast.io.weight_facts import Facts
from resnet_fast.models import registry
from resnet_fast.tools import trained

FACTS = Facts("cifar_resnet20", 16, ("cat", "dog"), (0.5,), (0.25,), 1.0, shortcut="B", data="folder")


def _file(
    path: Path, facts: Facts | None = FACTS, model: str = "cifar_resnet20", classes: int = 2, **variant: object
) -> Path:
    variant = variant or ({} if facts is None else dict(facts.variant))
    net = registry.build(model, num_classes=classes, **variant)
    save_file(net.state_dict(), path, metadata=None if facts is None else {"resnet_fast": facts.to_json()})
    return path


def test_a_file_that_knows_itself(tmp_path: Path) -> None:
    found = trained.load(_file(tmp_path / "w.safetensors"))
    assert found.facts == FACTS and found.named and not found.wnids and not found.net.training
    assert found.inputs(torch.zeros(3, 40, 30, dtype=torch.uint8)).shape == (3, 16, 16)
    assert not any("assumed" in text for text in found.said)


def test_more_rows_than_names_have_numbers(tmp_path: Path) -> None:
    """A run with ``--set classes=1000`` on two class folders does not know ImageNet."""
    found = trained.load(_file(tmp_path / "w.safetensors", classes=1000))
    assert found.facts.classes[:3] == ("cat", "dog", "class 2") and found.facts.classes[17] == "class 17"
    assert len(found.facts.classes) == 1000 and any("numbers for the rest" in text for text in found.said)


def test_imagenets_names_are_assumed_for_its_nets_alone(tmp_path: Path) -> None:
    found = trained.load(_file(tmp_path / "a.safetensors", None, "resnet18", 1000), "resnet18")
    assert found.facts.classes[281] == "tabby" and found.wnids[281] == "n02123045"
    assert any("ImageNet's names (assumed" in text for text in found.said)
    small = trained.load(_file(tmp_path / "b.safetensors", None, classes=1000), "cifar_resnet20")
    assert small.facts.classes[281] == "class 281" and not small.named
    few = trained.load(_file(tmp_path / "c.safetensors", None, "resnet18", 3), "resnet18")
    assert few.facts.classes == ("class 0", "class 1", "class 2")


def test_wnids_are_sorted_as_torchvision_numbers_their_folders() -> None:
    names, wnids = trained.imagenet()
    assert len(names) == len(wnids) == len(set(wnids)) == 1000 and list(wnids) == sorted(wnids)
    known = {
        "n01440764": "tench",
        "n02123045": "tabby",
        "n02012849": "crane bird",
        "n03126707": "crane",
        "n15075141": "toilet tissue",
    }
    assert {wnid: names[wnids.index(wnid)] for wnid in known} == known


def test_names_of_a_file_go_before(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("x\ny\n")
    found = trained.load(_file(tmp_path / "w.safetensors"), names=tmp_path / "names.txt")
    assert found.facts.classes == ("x", "y")


def test_names_are_of_a_plain_file_that_is_not_endless(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "large").open("wb") as file:
        file.truncate(trained.MOST_NAMES + 1)
    for path, why in (
        (tmp_path / "pipe", "No plain file"),
        (Path("/dev/zero"), "No plain file"),
        (tmp_path, "Is a directory"),
        (tmp_path / "large", "More than"),
    ):
        with pytest.raises(UserError, match=rf"expected a text file of class names, got .*{why}"):
            trained.names_of_file(path, 2)


@pytest.mark.parametrize(
    ("facts", "classes", "message"),
    [
        (replace(FACTS, model="resnet5"), 2, "the name of a net in what .* got 'resnet5'"),
        (replace(FACTS, shortcut="Z"), 2, "shortcut A, B or C"),
        (replace(FACTS, stride_in_1x1=True), 2, "ImageNet ResNet to move the stride in"),
        (replace(FACTS, classes=("a", "b", "c")), 2, "at most 2 class names"),
        (replace(FACTS, model="cifar_resnet32"), 2, "this model's names"),
        (replace(FACTS, model="resnet18"), 2, "this model's names"),
        (replace(FACTS, shortcut="C"), 2, "this model's names"),
    ],
)
def test_facts_that_do_not_fit_the_weights(tmp_path: Path, facts: Facts, classes: int, message: str) -> None:
    path = _file(tmp_path / "w.safetensors", facts, classes=classes, shortcut="B")
    with pytest.raises(UserError, match=message) as caught:
        trained.load(path)
    assert "\n" not in str(caught.value)


def test_a_net_asked_for_goes_before_what_the_file_says(tmp_path: Path) -> None:
    path = _file(tmp_path / "w.safetensors", replace(FACTS, model="nonsense\x1b"), shortcut="A")
    found = trained.load(path, "cifar_resnet20")
    assert found.facts.model == "cifar_resnet20" and found.facts.size == 16
    assert any(r"though the file says nonsense\x1b" in text for text in found.said)
