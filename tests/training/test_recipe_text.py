"""Recipes as people write them, and as nobody should: a recipe, or one line that says what is wrong."""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from resnet_fast.errors import UserError
from resnet_fast.training import recipe as recipes
from resnet_fast.training import recipe_text
from resnet_fast.training.recipe import RANGES, Recipe

KEYS = [f.name for f in fields(Recipe)]

NUMBERS = st.one_of(
    st.integers(),
    st.integers(-3, 3),
    st.sampled_from([2**31, 2**63 - 1, 2**63, 2**64, 10**30, 10**400, -(10**400)]),
    st.floats(),
    st.sampled_from([1e300, 1e-300, 5e-324, -0.0, 0.5]),
)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text() | st.dates() | st.binary() | st.sampled_from(["1e400", "cosine"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text() | st.integers(), inner, max_size=3),
    max_leaves=6,
)


def usable(chosen: Recipe) -> None:
    """What a run asks of a recipe gives numbers, and a checkpoint gives it back."""
    assert recipes.from_dict(json.loads(json.dumps(chosen.to_dict()))) == chosen
    assert chosen.total_steps(100) >= 1
    for step in (0, 1, 10**6):
        assert 0 <= chosen.lr * chosen.factor(step, 100) <= RANGES["lr"][1]


def recipe_or_complaint(values: Any) -> None:
    try:
        chosen = recipes.load_recipe(None, values)
    except UserError as error:
        assert len(str(error)) < 1000
        return
    usable(chosen)


@given(st.sampled_from(KEYS), VALUES)
@example("lr", 10**400)
@example("milestones", [10**400])
@example("milestones", [True, 2])
@example("data_path", "\0")
@example("data_path", "\ud800")
@example("seed", 2**63)
@settings(max_examples=600, deadline=None)
def test_any_value_of_any_key_is_a_recipe_or_a_complaint(key: str, value: Any) -> None:
    recipe_or_complaint({key: value})


@given(st.dictionaries(st.sampled_from(KEYS), NUMBERS | st.booleans() | st.lists(NUMBERS, max_size=3), max_size=8))
@settings(max_examples=300, deadline=None)
def test_any_values_of_several_keys_are_a_recipe_or_a_complaint(values: dict[str, Any]) -> None:
    recipe_or_complaint(values | ({"schedule": "step"} if "milestones" in values else {}))


@given(st.one_of(st.binary(max_size=200), st.text(max_size=200).map(lambda t: t.encode("utf-8", "surrogatepass"))))
@settings(max_examples=300, deadline=None)
def test_any_bytes_after_set_are_values_or_a_complaint(content: bytes) -> None:
    try:
        found = recipe_text._value(content)
    except recipe_text._Refused:
        return
    recipe_or_complaint({"lr": found})


TOP = [(key, most) for key, (_, most) in RANGES.items() if key not in ("milestones", "epochs")]


@pytest.mark.parametrize(("key", "most"), TOP)
def test_the_most_is_allowed_and_more_is_not(key: str, most: float) -> None:
    least = RANGES[key][0]
    others = {"steps": 10} if key == "warmup" else {}
    for value in (least, most):
        usable(recipes.load_recipe(None, {key: value} | others))
    for value in (most * 2, -1):
        with pytest.raises(UserError, match=f"expected {key} from .* to .*; correct {key}"):
            recipes.load_recipe(None, {key: value} | others)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"nesterov": True, "momentum": 0}, "a momentum for nesterov"),
        ({"lr": 1e29, "warmup_factor": 1e3}, "a learning rate of at most 1e"),
        ({"lr": 1, "gamma": 1e3, "schedule": "step", "milestones": list(range(200))}, "a learning rate of at most"),
        ({"schedule": "step", "milestones": list(range(1001))}, "at most 1000 milestones"),
        ({"schedule": "step", "milestones": [math.nan]}, "milestones from 0"),
        ({"milestones": [True]}, "milestones as a list of numbers"),
        ({"mixup": 1e-30}, "mixup of 0 or >= 0.001"),
        ({"momentum": "much"}, "momentum as float"),
        ({"momentum": [0.9]}, "momentum as float"),
        ({1: 2}, "a key of a recipe, got 1"),
        ({None: 2}, "a key of a recipe, got None"),
        ({("a", "b"): 2}, "a key of a recipe"),
        ({10**5000: 2}, "a key of a recipe, got a value too long to print (int)"),
        ({"batch": 10**5000}, "batch from 1 to 1,048,576, got a value too long to print (int)"),
    ],
)
def test_numbers_that_contradict_each_other(values: dict[Any, Any], said: str) -> None:
    with pytest.raises(UserError) as refused:
        recipes.load_recipe(None, values)
    assert said in str(refused.value)


def test_small_parameters_of_mixing_draw_numbers() -> None:
    import torch

    drawn = torch.distributions.Beta(torch.tensor(recipes.LEAST_BETA), torch.tensor(recipes.LEAST_BETA)).sample((9999,))
    assert bool(drawn.isfinite().all())


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("lr: 0.1\nbatch: 8\nlr: 0.2\n", "'lr' twice, in lines 1 and 3"),
        ("lr: 0.1\n'lr': 0.1\n", "'lr' twice, in lines 1 and 2"),
        ("model: {a: 1, b: 2, a: 3}\n", "'a' twice, in lines 1 and 1"),
        (BOMB, "line 2: an alias, *a"),
        ("a: &a\n  b: *a\n", "line 2: an alias, *a"),
        ("<<: {lr: 0.1}\n", "line 1: a merge key"),
        ("milestones: " + "[" * 100_000, "line 1: values more than 8 levels deep"),
        ("milestones: " + "[" * 9 + "]" * 9, "line 1: values more than 8 levels deep"),
        ("{" * 50, "levels deep"),
        ("? [1, 2]\n: 3\n", "unhashable key"),
        ("lr: 2001-99-99\n", "month must be in 1..12"),
        ("lr: !!int ''\n", "index out of range"),
        ("lr: !!python/object/apply:os.system ['true']\n", "could not determine a constructor"),
        ("lr: 1" + "0" * 5000 + "\n", "integer"),
        ("---\nlr: 1\n---\nlr: 2\n", "expected a single document"),
        ("lr: 0.1\nlr", "could not find expected ':'"),
        ("batch: 010\n", "line 1: 010, which YAML 1.1 reads in base 8 or 60; write it in decimals"),
        ("lr: 0.1\nmilestones: [1:30, 2]\n", "line 2: 1:30, which YAML 1.1 reads in base 8 or 60"),
        ("lr: -1:30.5\n", "line 1: -1:30.5, which YAML"),
        ("\0" * 100, "special characters are not allowed"),
        ("# " + "x" * 2**20, "more than 1,048,576 bytes"),
    ],
)
def test_a_file_that_no_recipe_should_be_is_one_line(content: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.yaml"
    path.write_text(content)
    start = time.process_time()
    with pytest.raises(UserError) as refused:
        recipes.load_recipe(path)
    assert said in str(refused.value) and str(path) in str(refused.value) and "\n" not in str(refused.value)
    assert time.process_time() - start < 20


@pytest.mark.parametrize("content", ["1: 2\n", "null: 1\n", "true: 1\n", "1.5: 1\n", "2001-01-01: 1\n"])
def test_a_key_that_is_no_text_is_unknown(content: str, tmp_path: Path) -> None:
    (tmp_path / "odd.yaml").write_text(content)
    with pytest.raises(UserError, match="expected a key of a recipe"):
        recipes.load_recipe(tmp_path / "odd.yaml")


def test_what_is_no_plain_file_is_no_recipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "folder.yaml").mkdir()
    for name, said in (("pipe.yaml", "no plain file"), ("folder.yaml", "no plain file"), ("none.yaml", "no such file")):
        with pytest.raises(UserError, match=rf"a recipe in YAML, got .*{name} \({said}\)"):
            recipes.load_recipe(tmp_path / name)
    for odd in ("a\0b.yaml", "a\0b", "x" * 5000, "x" * 5000 + ".yaml"):
        with pytest.raises(UserError):
            recipes.load_recipe(odd)


def test_a_file_in_utf_8_and_16_is_read_in_any_locale(tmp_path: Path) -> None:
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        (tmp_path / "r.yaml").write_text("data: folder\ndata_path: Bäume/松\n", encoding=encoding)
        assert recipes.load_recipe(tmp_path / "r.yaml").data_path == "Bäume/松"


def test_numbers_as_people_write_them_are_read_and_text_in_quotes_stays() -> None:
    assert recipes.parse_assignments(["a=0", "b=10", "c=0.5", "d=1e-4", "e='010'", "f=0x10"]) == {
        "a": 0,
        "b": 10,
        "c": 0.5,
        "d": "1e-4",
        "e": "010",
        "f": 16,
    }
    with pytest.raises(
        UserError, match=r"a value that YAML can read, got '064' \(line 1: 064, which YAML 1\.1 reads in"
    ):
        recipes.parse_assignments(["batch=064"])


def test_what_follows_from_a_length_is_said_of_a_recipe_alone() -> None:
    told: list[str] = []
    with pytest.raises(UserError, match="lr from 0 to"):
        recipes.load_recipe("digits", {"steps": 1, "lr": 1e300}, told.append)
    assert told == []
    recipes.load_recipe("digits", {"steps": 1}, told.append)
    assert len(told) == 1 and told[0].startswith("steps 1 for epochs")


def test_a_key_set_twice_is_refused() -> None:
    with pytest.raises(UserError, match=r"expected lr once, got --set lr=1 and --set lr = 2; leave one of them out"):
        recipes.parse_assignments(["lr=1", "batch=3", "lr = 2"])


def test_an_option_and_set_must_agree() -> None:
    with pytest.raises(UserError, match=r"expected one value of lr, got --lr 0\.1 and --set lr=0\.2; leave one"):
        recipes.combine({"lr": 0.1}, ["lr=0.2"])
    with pytest.raises(UserError, match=r"got --data-path a and --set data_path=b"):
        recipes.combine({"data_path": "a"}, ["data_path=b"])
    assert recipes.combine({"lr": 0.1, "size": 8}, ["lr=1e-1", "seed=3"])["seed"] == 3
