"""resnet_fast/io/weight_facts.py: a file's metadata is checked before anything is built from it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from resnet_fast.errors import UserError
from resnet_fast.io import weight_facts
from resnet_fast.io.weight_facts import Facts

GOOD = Facts("resnet18", 64, ("cat", "dog"), (0.5,), (0.25,), 1.0, "A", False, "bfloat16", "digits")


def test_round_trip() -> None:
    assert weight_facts.parse(GOOD.to_json(), "w") == GOOD


def test_what_files_do_not_say_has_a_default_and_what_later_ones_say_is_passed_over() -> None:
    least = {key: GOOD.to_dict()[key] for key in ("model", "size", "classes", "mean", "std", "resize")}
    read = weight_facts.parse(json.dumps(least | {"later": {"deep": [1]}}), "w")
    assert (read.shortcut, read.stride_in_1x1, read.amp, read.data) == (None, False, "none", "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": None}, "model as str"),
        ({"model": 3}, "model as str"),
        ({"size": "64"}, "size as int"),
        ({"size": True}, "size as int"),
        ({"size": 0}, "size in 1"),
        ({"size": 10**9}, "size in 1"),
        ({"classes": []}, "a list of names"),
        ({"classes": "cat"}, "classes as list"),
        ({"classes": ["cat", 3]}, "a list of names"),
        ({"mean": [0.5, 0.5]}, "1 or 3 channels"),
        ({"mean": [0.5] * 3}, "1 or 3 channels"),
        ({"mean": []}, "1 or 3 channels"),
        ({"mean": 0.5}, "mean as list"),
        ({"mean": ["0.5"]}, "a list of numbers"),
        ({"mean": [10**400]}, "a list of numbers"),
        ({"mean": [float("nan")]}, "finite means"),
        ({"std": [0.0]}, "deviations above 0"),
        ({"std": [float("inf")]}, "finite means"),
        ({"std": None}, "std as list"),
        ({"resize": 0}, "resize above 0"),
        ({"resize": 1e9}, "resize above 0"),
        ({"resize": float("nan")}, "resize above 0"),
        ({"shortcut": 3}, "shortcut as str or null"),
        ({"stride_in_1x1": "no"}, "stride_in_1x1 as bool"),
        ({"amp": "int8"}, "amp among"),
        ({"data": ["digits"]}, "data as str"),
    ],
)
def test_a_wrong_value_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        weight_facts.parse(json.dumps(GOOD.to_dict() | change), "w.safetensors")
    assert "w.safetensors" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["model", "size", "classes", "mean", "std", "resize"])
def test_a_missing_value_is_named(key: str) -> None:
    values = GOOD.to_dict()
    del values[key]
    with pytest.raises(UserError, match=f"expected {key} .* got none"):
        weight_facts.parse(json.dumps(values), "w")


def test_a_text_too_long_is_not_even_parsed() -> None:
    with pytest.raises(UserError, match="characters"):
        weight_facts.parse(" " * (weight_facts.MAX_TEXT + 1), "w")
