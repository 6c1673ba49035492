"""Training from weights that are there: a new head, frozen stages, and every optimizer of PyTorch's."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from resnet_fast.errors import UserError
from resnet_fast.models import registry
from resnet_fast.training import checkpoints, curves, finetune, optim, runlog
from resnet_fast.training.loop import describe_run, train
from resnet_fast.training.options import Watch
from resnet_fast.training.recipe import Recipe
from tests.support.checkpoint_cases import touching

Make = Callable[..., Any]


@pytest.fixture(autouse=True)
def _no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curves, "write_curves", lambda out, title: None)


@pytest.fixture
def pretrained(tmp_path: Path) -> Callable[..., Path]:
    """A file with the weights of a net of that name and number of classes, whose norms have seen something."""

    def make(classes: int = 7, name: str = "cifar_resnet20", suffix: str = ".safetensors", **variant: Any) -> Path:
        torch.manual_seed(classes)
        net = registry.build(name, num_classes=classes, **variant)
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-0.1, 0.1)  # type: ignore[union-attr]
                module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
        path = tmp_path / f"{name}-{classes}{suffix}"
        state = dict(net.state_dict())
        save_file(state, path) if suffix == ".safetensors" else torch.save({"state_dict": state}, path)
        return path

    return make


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_head_of_other_classes_is_replaced_and_said(suffix: str, tiny: Make, pretrained: Make) -> None:
    path = pretrained(7, suffix=suffix)
    recipe = tiny(weights=str(path))
    model = optim.build_net(recipe, 10)
    fresh = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    said = finetune.load_weights(model, recipe, 10)
    assert said == f"weights of {path}, but for its head: 7 classes there, a new layer for 10 here"
    read = load_file(path) if suffix == ".safetensors" else torch.load(path, weights_only=True)["state_dict"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, fresh[name] if name.startswith("fc.") else read[name]), name


def test_a_head_of_as_many_classes_stays(tiny: Make, pretrained: Make) -> None:
    recipe = tiny(weights=str(pretrained(10)))
    model = optim.build_net(recipe, 10)
    assert finetune.load_weights(model, recipe, 10).endswith("its head of 10 classes included")
    assert torch.equal(model.fc.weight, load_file(recipe.weights)["fc.weight"])


@pytest.mark.parametrize("name", ["vgg16", "googlenet"])
def test_heads_of_nets_of_other_kinds(name: str, tiny: Make) -> None:
    with torch.device("meta"):
        net = registry.build(name, num_classes=3)
    (head,) = [n for n in finetune.weights.HEADS if n in net.state_dict()]
    assert net.state_dict()[head].shape[0] == 3


def test_weights_of_another_net_are_refused(tiny: Make, pretrained: Make, options: Make) -> None:
    with pytest.raises(UserError, match=r"expected weights with this model's names"):
        train(tiny(weights=str(pretrained(10, "cifar_resnet32"))), options())
    with pytest.raises(UserError, match="expected a weights file"):
        train(tiny(weights="absent.pt"), options())


def test_weights_of_a_run_tell_their_variant(tiny: Make, options: Make) -> None:
    first = train(tiny(shortcut="B", steps=1), options("first"))
    again = tiny(weights=str(first.out / "model.safetensors"))
    with pytest.raises(UserError, match=r"weights of cifar_resnet20 as the recipe has it, got .*shortcut B"):
        describe_run(again, options("second"))
    lines = describe_run(tiny(shortcut="B", weights=again.weights), options("second"))
    assert lines[-1].endswith("its head of 10 classes included (0, 1, 2, …)")


def test_weights_that_would_run_a_command_are_refused(tiny: Make, options: Make, tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    torch.save(touching(proof), tmp_path / "evil.pt")
    with pytest.raises(UserError, match="could run code"):
        train(tiny(weights=str(tmp_path / "evil.pt")), options())
    assert not proof.exists()


@pytest.mark.parametrize(
    ("upto", "trained"), [("stem", "layer1"), ("conv1", "layer1"), ("layer2", "layer3"), ("layer3", "fc")]
)
def test_everything_up_to_a_stage_stays_as_it_was(
    upto: str, trained: str, tiny: Make, pretrained: Make, options: Make
) -> None:
    path = pretrained(7)
    recipe = tiny(steps=3, weights=str(path), freeze=upto, ema=0.5, weight_decay=0.1)
    done = train(recipe, options())
    before, after = load_file(path), load_file(done.out / "model.safetensors")
    names = list(before)
    moved = {
        n.split(".")[0] for n in names if not torch.equal(before[n], after[n]) if before[n].shape == after[n].shape
    }
    order = ["conv1", "bn1", "layer1", "layer2", "layer3", "fc"]
    assert moved | {"fc"} == set(order[order.index(trained) :])
    state = torch.load(checkpoints.found(done.out)[0] / "state.pt", weights_only=True)
    assert {n.split(".")[0] for n in state["optimizer"]["state"]} == set(order[order.index(trained) :])


def test_a_stage_that_the_net_does_not_have(tiny: Make, pretrained: Make, options: Make) -> None:
    with pytest.raises(UserError, match="expected freeze among stem, layer1, layer2, layer3, got 'layer4'"):
        train(tiny(weights=str(pretrained(10)), freeze="layer4"), options())


def test_a_stopped_run_needs_its_weights_no_more(
    tiny: Make, pretrained: Make, options: Make, left: Make, same: Make
) -> None:
    path = pretrained(7)
    recipe = tiny(weights=str(path), freeze="layer1", optimizer="adamw", lr=1e-3, ema=0.9)
    told: list[str] = []
    whole = train(recipe, options("whole"), Watch(note=told.append))
    assert sum("a new layer for 10 here" in text for text in told) == 1
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert [line.get("weights_sha256") for line in runlog.of_kind(whole.out, "run")] == [digest]
    train(recipe, options(stop_after=3))
    path.unlink()
    same(left(train(recipe, options(resume="auto")).out), left(whole.out))


PLAIN = sorted(set(optim.optimizers()) - {"muon"})


@pytest.mark.parametrize("name", PLAIN)
def test_any_optimizer_goes_on_where_it_was_stopped(
    name: str, tiny: Make, options: Make, left: Make, same: Make, minute: None
) -> None:
    recipe = tiny(optimizer=name, lr=1e-3, momentum=0.8, beta2=0.99)
    whole = train(recipe, options("whole"))
    train(recipe, options(stop_after=3))
    done = train(recipe, options(resume="auto"))
    same(left(done.out), left(whole.out))


def test_betas_and_momentum_are_the_recipes(tiny: Make) -> None:
    model = nn.Linear(3, 2)

    def group(**values: Any) -> dict[str, Any]:
        return optim.build_optimizer(model, tiny(momentum=0.8, **values)).param_groups[0]

    assert group(optimizer="adamw", beta2=0.9)["betas"] == (0.8, 0.9)
    assert group(optimizer="rmsprop")["momentum"] == group()["momentum"] == 0.8
    assert group(optimizer="adamw", weight_decay=0.25)["weight_decay"] == 0.25


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"optimizer": "adamv"}, "did you mean"),
        ({"optimizer": "lbfgs"}, "'lbfgs'"),
        ({"optimizer": "adam", "nesterov": True}, "expected an optimizer that can train this net, got adam"),
        ({"optimizer": "muon"}, "muon"),
    ],
)
def test_an_optimizer_that_cannot_train_is_one_line(values: dict[str, Any], said: str, tiny: Make) -> None:
    with pytest.raises(UserError, match=said) as error:
        optim.build_optimizer(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), tiny(**values))
    assert "\n" not in str(error.value)


def test_the_norms_of_frozen_stages_normalise_as_they_did(tiny: Make, pretrained: Make) -> None:
    recipe: Recipe = tiny(weights=str(pretrained(10)), freeze="layer1")
    model = optim.build_net(recipe, 10)
    finetune.freeze(model, "layer1")
    model.train()
    finetune.hold(model, "layer1")
    awake = {name.split(".")[0] for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d) and m.training}
    assert awake == {"layer2", "layer3"}
