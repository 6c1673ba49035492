"""JSON output that every reader accepts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from resnet_fast.io import safe_files

PACKAGE = Path(safe_files.__file__).parents[1]


def strict(text: str) -> Any:
    """Parse JSON as strictly as readers in other languages do."""

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    return json.loads(text, parse_constant=refuse)


def test_what_is_no_number_is_null() -> None:
    value = {"a": float("nan"), "b": [1.5, float("inf"), (-float("inf"), 2)], "c": {"d": float("nan")}, "e": "NaN"}
    assert strict(safe_files.json_text(value)) == {"a": None, "b": [1.5, None, [None, 2]], "c": {"d": None}, "e": "NaN"}


@pytest.mark.parametrize("value", [0.1 + 0.2, 5e-324, 1.7976931348623157e308, -0.0, True, None, "text", 3])
def test_everything_else_comes_back_as_it_was(value: Any) -> None:
    assert repr(safe_files.json_value(safe_files.json_text([value]))) == repr([value])


@pytest.mark.parametrize("text", ["NaN", '{"a": Infinity}', "[-Infinity]", "[" * 100_000, "", "{", '{"a": ', b"\xff"])
def test_what_is_no_json_is_a_value_error(text: Any) -> None:
    with pytest.raises(ValueError):
        safe_files.json_value(text)


def test_nothing_else_in_the_package_writes_json() -> None:
    """json.dumps writes NaN, which other readers reject."""
    writers = [p for p in PACKAGE.rglob("*.py") if "json.dump" in p.read_text().replace("``json.dumps``", "")]
    assert writers == [Path(safe_files.__file__)]
