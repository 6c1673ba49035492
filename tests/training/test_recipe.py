"""A recipe: what it takes, what it refuses and how it says so, and the learning rate of every step."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from resnet_fast.errors import UserError
from resnet_fast.training import recipe as recipes
from resnet_fast.training import recipe_text
from resnet_fast.training.recipe import Recipe


@pytest.mark.parametrize("name", recipes.names())
def test_every_shipped_recipe_loads_and_survives_json(name: str) -> None:
    shipped = recipes.load_recipe(name, {"data_path": "somewhere"})
    assert recipes.from_dict(json.loads(json.dumps(shipped.to_dict()))) == shipped
    assert 0 <= shipped.factor(0, 100) <= 1


def test_the_shipped_recipes_are_the_documented_ones() -> None:
    wanted = {"digits", "fashion-mnist", "cifar-paper", "cifar-paper-110", "imagenet-paper", "imagenet-modern"}
    assert wanted <= set(recipes.names())


def test_unknown_key_names_the_close_one() -> None:
    with pytest.raises(UserError, match=r"expected a key of a recipe, got 'wieght_decay'; did you mean weight_decay"):
        recipes.load_recipe(None, {"wieght_decay": 0.1})
    with pytest.raises(UserError, match="there are model, "):
        recipes.load_recipe(None, {"qqqq": 1})


def test_unknown_recipe_names_the_close_one() -> None:
    with pytest.raises(UserError, match="did you mean cifar-paper"):
        recipes.load_recipe("cifar_paper")


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("batch", "many", "batch as int"),
        ("batch", 1.5, "batch as int"),
        ("batch", True, "batch as int"),
        ("lr", "fast", "lr as float"),
        ("lr", None, "lr as float"),
        ("flip", 1, "flip as bool"),
        ("model", 20, "model as str"),
        ("subset", "all", "subset as int or null"),
        ("milestones", 30, "milestones as a list of numbers"),
        ("milestones", ["a"], "milestones as a list of numbers"),
    ],
)
def test_a_value_of_another_type_is_named(key: str, value: Any, wanted: str) -> None:
    with pytest.raises(UserError, match=f"expected {wanted}, got"):
        recipes.load_recipe(None, {key: value})


@pytest.mark.parametrize(
    "values",
    [
        {"data": "mnist"},
        {"augment": "cut"},
        {"schedule": "exponential"},
        {"amp": "int8"},
        {"backend": "xla"},
        {"batch": 0},
        {"accumulate": 0},
        {"size": 0},
        {"subset": 0},
        {"steps": 0},
        {"epochs": 0.0},
        {"epochs": math.nan},
        {"epochs": math.inf},
        {"lr": -0.1},
        {"lr": math.nan},
        {"lr": math.inf},
        {"gamma": math.nan},
        {"warmup_factor": math.nan},
        {"warmup_factor": -1.0},
        {"norm_weight_decay": -1.0},
        {"ema": 1.0},
        {"momentum": -0.1},
        {"label_smoothing": 1.0},
        {"schedule": "step", "milestones": [3, 2]},
        {"schedule": "step", "milestones": [math.nan]},
        {"schedule": "cosine", "milestones": [3]},
        {"data": "folder"},
    ],
)
def test_a_number_that_no_run_can_use_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        recipes.load_recipe(None, values)


def test_exactly_one_length() -> None:
    for values in ({"epochs": 3, "steps": 10}, {"epochs": None}):
        with pytest.raises(UserError, match="expected either epochs or steps"):
            recipes.load_recipe(None, values)


def test_one_length_replaces_the_other() -> None:
    in_epochs = recipes.load_recipe("cifar-paper", {"epochs": 3, "milestones": [1, 2]})
    assert (in_epochs.epochs, in_epochs.steps) == (3.0, None) and in_epochs.total_steps(391) == 1173
    in_steps = recipes.load_recipe("digits", {"steps": 7, "warmup": 0})
    assert (in_steps.epochs, in_steps.steps) == (None, 7) and in_steps.total_steps(23) == 7
    assert recipes.load_recipe("digits", {"epochs": 0.001}).total_steps(23) == 1


def test_lengths_in_another_unit_keep_their_share_and_it_is_said() -> None:
    told: list[str] = []
    chosen = recipes.load_recipe("cifar-paper", {"epochs": 4}, told.append)
    assert (chosen.epochs, chosen.steps, chosen.milestones) == (4.0, None, (2.0, 3.0))
    assert told == ["epochs 4 for steps 64000, and in proportion: milestones [2.0, 3.0]"]
    chosen = recipes.load_recipe("reduced-cifar", {"steps": 100}, told.append)
    assert (chosen.warmup, chosen.milestones, chosen.factor(12, 312), chosen.factor(49, 312)) == (
        12.5,
        (50, 75),
        1.0,
        1.0,
    )
    assert chosen.factor(50, 312) == pytest.approx(0.1) and chosen.factor(75, 312) == pytest.approx(0.01)
    assert told[1] == "steps 100 for epochs 8, and in proportion: warmup 12.5, milestones [50.0, 75.0]"
    assert recipes.load_recipe("digits", {"steps": 7, "warmup": 2}, told.append).warmup == 2
    assert len(told) == 2


@pytest.mark.parametrize("name", recipes.names())
@pytest.mark.parametrize("length", [{"steps": 1}, {"steps": 10}, {"epochs": 0.5}, {"epochs": 7}])
def test_any_recipe_takes_either_length(name: str, length: dict[str, Any]) -> None:
    chosen = recipes.load_recipe(name, length | {"data_path": "x"})
    assert [chosen.factor(step, 50) >= 0 for step in range(chosen.total_steps(50))]


@pytest.mark.parametrize("name", recipes.names())
def test_a_printed_recipe_is_the_recipe(name: str, tmp_path: Path) -> None:
    chosen = recipes.load_recipe(name, {"data_path": 'a folder: of "mine" # ü'})
    (tmp_path / "mine.yaml").write_text(recipe_text.to_yaml(chosen.to_dict()), encoding="utf-8")
    assert recipes.load_recipe(tmp_path / "mine.yaml") == chosen


def test_what_is_frozen_has_weights() -> None:
    with pytest.raises(UserError, match="expected weights for what is frozen, got freeze layer1 without"):
        recipes.load_recipe("digits", {"freeze": "layer1"})


def test_overrides_are_read_as_yaml_and_beat_the_file() -> None:
    given = recipes.parse_assignments(
        ["weight_decay=1e-4", "milestones=[30, 60]", "schedule=step", "flip=true", "lr = 2"]
    )
    chosen = recipes.load_recipe("digits", given)
    assert (chosen.weight_decay, chosen.milestones, chosen.flip, chosen.lr) == (1e-4, (30.0, 60.0), True, 2.0)


@pytest.mark.parametrize("text", ["lr", "lr=[1", "milestones=}"])
def test_an_override_that_is_none(text: str) -> None:
    with pytest.raises(UserError):
        recipes.parse_assignments([text])


def test_text_of_a_number_in_a_file_is_a_float(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("lr: 1e-4\nsteps: 3\n")  # YAML 1.1 reads 1e-4 as text
    chosen = recipes.load_recipe(tmp_path / "mine.yaml")
    assert (chosen.lr, type(chosen.lr), chosen.steps) == (1e-4, float, 3)


@pytest.mark.parametrize("content", [b"- a\n- b\n", b"", b"lr: [\n", b"\xff\xfe\x00"])
def test_a_file_that_is_no_recipe_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "odd.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"odd\.yaml"):
        recipes.load_recipe(tmp_path / "odd.yaml")
    with pytest.raises(UserError, match=r"none\.yaml"):
        recipes.load_recipe(tmp_path / "none.yaml")


def test_a_folder_of_a_recipes_name_does_not_hide_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    assert recipes.load_recipe("digits").data == "digits"


def test_the_papers_cifar_schedule() -> None:
    paper = recipes.load_recipe("cifar-paper")
    rates = {step: paper.lr * paper.factor(step, 391) for step in (0, 31999, 32000, 47999, 48000, 63999)}
    assert rates == pytest.approx({0: 0.1, 31999: 0.1, 32000: 0.01, 47999: 0.01, 48000: 0.001, 63999: 0.001})
    assert paper.total_steps(391) == 64000


def test_the_papers_warm_up_of_110_layers() -> None:
    paper = recipes.load_recipe("cifar-paper-110")
    rates = [paper.lr * paper.factor(step, 391) for step in (0, 399, 400, 31999, 32000, 48000)]
    assert rates == pytest.approx([0.01, 0.01, 0.1, 0.1, 0.01, 0.001])


def test_the_papers_imagenet_schedule_counts_in_epochs() -> None:
    paper = recipes.load_recipe("imagenet-paper", {"data_path": "x"})
    rates = [paper.lr * paper.factor(epoch * 5005 - late, 5005) for epoch in (30, 60) for late in (1, 0)]
    assert rates == pytest.approx([0.1, 0.01, 0.01, 0.001])


def test_linear_warm_up_then_cosine() -> None:
    chosen = Recipe(epochs=None, steps=110, warmup=10, warmup_factor=0.2, schedule="cosine")
    assert [chosen.factor(step, 7) for step in (0, 5, 10, 60)] == pytest.approx([0.2, 0.6, 1.0, 0.5])
    last = chosen.factor(109, 7)
    assert 0 < last < 1e-3 and last == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.99)))


def test_warm_up_as_long_as_the_run() -> None:
    chosen = Recipe(epochs=None, steps=5, warmup=10, warmup_factor=0.0)
    assert [chosen.factor(step, 1) for step in range(5)] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
